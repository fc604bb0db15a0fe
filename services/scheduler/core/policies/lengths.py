"""Lengths: what recent outputs say about how long a request will be.

Theory of operation. A history of W output lengths is kept sorted. Whoever has made g tokens is
going to have one of the lengths above g; between neighbours the distribution is taken as linear,
and one more segment of equal weight leads to the request's own limit, for nobody knows what is
longer than the longest seen (Past-Future, section 1.2 of its research note). While the history is
short, constants stand in for it. A length that the token limit cut is only a lower bound: its
weight goes to the lengths above it (Kaplan and Meier, by Efron's redistribution to the right), and
what is beyond the longest full one is open-ended, which ends at each request's own limit.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.survival import (
    KINDS,
    LENGTH_MAX,
    Survival,
    kinds_of,
    survival_of,
)
from services.scheduler.core.policies.told import pools_of
from services.scheduler.core.settings import Constants
from shared.messages import LengthClass, LengthForecast
from shared.tokens import TOKEN_BYTES

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

REMEMBERED_MAX = 4096
"""Expectations kept until the history changes."""
LIKELY = tuple((number + 0.5) / 32 for number in range(32))
OPEN_END = 1 << 40
"""A length that is not known to end: above every limit."""


@dataclass(frozen=True, slots=True, eq=False)
class LengthModel:
    """A prepared history. All lengths and results are in output tokens."""

    lengths: Ints
    """Equally likely, ascending; OPEN_END for those that are not known to end."""
    requests: int
    """How many finished requests it rests on."""
    longest: int
    """The largest known length."""
    constants: Constants
    _grid: Floats
    """The lengths, and OPEN_END twice."""
    _sums: list[float]
    """Of the first k lengths."""
    _sorted: list[int]
    _survival_of: Callable[[], Survival]
    _survival: list[Survival] = field(default_factory=list)
    """Made when somebody first asks."""
    _left: dict[tuple[int, int], float] = field(default_factory=dict)
    """Of new requests, by limit and class: most that wait are new."""
    _quantiles: dict[tuple[tuple[float, ...], int, int], tuple[float, ...]] = field(
        default_factory=dict
    )
    """The same for quantiles."""

    @property
    def survival(self) -> Survival:
        """Chances to go on, by class of request."""
        if not self._survival:
            self._survival.append(self._survival_of())
        return self._survival[0]

    def left_tokens(self, made: int, cap: int, kind: int) -> float:
        """The mean of what a request of a class has left, by the survival function."""
        made, cap = min(made, LENGTH_MAX), min(cap, LENGTH_MAX)
        known = self._left.get((cap, kind)) if made <= 0 else None
        if known is None:
            made_, cap_, kind_ = (_one(value) for value in (made, cap, kind))
            known = float(self.survival.expected(made_, cap_, kind_)[0])
            if made <= 0 and len(self._left) < REMEMBERED_MAX:
                self._left[cap, kind] = known
        return known

    def quantiles(self, levels: tuple[float, ...], cap: int, kind: int) -> tuple[float, ...]:
        """Of the output of a new request of a class, by the survival function."""
        cap = min(cap, LENGTH_MAX)
        key = (levels, cap, kind)
        known = self._quantiles.get(key)
        if known is None:
            known = self.survival.quantiles(levels, cap, kind)
            if len(self._quantiles) < REMEMBERED_MAX:
                self._quantiles[key] = known
        return known

    def told(self, cap: int, kind: int) -> tuple[int, ...]:
        """What became of those for which about the same was predicted: equally likely lengths,
        ascending; empty where predictions are not heard."""
        if not self.survival.hears(kind):
            return ()
        return tuple(max(1, round(length)) for length in self.quantiles(LIKELY, cap, kind))

    # ------------------------------------------------------------------------------------ samples

    def remaining(self, made: Ints, cap: Ints, draws: Draws, lists: int) -> Ints:
        """Samples of what running requests have left, given what they made: (lists, n).

        Of m lengths above g a request gets one of the m + 1 segments of g, those lengths, limit,
        and a uniform place in it; without `lengths_interpolated` the segment's upper end.
        """
        above = np.searchsorted(self.lengths, made, side="right")
        segments = len(self.lengths) - above + 1
        places = draws.uniforms(lists * len(made)).reshape(lists, len(made)) * segments
        whole = places.astype(np.int64)
        top = np.maximum(self._bound(cap), made)
        index = whole + above
        if not self.constants.lengths_interpolated:
            # The limit is one more outcome only where nothing longer was seen.
            index = (places * ((segments - 1) / segments)).astype(np.int64) + above
            known: Ints = np.minimum(self._grid[index], top).astype(np.int64)
            return known - made
        low = np.minimum(np.where(whole == 0, made, self._grid[index - 1]), top)
        high = np.minimum(self._grid[index], top)
        drawn = np.rint(low + (high - low) * (places - whole)).astype(np.int64)
        left: Ints = drawn - made
        return left

    def candidate(self, made: int, cap: int, draws: Draws, lists: int) -> Ints:
        """Samples of what a waiting request has left: (lists,). A new one gets any length of the
        history; a re-queued one a length above what it made, unless `requeued_conditioned` is off:
        then, as in the artifact's simulator, a whole new length on top."""
        if made > 0 and self.constants.requeued_conditioned:
            return self.remaining(_one(made), _one(cap), draws, lists)[:, 0]
        top = max(0, cap if self.constants.lengths_within_cap else max(cap, self.longest))
        # Of an empty history, or where a product rounds up, this is the grid's open end.
        index = (draws.uniforms(lists) * len(self.lengths)).astype(np.int64)
        return np.minimum(self._grid[index], top).astype(np.int64)

    # --------------------------------------------------------------------------------- expectations

    def expected_output(self, cap: int) -> float:
        """The mean output of a new request with this limit."""
        return self.expected_remaining(0, cap)

    def expected_remaining(self, made: int, cap: int) -> float:
        """The mean of what a request has left, after the same rule as the samples."""
        top = max(made, cap if self.constants.lengths_within_cap else max(cap, self.longest))
        count = len(self._sorted)
        above, beyond = bisect_right(self._sorted, made), bisect_right(self._sorted, top)
        longer = count - above
        total = self._sums[beyond] - self._sums[above] + float(count - beyond) * top
        if made <= 0 and count:
            return (self._sums[beyond] + float(count - beyond) * top) / count
        # Segment by segment the middle: every point counts fully, the two ends by half.
        return (total + (made + top) / 2) / (longer + 1) - made

    def expected_remaining_all(self, made: Ints, cap: Ints) -> Floats:
        """`expected_remaining` for arrays."""
        top = np.maximum(self._bound(cap), made)
        count = len(self.lengths)
        sums = np.asarray(self._sums)
        above = np.searchsorted(self.lengths, made, side="right")
        beyond = np.searchsorted(self.lengths, top, side="right")
        total = sums[beyond] - sums[above] + (count - beyond) * top
        running: Floats = (total + (made + top) / 2) / (count - above + 1) - made
        if not count:
            return running
        return np.where(made <= 0, (sums[beyond] + (count - beyond) * top) / count, running)

    def _bound(self, cap: Ints) -> Ints:
        """The longest output thought possible."""
        return cap if self.constants.lengths_within_cap else np.maximum(cap, self.longest)


