"""Survival: the chance that an output goes on, by class of request, from recent outputs.

Theory of operation. G(l) counts the outputs of the history that were longer than l. Whoever has
made g tokens makes t more with chance S(g, t) = (G(g + t) + tail) / (G(g) + 1): a running request
is an observation that is not over, and what is longer than anything seen falls off as a power of
the length. Classes have histories of their own, which shrink towards the whole one by so many
outputs of it; a class is a range of prompt lengths. Where a prediction came with the request, the
outputs of like predictions (told.py) come before the class in the same way. While the history is
short, outputs that are uniform up to each request's own limit stand in for it, and go as real ones
come; outputs that a limit cut are thought to end anywhere up to the request's own. Lengths are
counted up to a fixed resolution, so that all is looked up in one table (rules: research notes on
`tranche`, section 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.policies.told import Pools, levels_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

GRID = 40
"""Instants ahead at which memory is looked at, closer together near now."""
TAIL_TOKENS = 64
"""Beyond the longest known output the chance to go on is ((g + 64) / (g + 64 + t))^2."""
SHRINKAGE = 20.0
"""Outputs of the whole history that count in each class."""
STAND_INS = 10.0
"""Outputs, uniform up to the request's limit, that an empty history begins with."""
STAND_INS_END = 75
"""Real outputs until which they fade away."""
TOLD_SHRINKAGE = 2.0
"""Outputs of the class by prompt that count beside those of like predictions."""
PROMPT_KINDS = 13
KINDS = 1 + PROMPT_KINDS
"""Classes by prompt; with a prediction its level times this is added."""
OPEN_SHARE = 0.01
"""With more outputs than this that are not known to end, limits are looked to instead of the
longest known one."""
RESOLUTION = 8192
"""Most lengths told apart."""
LENGTH_MAX = 1 << 20
"""Longer outputs count as if they had not ended: one absurd report must not blur all others."""


@lru_cache(maxsize=16_384)
def kind_of(prompt_tokens: int, predicted_tokens: int | None = None) -> int:
    """The class of a request."""
    predicted = _ints((predicted_tokens or 0,))
    return int(kinds_of(_ints((prompt_tokens,)), predicted)[0])


def kinds_of(prompts: Ints, predicted: Ints | None = None) -> Ints:
    """The classes of requests: by prompt, and by predicted output where that is above 0."""
    doublings = np.log2(np.maximum(prompts, 0) / 16 + 1)
    kinds = 1 + np.minimum(PROMPT_KINDS - 1, doublings.astype(np.int64))
    if predicted is not None and predicted.any():
        kinds += KINDS * levels_of(predicted)
    return kinds


