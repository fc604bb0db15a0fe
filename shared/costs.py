"""Serving time: how long a slice takes, as a bilinear function fitted to measured slices.

Following SCLS's fitted latency model (as quoted by a third party), with N sequences, longest
input L and context length l:

    prefill(N, L)     = a N L + b N + c L + d          seconds, makes the first token
    decode_step(N, l) = a N l + b N + c l + d          seconds, makes one more token each

A slice of S iterations is one prefill and K = S - 1 decode steps with contexts L+1 .. L+K; a sum
of bilinear functions is bilinear, so a slice's time is known without summing. (Whether the first
token counts as prefill or as a step is our choice; workers' timings use the same.)

The fit is linear in its coefficients. They must not be negative, or time could fall with length:
the batcher's proof needs a cost that rises in both. Errors are relative, since a slice of 20 ms
matters to its requests as much as one of 2 s.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from shared.messages import SliceTimings

BUCKET_SAMPLES = 8
"""Newest slices kept per (N, L) bucket. Buckets keep rare shapes in the window: a plain window
would forget long prompts after a minute of short ones."""
BUCKETS_MAX = 256
"""More than the powers of two of N and L can make; a bound against nonsense from a worker."""
ANCHOR_WEIGHT = 0.03
"""Of the prior's rows beside a measured row: they decide only what no sample says."""
ANCHORS = ((1, 32), (1, 1024), (16, 32), (16, 1024))
"""(N, L) at which the prior is asked."""
COUNT_MAX = 1 << 24
SECONDS_MIN, SECONDS_MAX = 1e-6, 1e5
"""Timings outside are a broken worker's; inside, the fit's arithmetic is safe."""
REFIT_ALWAYS = 32
"""Refit after each of the first samples, then after every eighth: a fit costs about 0.2 ms."""
REFIT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Bilinear:
    """a N L + b N + c L + d, in seconds."""

    per_row_token: float
    per_row: float
    per_token: float
    fixed: float

    def at(self, batch_size: int, tokens: int) -> float:
        """Seconds for N = batch_size and L (or l) = tokens."""
        return (
            self.per_row_token * batch_size * tokens
            + self.per_row * batch_size
            + self.per_token * tokens
            + self.fixed
        )


@dataclass(frozen=True, slots=True)
class SliceCost:
    """The eight coefficients of one model on one kind of worker."""

    prefill: Bilinear
    decode: Bilinear
    """One iteration over N sequences of context length l."""

    def slice(self, iterations: int) -> Bilinear:
        """The time of a whole slice as a function of (N, L). `iterations` counts the token that
        prefill makes; below 1 is taken as 1."""
        steps = max(1, iterations) - 1
        ramp = steps * (steps + 1) / 2
        prefill, decode = self.prefill, self.decode
        return Bilinear(
            per_row_token=prefill.per_row_token + steps * decode.per_row_token,
            per_row=prefill.per_row + steps * decode.per_row + ramp * decode.per_row_token,
            per_token=prefill.per_token + steps * decode.per_token,
            fixed=prefill.fixed + steps * decode.fixed + ramp * decode.per_token,
        )

    def slice_s(self, batch_size: int, input_tokens_max: int, iterations: int) -> float:
        """Seconds for a closed slice."""
        return self.slice(iterations).at(batch_size, input_tokens_max)


PRIOR = SliceCost(
    prefill=Bilinear(per_row_token=2e-5, per_row=1e-4, per_token=0.0, fixed=5e-3),
    decode=Bilinear(per_row_token=5e-8, per_row=2e-4, per_token=0.0, fixed=4e-3),
)
"""Before the first sample: the order of magnitude of a small model on a few CPU cores, or of a
7B model on a GPU. Only its shape outlives the first sample."""


def joining_saves(cost: Bilinear, rows: int, tokens: int, tokens_longer: int) -> bool:
    """True if a batch of `rows` with inputs up to `tokens` costs less inside a batch of longer
    inputs than alone: padding a N (L2 - L1) against the saved c L1 + d (our derivation)."""
    padding = cost.per_row_token * rows * (tokens_longer - tokens)
    return padding < cost.per_token * tokens + cost.fixed


