"""Series: what went on inside the workers over time, sampled for pictures."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SpanKind = Literal["prefill", "decode", "mixed", "closed"]


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a worker worked without a break on one kind of thing."""

    worker: int
    start_s: float
    end_s: float
    kind: SpanKind
    """`closed`: a padded batch; else what the iterations computed."""
    requests: int
    """The most that ran together."""


@dataclass(frozen=True, slots=True)
class Series:
    """Samples at `times_s` (T, seconds from the start) of each of W workers.

    Arrays are (W, T) unless said otherwise; NaN: unknown or dead.
    """

    times_s: Floats
    workers: tuple[str, ...]
    kv_total: Floats
    """(W,): capacity in tokens."""
    kv_used: Floats
    """Tokens that lay in the worker's KV cache, by its own truth."""
    kv_predicted: Floats
    """Tokens at the peak that the scheduler foresaw for the requests it had placed there."""
    running: Floats
    """Requests in the worker's running batch."""
    waiting: Floats
    """Requests bound to the worker that do not run."""
    waiting_centre: Floats
    """(T,): requests that wait in the centre, bound to no worker."""
    spans: tuple[Span, ...] = ()
    """Worker timelines, at most SPANS_MAX; long ones are merged by the maker."""