class Histories:
    """Prepared histories of the latest forecast, one per model asked for."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._forecast: LengthForecast | None = None
        self._models: dict[str, LengthModel] = {}
        self._unknown = prepare(None, constants)

    def of(self, forecast: LengthForecast | None, model: str) -> LengthModel:
        """The model's history; the cold start's if the estimator has none, or has not spoken."""
        if forecast is not self._forecast:
            self._forecast = forecast
            self._models.clear()
        if model not in self._models:
            classes = forecast.classes if forecast is not None else ()
            known = next((known for known in classes if known.model == model), None)
            if known is None:
                return self._unknown  # not kept: anybody may ask for any name
            self._models[model] = prepare(known, self._constants)
        return self._models[model]


def prepare(history: LengthClass | None, constants: Constants) -> LengthModel:
    """The model of a class as the estimator sent it. None: nothing is known yet."""
    if history is None:
        return prepare_lengths(np.empty(0, dtype=np.int64), None, constants)
    whole = len(history.lengths) // TOKEN_BYTES * TOKEN_BYTES
    lengths = np.frombuffer(history.lengths[:whole], dtype="<u4").astype(np.int64)
    censored = np.frombuffer(history.censored, dtype=np.uint8) != 0
    known = len(censored) == len(lengths)
    kinds = _kinds(history, len(lengths))
    return prepare_lengths(lengths, censored if known else None, constants, kinds)


def _kinds(history: LengthClass, count: int) -> Ints | None:
    """The class of each finished request; None where it is not told."""
    if len(history.prompts) != count * TOKEN_BYTES or not count:
        return None
    prompts = np.frombuffer(history.prompts, dtype="<u4").astype(np.int64)
    told = len(history.predicted) == len(history.prompts)
    predicted = np.frombuffer(history.predicted, dtype="<u4").astype(np.int64) if told else None
    return kinds_of(prompts, predicted)


def prepare_lengths(
    lengths: Ints,
    censored: NDArray[np.bool_] | None,
    constants: Constants,
    kinds: Ints | None = None,
) -> LengthModel:
    """The model of output lengths, oldest first, of which `censored` ones are lower bounds; `kinds`
    are the classes of the requests (survival.py)."""
    window = max(1, constants.history_window)
    recent = lengths[-window:]
    cut = censored[-window:] if censored is not None and constants.censored_open else None
    ordered = _seen(recent, cut)

    def survival() -> Survival:
        return _survival(recent, cut, kinds[-window:] if kinds is not None else None, constants)

    ends = min(window, constants.cold_start_ends or window)
    stand_ins = min(int(window * constants.cold_start_share), ends - len(recent))
    if stand_ins > 0:
        value = constants.cold_start_tokens or OPEN_END
        ordered = np.sort(np.concatenate((ordered, np.full(stand_ins, value, dtype=np.int64))))
    known = int(np.searchsorted(ordered, OPEN_END))
    return LengthModel(
        lengths=ordered,
        requests=len(recent),
        longest=int(ordered[known - 1]) if known else 0,
        constants=constants,
        _grid=np.concatenate((ordered, (OPEN_END, OPEN_END))).astype(np.float64),
        _sums=[0.0, *np.cumsum(ordered, dtype=np.float64).tolist()],
        _sorted=ordered.tolist(),
        _survival_of=survival,
    )


def _survival(
    lengths: Ints, censored: NDArray[np.bool_] | None, kinds: Ints | None, constants: Constants
) -> Survival:
    """With the weight of cut outputs on the longer ones, in each class by itself."""
    requests = len(lengths)
    bounded = constants.lengths_within_cap
    if censored is not None and not censored.any():
        censored = None
    if kinds is None:
        seen = lengths if censored is None else redistributed(lengths, censored)
        return survival_of(seen, None, requests, OPEN_END, bounded=bounded)
    prompts, levels = kinds % KINDS, kinds // KINDS
    pools = pools_of(lengths, censored, prompts, levels, _seen)
    if censored is None:
        return survival_of(lengths, prompts, requests, OPEN_END, bounded=bounded, pools=pools)
    parts = [(kind, prompts == kind) for kind in np.unique(prompts).tolist()]
    seen = np.concatenate([_seen(lengths[mine], censored[mine]) for _, mine in parts])
    sorts = np.repeat([kind for kind, _ in parts], [np.count_nonzero(mine) for _, mine in parts])
    return survival_of(seen, sorts, requests, OPEN_END, bounded=bounded, pools=pools)


def _seen(lengths: Ints, censored: NDArray[np.bool_] | None) -> Ints:
    """In ascending order, the weight of cut ones on those above them."""
    if censored is not None and censored.any():
        return redistributed(lengths, censored)
    return np.sort(lengths)


def redistributed(lengths: Ints, censored: NDArray[np.bool_]) -> Ints:
    """As many equally likely lengths as there were, after Kaplan and Meier: the quantiles
    (i + 1/2) / n of the estimate; OPEN_END where it does not come down so far."""
    count = len(lengths)
    order = np.lexsort((censored, lengths))  # of equal ones the full ones first
    ordered, cut = lengths[order], censored[order]
    at_risk = np.arange(count, 0, -1)
    survival = np.cumprod(np.where(cut, 1.0, (at_risk - 1) / at_risk))
    # Survival after k entries is below 1 - q from quantile q on; rounding must not lose one.
    index = np.searchsorted(1.0 - survival, (np.arange(count) + 0.5) / count, side="left")
    return np.append(ordered, OPEN_END)[index]


def _one(value: int) -> Ints:
    return np.array((value,), dtype=np.int64)