@dataclass(slots=True)
class CostFit:
    """The current `SliceCost`, refitted as slices are measured. Equal samples in equal order give
    equal coefficients."""

    prior: SliceCost = PRIOR
    cost: SliceCost = PRIOR
    samples: int = 0
    _buckets: dict[tuple[int, int], deque[SliceTimings]] = field(default_factory=dict)

    @property
    def window(self) -> list[SliceTimings]:
        """The slices that the fit looks at."""
        return [timings for bucket in self._buckets.values() for timings in bucket]

    def observe(self, timings: SliceTimings) -> None:
        """Take in one slice. Timings that cannot be true are ignored."""
        if not _plausible(timings):
            return
        key = (timings.batch_size.bit_length(), timings.input_tokens_max.bit_length())
        if key not in self._buckets and len(self._buckets) >= BUCKETS_MAX:
            return
        self._buckets.setdefault(key, deque(maxlen=BUCKET_SAMPLES)).append(timings)
        self.samples += 1
        if self.samples <= REFIT_ALWAYS or self.samples % REFIT_EVERY == 0:
            self._refit()

    def _refit(self) -> None:
        window = self.window
        prefill = [(_prefill_row(t), t.prefill_s) for t in window if t.prefill_s > 0]
        stepped = (t for t in window if t.iterations > 1 and t.decode_s > 0)
        decode = [(_decode_row(t), t.decode_s) for t in stepped]
        try:
            self.cost = SliceCost(
                prefill=_fit(prefill, self.prior.prefill), decode=_fit(decode, self.prior.decode)
            )
        except RuntimeError:
            return  # the solver gave up; what was known is still the best guess


Row = tuple[float, float, float, float]


def _plausible(timings: SliceTimings) -> bool:
    counts = (timings.batch_size, timings.input_tokens_max, timings.iterations)
    seconds = (timings.prefill_s, timings.decode_s)
    return all(1 <= count <= COUNT_MAX for count in counts) and all(
        part == 0 or SECONDS_MIN <= part <= SECONDS_MAX for part in seconds
    )


def _prefill_row(timings: SliceTimings) -> Row:
    rows, tokens = timings.batch_size, timings.input_tokens_max
    return (float(rows * tokens), float(rows), float(tokens), 1.0)


def _decode_row(timings: SliceTimings) -> Row:
    steps = timings.iterations - 1
    contexts = steps * timings.input_tokens_max + steps * (steps + 1) / 2
    rows = timings.batch_size
    return (rows * contexts, float(rows * steps), contexts, float(steps))


def load_solver() -> Callable[..., tuple[Any, Any]]:
    """SciPy's non-negative least squares, loaded when first asked for: that takes up to a second,
    and nobody needs it who only runs leases. A scheduler asks before it has anything to do."""
    from scipy.optimize import nnls

    solver: Callable[..., tuple[Any, Any]] = nnls
    return solver


def _fit(samples: Sequence[tuple[Row, float]], prior: Bilinear) -> Bilinear:
    """Non-negative least squares on relative error; the prior, scaled to the samples' speed,
    holds whatever they leave open."""
    if not samples:
        return prior
    shape = (prior.per_row_token, prior.per_row, prior.per_token, prior.fixed)
    scale = median(y / sum(c * x for c, x in zip(shape, row, strict=True)) for row, y in samples)
    rows = [[x / y for x in row] for row, y in samples]
    targets = [1.0] * len(rows)
    for batch_size, tokens in ANCHORS:
        expected = scale * prior.at(batch_size, tokens)
        anchor = (float(batch_size * tokens), float(batch_size), float(tokens), 1.0)
        rows.append([ANCHOR_WEIGHT * x / expected for x in anchor])
        targets.append(ANCHOR_WEIGHT)
    nnls = load_solver()
    matrix = np.array(rows)
    norms = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    solution, _ = nnls(matrix / norms, np.array(targets))
    coefficients = [float(value) for value in solution / norms]
    return Bilinear(*coefficients)
