"""Rising: the name with the least key, where keys rise unnoticed."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace

from services.scheduler.core.policies.lanes import GARBAGE_MIN

Key = tuple[int, float, int]


class Rising:
    """The name with the least key, where keys rise unnoticed and a fall is told by `post`.

    A heap whose entries may be out of date: one that comes up is compared with the key of now and
    goes back if that is larger. O(log n) per rise of a key, and only if it matters.
    """

    def __init__(self, key: Callable[[str], Key]) -> None:
        self._key = key
        self._posted: dict[str, tuple[Key, int, str]] = {}
        self._heap: list[tuple[Key, int, str]] = []
        self._posts = 0

    def post(self, name: str) -> None:
        """It is new, or its key has fallen."""
        heappush(self._heap, self._entry(name))
        if len(self._heap) > 2 * len(self._posted) + GARBAGE_MIN:
            self._heap = list(self._posted.values())
            heapify(self._heap)

    def drop(self, name: str) -> None:
        self._posted.pop(name, None)

    def least(self) -> str | None:
        while self._heap:
            entry = self._heap[0]
            name = entry[2]
            if self._posted.get(name) is not entry:
                heappop(self._heap)
            elif self._key(name) != entry[0]:
                heapreplace(self._heap, self._entry(name))
            else:
                return name
        return None

    def leasts(self, count: int) -> list[str]:
        """The names with the least keys, as many as there are up to `count`."""
        found: list[str] = []
        while len(found) < count and (name := self.least()) is not None:
            found.append(name)
            self.drop(name)
        for name in found:
            self.post(name)
        return found

    def _entry(self, name: str) -> tuple[Key, int, str]:
        self._posts += 1
        entry = (self._key(name), self._posts, name)
        self._posted[name] = entry
        return entry
