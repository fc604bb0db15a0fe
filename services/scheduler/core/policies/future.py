"""Future: the exact peak of a batch's KV memory, if each request ends when it is expected to.

Theory of operation. Every running request grows by one token per step and gives all back when it
ends. So memory only rises between two endings, and its peak is at the instant of some ending: when
request k ends, those with at least as much left to make are alive, and each has grown by what k
had left. M* is the largest of these sums (Past-Future's equations, section 1.3 of its research
note). Memory in blocks rises between endings too, so the same instants decide, with each request's
own tokens rounded up.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def peak(held: Sequence[int] | Ints, remaining: Sequence[int] | Ints, block_tokens: int = 1) -> int:
    """M* of one batch: `held` tokens now and `remaining` tokens to make, per request; in blocks.
    With blocks of one token this is the source's M* = max over k of (a_1 + .. + a_k + k r_k)."""
    return int(peaks(_ints(held), _ints(remaining)[None, :], block_tokens)[0])


def peaks(held: Ints, remaining: Ints, block_tokens: int = 1) -> Ints:
    """M* for several guesses at once: `held` (n,), `remaining` (S, n) -> (S,), in blocks."""
    return Future(held, remaining, block_tokens).peaks


class Future:
    """A batch under S lists of remaining lengths, to which candidates may be added one by one."""

    __slots__ = ("_at_end", "_block", "_held", "_remaining")

    def __init__(self, held: Ints, remaining: Ints, block_tokens: int = 1) -> None:
        """`held` (n,), `remaining` (S, n), in tokens."""
        self._block = max(1, block_tokens)
        lists, size = remaining.shape
        order = np.argsort(-remaining, axis=1)
        self._held = held[order]
        # As take_along_axis, at a tenth of its cost.
        self._remaining = remaining.ravel()[order + np.arange(lists)[:, None] * size]
        self._at_end = _units_at_ends(self._held, self._remaining, self._block)
        """What all hold when each one ends; of two that end together the later entry counts
        both."""

    @property
    def lists(self) -> int:
        """S."""
        return len(self._remaining)

    @property
    def peaks(self) -> Ints:
        """M* of each list, in blocks."""
        largest: Ints = self._at_end.max(axis=1, initial=0)
        return largest

    def peak(self) -> int:
        """The largest M* of the lists, in blocks."""
        return int(self._at_end.max(initial=0))

    def peak_with(self, held: int, remaining: Ints) -> int:
        """The largest M* if one more came: `held` tokens, `remaining` (S,)."""
        others, own = self._with(held, remaining)
        return max(int(others.max(initial=0)), int(own.max(initial=0)))

    def add(self, held: int, remaining: Ints) -> None:
        """One more came."""
        others, own = self._with(held, remaining)
        lists = self.lists
        self._at_end = np.concatenate((others, own[:, None]), axis=1)
        newcomer = np.full((lists, 1), held, dtype=np.int64)
        self._held = np.concatenate((self._held, newcomer), axis=1)
        self._remaining = np.concatenate((self._remaining, remaining[:, None]), axis=1)

    def _with(self, held: int, remaining: Ints) -> tuple[Ints, Ints]:
        """What is held at the ends of those present (S, n) and at the newcomer's own (S,)."""
        left = remaining[:, None]
        alive = self._remaining >= left
        own = (_blocks(self._held + left, self._block) * alive).sum(axis=1)
        own += _blocks(remaining + held, self._block)
        growth = _blocks(self._remaining + held, self._block)
        others = self._at_end + growth * (self._remaining <= left)
        return others, own


def _units_at_ends(held: Ints, remaining: Ints, block: int) -> Ints:
    """Both (S, n) by falling `remaining`: sum over i <= k of blocks(held_i + remaining_k)."""
    size = held.shape[1]
    ranks = np.arange(1, size + 1, dtype=np.int64)
    if block == 1:
        return held.cumsum(axis=1) + ranks * remaining
    if block > size:
        each = _blocks(held[:, :, None] + remaining[:, None, :], block)
        summed: Ints = (each * np.tri(size, dtype=np.int64).T).sum(axis=1)
        return summed
    # blocks(h + r) = floor((h + block - 1) / block) + floor(r / block) + (1 if the rests carry):
    # how many of the first k carry is looked up in running counts per rest.
    quotient, rest = np.divmod(held + (block - 1), block)
    steps, rest_left = np.divmod(remaining, block)
    reaches = rest[:, None, :] >= np.arange(1, block + 1)[:, None]
    counts = np.cumsum(reaches, axis=2, dtype=np.int32)
    carried = np.take_along_axis(counts, (block - 1 - rest_left)[:, None, :], axis=1)[:, 0, :]
    units: Ints = quotient.cumsum(axis=1) + ranks * steps + carried
    return units


def _blocks(tokens: Ints, block: int) -> Ints:
    return tokens if block == 1 else -(-tokens // block)


def _ints(values: Sequence[int] | Ints) -> Ints:
    return np.asarray(values, dtype=np.int64)
