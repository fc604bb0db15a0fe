"""Rates: how often something happens lately, and how fast leases go."""

import math
from dataclasses import dataclass, field

MEMORY_S = 30.0
"""After so long an event counts for 1/e."""


@dataclass(slots=True)
class Rate:
    """Events per second, exponentially forgotten."""

    count: float = 0.0
    since: float = 0.0
    """Seconds of observation, forgotten in the same way."""
    at: float | None = None

    def add(self, now: float, events: float = 1.0) -> None:
        """They happened now."""
        self._pass(now)
        self.count += events

    def per_s(self, now: float) -> float:
        """Events per second; 0 before anything was seen."""
        self._pass(now)
        return self.count / self.since if self.since > 0 else 0.0

    def _pass(self, now: float) -> None:
        passed = 0.0 if self.at is None else max(0.0, now - self.at)
        kept = math.exp(-passed / MEMORY_S)
        self.count *= kept
        self.since = self.since * kept + MEMORY_S * (1.0 - kept)
        self.at = now


PACE_SHARE = 0.05
"""Of a new sample in a pace: about the last twenty count."""


@dataclass(slots=True)
class Pace:
    """Seconds that leases take, as the reports of workers tell; for order and predictions only."""

    token_s: float = 0.03
    """Between two output tokens of a running request; before the first sample that of a mid-sized
    model on a GPU [T]."""
    prefill_token_s: float = 1e-4
    """Per token of input, decodes beside it included [T]."""
    finishes: Rate = field(default_factory=Rate)

    def prefill_s(self, input_tokens: int) -> float:
        """Seconds for a prefill alone in its queue."""
        return input_tokens * self.prefill_token_s

    def saw_tokens(self, tokens: int, seconds: float) -> None:
        """A running request made so many tokens in so long."""
        if tokens > 0 and seconds > 0:
            self.token_s += PACE_SHARE * (seconds / tokens - self.token_s)

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """So much queued prefill was done in so long."""
        if tokens > 0 and seconds > 0:
            self.prefill_token_s += PACE_SHARE * (seconds / tokens - self.prefill_token_s)
