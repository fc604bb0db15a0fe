"""Promises: what was predicted for each accepted request, against what came.

The errors go out as metrics. How often something came later than was said also sets the margins
with which deadlines are judged: each is steered so that only one in twenty is later than so many
times its prediction, on any workload. Starts after a wait have one; starts at once another, which
counts on what others add only: what a request takes alone is known. The time of tokens has a third:
how far it was from what was known of it beside as many as really ran.
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
"""In the logarithm of the margin, when one was later; when it was not, a 19th of that."""
LATE_FIRST = 1.25
LATE_MAX = 4.0
TOKEN_LEAST = 1.1
"""The margin on the time of tokens: their way to the client is in no report."""
OTHERS_LEAST = 1.2
"""Times what it takes alone: who was told less was told of nobody."""
WAITED_S = 0.3
"""Who is told to start sooner begins at once, or nearly."""


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
    heard_at: float = 0.0
    """When a request last began, ended, or was let in to find out."""
    _log_waiting: float = log(LATE_FIRST)
    _log_at_once: float = log(LATE_FIRST)
    _log_token: float = log(LATE_FIRST)

    @property
    def late(self) -> float:
        """Multiply a predicted start after a wait by this to be safe."""
        return exp(self._log_waiting)

    def safe_s(self, start_s: float, alone_s: float = 0.0) -> float:
        """A predicted start, with its margin; `alone_s`: as if nothing else were there."""
        waiting_s = max(WAITED_S, start_s) * self.late
        if start_s >= WAITED_S:
            return waiting_s
        others_s = max(0.0, start_s - alone_s) * exp(self._log_at_once)
        return min(min(alone_s, start_s) + others_s, waiting_s)

    def safe_token_s(self, token_s: float) -> float:
        """The time of a token, with its margin."""
        return token_s * exp(self._log_token)

    def made(self, request: Request, start_s: float, finish_s: float, alone_s: float = 0.0) -> None:
        """It was accepted, and this was said."""
        request.predicted_start_s, request.predicted_finish_s = start_s, finish_s
        request.predicted_alone_s = alone_s

    def began(self, request: Request, now: float) -> None:
        """Its very first token is here."""
        self.heard_at = now
        predicted_s, actual_s = request.predicted_start_s, now - request.arrived_at
        if predicted_s <= 0 or actual_s <= 0:
            return
        self._note("start", predicted_s, actual_s)
        alone_s = request.predicted_alone_s
        later = actual_s > self.safe_s(predicted_s, alone_s)
        if predicted_s >= WAITED_S:
            self._log_waiting = _steered(self._log_waiting, later=later)
        elif predicted_s >= OTHERS_LEAST * alone_s:
            self._log_at_once = _steered(self._log_at_once, later=later)

    def timed(self, told_s: float | None, token_s: float) -> None:
        """A token took so long; what was known of it, if anything."""
        if told_s is not None:
            later = token_s > self.safe_token_s(told_s)
            self._log_token = max(log(TOKEN_LEAST), _steered(self._log_token, later=later))

    def ended(self, request: Request, now: float) -> None:
        """It is complete."""
        self.heard_at = now
        predicted_s, actual_s = request.predicted_finish_s, now - request.arrived_at
        if predicted_s > 0 and actual_s > 0:
            self._note("finish", predicted_s, actual_s)

    def _note(self, kind: Literal["start", "finish"], predicted_s: float, actual_s: float) -> None:
        self.compared += 1
        self.misses.append(Miss(kind, abs(predicted_s - actual_s) / actual_s))


def _steered(margin: float, *, later: bool) -> float:
    """The logarithm of a margin after one more."""
    step = LATE_STEP if later else -LATE_STEP * LATE_SHARE / (1 - LATE_SHARE)
    return min(max(0.0, margin + step), log(LATE_MAX))
