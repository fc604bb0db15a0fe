"""Draws: the core's chance. Number k of a seed is always the same, whatever was drawn how before.

splitmix64 as a counter: draw k is a hash of seed + k x the golden ratio (Steele, Lea and Flood,
OOPSLA 2014). The core may not use a generator of the process; equal history gives equal draws.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_AHEAD = 4096
"""Values computed at a time: one NumPy call costs as much as some hundred of them."""


class Draws:
    """A stream of uniform numbers."""

    def __init__(self, seed: int, drawn: int = 0) -> None:
        """`seed`: any integer. `drawn`: how many draws to skip, to go on where another stopped."""
        self._seed = seed & _MASK
        self.drawn = drawn
        self._from = drawn
        self._ready = np.empty(0)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """The next `count` numbers, at least 0 and below 1. Read only."""
        start = self.drawn - self._from
        if start + count > len(self._ready):
            self._ready = uniforms_at(self._seed, self.drawn, max(count, _AHEAD))
            self._ready.flags.writeable = False
            self._from, start = self.drawn, 0
        self.drawn += count
        return self._ready[start : start + count]

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1; 0 if there is no choice."""
        return min(int(self.uniforms(1)[0] * limit), limit - 1) if limit > 1 else 0


def uniforms_at(seed: int, first: int, count: int) -> NDArray[np.float64]:
    """Draws number `first` to `first + count - 1` of a seed: 53 bits each."""
    start = np.uint64((seed + _GOLDEN * (first + 1)) & _MASK)
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
