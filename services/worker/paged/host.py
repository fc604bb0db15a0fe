"""KV blocks in host memory: what the device had no room for, by the key of its content.

A bounded map that gives up first what was not asked for longest. It holds payloads, whatever they
are, and does not look into them; who put one there says how many bytes it has.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass(slots=True)
class _Kept(Generic[Payload]):
    payload: Payload
    size_bytes: int


class HostBlocks(Generic[Payload]):
    """Up to `capacity` blocks; 0: it keeps nothing."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 0, f"{capacity} blocks"
        self.capacity = capacity
        self.hits = 0
        """Blocks that were asked for and were here."""
        self.misses = 0
        self.bytes_held = 0
        self.bytes_in = 0
        """Of all blocks that were put here since the start."""
        self.bytes_out = 0
        """Of all blocks that were found here since the start."""
        self._kept: OrderedDict[Hashable, _Kept[Payload]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        """Whether it is here; counts nothing and keeps its age."""
        return key in self._kept

    def known(self, keys: Sequence[Hashable]) -> int:
        """How many of a chain's keys are here, from the first on without a gap; counts nothing."""
        for index, key in enumerate(keys):
            if key not in self._kept:
                return index
        return len(keys)

    def put(self, key: Hashable, payload: Payload, size_bytes: int) -> Payload | None:
        """Keep it, in the place of what was there under this key. Returns what had to go for it,
        if anything, whose memory can be used again: with no capacity the payload itself."""
        if not self.capacity:
            return payload
        gone = self.pop(key)
        if gone is None and len(self._kept) >= self.capacity:
            gone = self._remove(next(iter(self._kept)))
        self._kept[key] = _Kept(payload, size_bytes)
        self.bytes_held += size_bytes
        self.bytes_in += size_bytes
        return gone

    def get(self, key: Hashable) -> Payload | None:
        """The payload, which is the youngest now; None: it is not here."""
        kept = self._kept.get(key)
        if kept is None:
            self.misses += 1
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        self.bytes_out += kept.size_bytes
        return kept.payload

    def pop(self, key: Hashable) -> Payload | None:
        """Give it up and return it; counts neither a hit nor a miss."""
        return self._remove(key) if key in self._kept else None

    def clear(self) -> None:
        """Give up everything."""
        self._kept.clear()
        self.bytes_held = 0

    def _remove(self, key: Hashable) -> Payload:
        kept = self._kept.pop(key)
        self.bytes_held -= kept.size_bytes
        return kept.payload
