"""Seconds between the tokens of a request, by how many run beside it, as reports tell.

Theory of operation. A mean for each octave of company: what a burst taught stays with the crowd,
and what one alone takes is not forgotten meanwhile. Between two that are known, and outside along
the line through the nearest two, the time is linear in the company (a step's cost is: one pass over
the weights, and so much for each sequence [F: the fitted profiles]). For predictions only.
"""

import math
from dataclasses import dataclass, field

SHARE = 0.05
"""Of a new sample in the mean of its octave: about the last twenty count."""
MEMORY_S = 5.0
"""An octave of which nothing was heard for so long forgets but 1/e of what it knew with the next
sample: what was learnt in a bad hour is unlearnt by the first few that come."""
AT_ONCE = 0.5
"""But no more than that: one stall is no more than a stall."""


@dataclass(slots=True)
class _Known:
    """Means over the samples of an octave, of times the geometric one: the first sample of a cold
    engine may be a hundred times too long."""

    running: float = 0.0
    log_token_s: float = 0.0
    count: int = 0
    at: float = 0.0

    @property
    def token_s(self) -> float:
        return math.exp(self.log_token_s)

    def saw(self, running: float, token_s: float, now: float) -> None:
        self.count += 1
        paused = 1 - math.exp(min(0.0, self.at - now) / MEMORY_S)
        share = max(SHARE, 1 / self.count, min(AT_ONCE, paused))
        self.running += share * (running - self.running)
        self.log_token_s += share * (math.log(token_s) - self.log_token_s)
        self.at = now


@dataclass(slots=True)
class TokenTimes:
    """Bounded: an octave for each doubling of what a worker runs at once."""

    _octaves: dict[int, _Known] = field(default_factory=dict)

    def saw(self, lease_seconds: float, tokens: int, seconds: float, now: float) -> None:
        """A request made so many tokens in so long; of all that ran there meanwhile, itself among
        them, the seconds sum up to that."""
        if tokens <= 0 or seconds <= 0:
            return
        running = max(1.0, lease_seconds / seconds)
        known = self._octaves.setdefault(round(math.log2(running)), _Known())
        known.saw(running, seconds / tokens, now)

    def expected_s(self, running: float) -> float | None:
        """Seconds a token among so many, itself among them; None before the first report."""
        running = max(1.0, running)
        known = sorted(self._octaves.values(), key=lambda one: abs(one.running - running))
        if not known:
            return None
        near = known[0]
        other = _partner(known, running)
        if other is None:
            return near.token_s
        slope = (other.token_s - near.token_s) / (other.running - near.running)
        between = (near.running - running) * (other.running - running) <= 0
        if not between:  # never falling with company, and never below a line through the origin
            slope = min(max(0.0, slope), near.token_s / near.running)
        return near.token_s + slope * (running - near.running)


def _partner(known: list[_Known], running: float) -> _Known | None:
    """The nearest on the other side, else the second nearest."""
    near, rest = known[0], known[1:]
    beyond = [one for one in rest if (one.running - running) * (near.running - running) <= 0]
    return next(iter(beyond or rest), None)
