"""Promises: what was predicted for each accepted request, against what came.

The errors go out as metrics. How often a first token came later than was said also sets the margin
with which deadlines are judged: `late` is steered so that only one start in twenty is later than
`late` times its prediction, on any workload.
"""

from collections import deque
from dataclasses import dataclass, field
from math import exp, log
from typing import Literal, NamedTuple

from services.scheduler.core.state import Request

KEPT = 1024
"""Errors kept until the shell has read them."""
LATE_SHARE = 0.05
LATE_STEP = 0.05
"""In the logarithm of the margin, when a start was later; when it was not, a 19th of that."""
LATE_FIRST = 1.25
LATE_MAX = 4.0
WAITED_S = 0.3
"""Starts predicted sooner say nothing of waits."""


class Miss(NamedTuple):
    """One comparison."""

    kind: Literal["start", "finish"]
    error: float
    """|predicted - actual| / actual."""


@dataclass(slots=True)
class Promises:
    """Seconds are counted from a request's arrival."""

    misses: deque[Miss] = field(default_factory=lambda: deque(maxlen=KEPT))
    compared: int = 0
    """Ever; the latest of them are in `misses`."""
    _log_late: float = log(LATE_FIRST)

    @property
    def late(self) -> float:
        """Multiply a predicted start by this to be safe."""
        return exp(self._log_late)

    def made(self, request: Request, start_s: float, finish_s: float) -> None:
        """It was accepted, and this was said."""
        request.predicted_start_s, request.predicted_finish_s = start_s, finish_s

    def began(self, request: Request, now: float) -> None:
        """Its very first token is here."""
        predicted_s, actual_s = request.predicted_start_s, now - request.arrived_at
        if predicted_s <= 0 or actual_s <= 0:
            return
        self._note("start", predicted_s, actual_s)
        if predicted_s >= WAITED_S:
            later = actual_s > predicted_s * self.late
            step = LATE_STEP if later else -LATE_STEP * LATE_SHARE / (1 - LATE_SHARE)
            self._log_late = min(max(0.0, self._log_late + step), log(LATE_MAX))

    def ended(self, request: Request, now: float) -> None:
        """It is complete."""
        predicted_s, actual_s = request.predicted_finish_s, now - request.arrived_at
        if predicted_s > 0 and actual_s > 0:
            self._note("finish", predicted_s, actual_s)

    def _note(self, kind: Literal["start", "finish"], predicted_s: float, actual_s: float) -> None:
        self.compared += 1
        self.misses.append(Miss(kind, abs(predicted_s - actual_s) / actual_s))