def grid_to(end: int) -> Ints:
    """Instants from now to `end` tokens ahead, in tokens of every running request."""
    steps = np.arange(GRID + 1) / GRID
    return np.ceil(end * steps * steps).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Survival:
    """A prepared history."""

    longest: int
    """The largest output whose length is known."""
    bounded: bool
    """No output goes beyond its request's limit."""
    _unit: int
    """Tokens in one step of the tables."""
    _whole: Floats
    """G at each step."""
    _classes: NDArray[np.int32]
    """The same of each class, one after the other."""
    _width: int
    _stand_ins: float
    _open: bool
    """Not few outputs are not known to end."""
    _ends: Floats
    """How many in each class; they are thought to end anywhere up to the request's limit."""
    _row_of: Ints
    """Of each level of prediction the row of like predictions, which come after the classes; 0: no
    prediction. Empty: none are heard."""
    _shift_of: Ints
    """Tokens by which outputs at each level are longer than its row says."""

    def horizon(self, cap: int) -> Ints:
        """The grid of instants to look at for requests of at most this limit."""
        end, most = self.longest + TAIL_TOKENS, max(1, min(LENGTH_MAX, cap))
        if self._open:
            end = max(end, most)
        return grid_to(min(end, most) if self.bounded else end)

    def chances(self, made: Ints, cap: Ints, kinds: Ints, ahead: Ints) -> Floats:
        """S(made, ahead) of each request (rows) at each instant (columns)."""
        made, cap = np.maximum(made, 0), np.maximum(cap, 1)
        reach = made[:, None] + ahead
        at, now = self._at(reach), self._at(made)
        levels, kinds = kinds // KINDS, kinds % KINDS
        rows = kinds * self._width
        going = (made + TAIL_TOKENS)[:, None]
        tail = going / (going + ahead)
        longer, base = self._whole[at] + tail * tail, self._whole[now] + 1.0
        mine, of_mine = self._classes[at + rows[:, None]], self._classes[now + rows]
        if self._stand_ins:
            longer += self._stand_ins * np.maximum(0.0, 1 - reach / cap[:, None])
            base += self._stand_ins * np.maximum(0.0, 1 - made / cap)
        if self._open:
            room = np.maximum(1, cap - self.longest)
            over = np.clip((reach - self.longest) / room[:, None], 0, 1)
            over_now = np.clip((made - self.longest) / room, 0, 1)
            ends = self._ends[:KINDS].sum()
            longer -= ends * over
            base -= ends * over_now
            mine = mine - self._ends[kinds][:, None] * over
            of_mine = of_mine - self._ends[kinds] * over_now
        chance: Floats = longer * (SHRINKAGE / base)[:, None]
        chance += mine
        chance /= (of_mine + SHRINKAGE)[:, None]
        told = self._row_of[levels] if len(self._row_of) else levels[:0]
        if told.any():
            heard = np.flatnonzero(told)
            shift, rows = self._shift_of[levels[heard]], told[heard] * self._width
            like = self._classes[self._at(reach[heard] - shift[:, None]) + rows[:, None]]
            of_like = self._classes[self._at(made[heard] - shift) + rows]
            if self._open:
                ends = self._ends[told[heard]]
                like = like - ends[:, None] * over[heard]
                of_like = of_like - ends * over_now[heard]
            heard_chance = like + TOLD_SHRINKAGE * chance[heard]
            chance[heard] = heard_chance / (of_like + TOLD_SHRINKAGE)[:, None]
        if self.bounded:
            chance[reach >= cap[:, None]] = 0.0
        return chance

    def _at(self, tokens: Ints) -> Ints:
        """Where in a row of the tables."""
        return np.clip(tokens // self._unit, 0, self._width - 1)

    def expected(self, made: Ints, cap: Ints, kinds: Ints) -> Floats:
        """Mean tokens that each one has left, the integral of its chances."""
        ahead = self.horizon(int(cap.max(initial=1)))
        chance = self.chances(made, cap, kinds, ahead)
        # Not a matrix product, whose rounding depends on the row's place.
        left: Floats = ((chance[:, 1:] + chance[:, :-1]) * (np.diff(ahead) / 2)).sum(axis=1)
        return left

    def hears(self, kind: int) -> bool:
        """Whether what was predicted for requests of this class counts."""
        return len(self._row_of) > 0 and bool(self._row_of[kind // KINDS])

    def quantiles(self, levels: Sequence[float], cap: int, kind: int) -> tuple[float, ...]:
        """Of the output of a new request of a class with this limit: with a chance of `level` it is
        no longer. Linear between the instants of the grid; beyond its end the end."""
        ahead = self.horizon(cap)
        none, most = np.zeros(1, dtype=np.int64), np.full(1, cap, dtype=np.int64)
        chance = self.chances(none, most, np.full(1, kind, dtype=np.int64), ahead)[0]
        over = 1 - np.minimum.accumulate(chance)
        return tuple(min(float(cap), float(np.interp(level, over, ahead))) for level in levels)


def survival_of(
    lengths: Ints,
    kinds: Ints | None,
    requests: int,
    open_end: int,
    *,
    bounded: bool,
    pools: Pools | None = None,
) -> Survival:
    """From equally likely output lengths and their classes by prompt; those of `open_end` are not
    known to end, and last as long as the request may. `requests`: how many finished ones they rest
    on; `pools`: outputs of like predictions."""
    open_end = min(open_end, LENGTH_MAX)
    longest = int(lengths[lengths < open_end].max(initial=0))
    unit = max(1, -(-(longest + 1) // RESOLUTION))
    width = longest // unit + 2
    stand_ins = STAND_INS * max(0.0, 1 - requests / STAND_INS_END)
    open_count = int(np.count_nonzero(lengths >= open_end))
    rows = kinds if kinds is not None else np.zeros(len(lengths), dtype=np.int64)
    table = np.zeros((KINDS + (len(pools.outputs) if pools else 0), width + 1), dtype=np.int32)
    # What does not end is longer than the last step, which nothing known reaches.
    steps = np.where(lengths < open_end, lengths // unit, width)
    np.add.at(table, (rows, np.minimum(steps, width)), 1)
    for row, outputs in enumerate(pools.outputs if pools else (), KINDS):
        known = np.minimum(outputs, longest) // unit
        np.add.at(table[row], np.where(outputs < open_end, known, width), 1)
    longer = np.cumsum(table, axis=1, dtype=np.int32)
    np.subtract(longer[:, -1:].copy(), longer, out=longer)
    longer = longer[:, :width]
    return Survival(
        longest=longest,
        bounded=bounded,
        _unit=unit,
        _whole=longer[:KINDS].sum(axis=0).astype(np.float64),
        _classes=(longer if kinds is not None else 0 * longer).ravel(),
        _width=width,
        _stand_ins=stand_ins,
        _open=stand_ins > 0 or open_count > OPEN_SHARE * len(lengths),
        _ends=table[:, width].astype(np.float64),
        _row_of=_row_of(pools),
        _shift_of=pools.shift_of if pools else _row_of(None),
    )


def _row_of(pools: Pools | None) -> Ints:
    """The rows of levels of prediction in the table of classes."""
    if pools is None:
        return np.empty(0, dtype=np.int64)
    return np.where(pools.row_of < 0, 0, KINDS + pools.row_of)


def _ints(values: tuple[int, ...]) -> Ints:
    return np.array(values, dtype=np.int64)
