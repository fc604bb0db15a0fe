"""What one iteration computes: decodes first, then chunks of prefill, under a budget of tokens."""

from collections.abc import Callable, Iterable, Sequence as Items
from typing import NamedTuple

from services.worker.paged.pool import Key
from services.worker.paged.sequence import Sequence


class Share(NamedTuple):
    """So many of a sequence's next tokens."""

    sequence: Sequence
    tokens: int


def plan(
    sequences: Iterable[Sequence],
    *,
    budget: int,
    rows_max: int,
    prefill_first: bool,
    find: Callable[[Sequence], None],
    awaited: Callable[[Sequence], Items[Key]],
    turn: int = 0,
) -> list[Share]:
    """The shares of one iteration; sequences in their order of arrival.

    A prompt whose next block an earlier one is about to compute waits for it (`awaited`: keys of
    the blocks that a sequence has yet to compute), and takes it over (`find`). At most `rows_max`
    sequences take part; where more could decode they take turns (`turn`: of this iteration).
    """
    running = [s for s in sequences if s.runs]
    prefills = [s for s in running if not s.decodes]
    shares: list[Share] = []
    if not (prefill_first and prefills):
        decodes = [s for s in running if s.decodes]
        most = min(budget, rows_max) or 1
        if len(decodes) > most:
            first = turn * most % len(decodes)
            decodes = [*decodes[first:], *decodes[:first]]
        shares = [Share(s, 1) for s in decodes[:most]]
    left = budget - len(shares)
    claimed: set[Key] = set()
    for sequence in prefills:
        if left <= 0 or len(shares) >= rows_max:
            break
        find(sequence)
        keys = awaited(sequence)
        if keys and keys[0] in claimed:
            continue
        claimed.update(keys)
        tokens = min(left, sequence.left)
        shares.append(Share(sequence, tokens))
        left -= tokens
    return shares
