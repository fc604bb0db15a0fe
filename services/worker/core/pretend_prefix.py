"""Free blocks that still remember what they held: the prefix cache of a pretend worker.

As in vLLM's block pool: blocks that are freed go to the end of a queue, of each request the last
block first, and new ones are taken from its head. So the longest free is overwritten first, and
of one request its end before its beginning. Until then a request that comes back finds its first
blocks as they were and does not compute them anew. What another request could use of them is not
modelled: only a request's own blocks are found.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Freed:
    """Blocks of one request, freed together."""

    blocks: int
    """Not overwritten yet: its first ones."""
    full: int
    """Of these, how many can be found at most: full blocks, from the beginning on."""


class FreedBlocks:
    """The queue. It holds counts, not blocks."""

    def __init__(self, most: int) -> None:
        self._untouched = most
        self._queue: deque[_Freed] = deque()
        self._of: dict[str, _Freed] = {}

    def __len__(self) -> int:
        """Free blocks."""
        return self._untouched + sum(freed.blocks for freed in self._queue)

    def take(self, blocks: int) -> None:
        """Somebody is given so many: they are overwritten."""
        fresh = min(blocks, self._untouched)
        self._untouched -= fresh
        blocks -= fresh
        while blocks:
            freed = self._queue[0]
            taken = min(blocks, freed.blocks)
            freed.blocks -= taken
            blocks -= taken
            if not freed.blocks:
                self._queue.popleft()

    def free(self, request_id: str, blocks: int, full: int) -> None:
        """A request leaves with so many blocks, the first `full` of them filled."""
        if blocks:
            freed = _Freed(blocks, min(full, blocks))
            self._queue.append(freed)
            self._of[request_id] = freed

    def reuse(self, request_id: str, most: int) -> int:
        """A request is back and takes what is left of its first blocks, at most so many. Says how
        many those are: they are in use again."""
        freed = self._of.pop(request_id, None)
        if freed is None:
            return 0
        found = min(freed.blocks, freed.full, most)
        freed.blocks -= found
        freed.full = 0
        return found

    def forget(self, request_id: str) -> None:
        """It has ended and will not be back; its blocks stay where they are in the queue."""
        self._of.pop(request_id, None)
