"""Homes: which workers have the KV of a prompt's beginning, as far as the scheduler can know.

Where engines share the KV of equal beginnings, a conversation's next turn, or another question
under the same instructions, costs least where the beginning was computed lately. A beginning is
named by a chain of hashes, one for each full chunk of the prompt. Whoever was given a prompt is a
home of its chunks until it has been given as many others as its memory holds. What an engine has
thrown away before that is not known here: a home is a guess, and a wrong one costs no more than the
prefill that would be due elsewhere.
"""

from collections import OrderedDict
from hashlib import blake2b

from shared.tokens import TOKEN_BYTES

CHUNK_TOKENS = 64
"""Shorter common beginnings save less than a token's time."""
CHUNKS_MAX = 256
"""Of one prompt: 16,384 tokens. What two longer ones have in common beyond is not seen."""
KEY_BYTES = 8
CHUNKS_KNOWN_MAX = 65_536
"""Of all prompts: some megabytes, and 4 million tokens."""
HOMES_MAX = 8
"""Workers that are remembered for one chunk, the latest ones."""

Keys = tuple[bytes, ...]


def keys_of(prompt: bytes) -> Keys:
    """The names of a packed prompt's beginnings, one a full chunk, the shortest first; empty for a
    prompt of less than one chunk. The last token is never found in a cache."""
    size = CHUNK_TOKENS * TOKEN_BYTES
    keys, last = [], b""
    for start in range(0, min(len(prompt) - TOKEN_BYTES, CHUNKS_MAX * size) - size + 1, size):
        last = blake2b(last + prompt[start : start + size], digest_size=KEY_BYTES).digest()
        keys.append(last)
    return tuple(keys)


class Homes:
    """The book of chunks, the one longest not asked for first."""

    def __init__(self) -> None:
        self._workers: OrderedDict[bytes, dict[str, int]] = OrderedDict()
        """Chunk to worker to the worker's count at which others have taken the chunk's place."""
        self._placed: dict[str, int] = {}
        """Chunks that each worker was given, in all."""

    def cached_tokens(self, keys: Keys) -> dict[str, int]:
        """Worker to how many of the prompt's first tokens it is thought to have."""
        found: dict[str, int] = {}
        for number, key in enumerate(keys):
            homes = self._workers.get(key)
            if homes is None:
                break
            for worker, until in homes.items():
                # A chunk is of use only behind all those before it.
                behind = found.get(worker, 0) == number * CHUNK_TOKENS
                if behind and self._placed.get(worker, until) < until:
                    found[worker] = (number + 1) * CHUNK_TOKENS
        return found

    def placed(self, keys: Keys, worker: str, capacity_tokens: int) -> None:
        """This worker is going to have them all, until it has been given as many other tokens as it
        can hold."""
        count = self._placed.get(worker, 0) + len(keys)
        self._placed[worker] = count
        for key in reversed(keys):  # of one prompt the end is forgotten before the beginning
            homes = self._workers.setdefault(key, {})
            homes.pop(worker, None)
            homes[worker] = count + capacity_tokens // CHUNK_TOKENS
            if len(homes) > HOMES_MAX:
                del homes[next(iter(homes))]
            self._workers.move_to_end(key)
        while len(self._workers) > CHUNKS_KNOWN_MAX:
            self._workers.popitem(last=False)

    def gone(self, worker: str) -> None:
        """Its memory is gone with it; a name is never used again."""
        self._placed.pop(worker, None)

    def __len__(self) -> int:
        return len(self._workers)
