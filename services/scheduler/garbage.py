"""Garbage: when the scheduler's process looks for cycles of dead objects.

A full collection visits every living object: with ten thousand requests and a thousand workers in
the books it stops the process for 0.1 to 0.3 s, and the interpreter does one whenever the books
have grown by a quarter. The core makes no cycles: what it drops is freed at once. Young objects,
where those of the event loop and of exceptions die, are still looked at, at a cost that does not
depend on how much is in the books.
"""

import gc

YOUNG_MAX = 1_000
"""Objects made, less objects freed, before the youngest are looked at; the interpreter has 700."""
YOUNG_ROUNDS = 5
"""Of those looks, before the next older ones are looked at too; the interpreter has 10."""
FULL_ROUNDS = 1_000
"""Of these, before a full collection: in a busy mesh one in many minutes at most; as long as the
process's memory is not growing the interpreter puts it off further."""


def spare_full_collections() -> None:
    """Put aside what was loaded at the start, and make full collections rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, YOUNG_ROUNDS, FULL_ROUNDS)
