"""Rates: how fast leases go, and how fast what waits is taken."""

import math
from dataclasses import dataclass, field

import numpy as np

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

    def prefill_s(self, input_tokens: int) -> float:
        """Seconds for a prefill alone in its queue."""
        return input_tokens * self.prefill_token_s

    @property
    def return_tokens(self) -> float:
        """Output tokens that a running request makes while one of input is prefilled."""
        return self.prefill_token_s / max(1e-9, self.token_s)

    def saw_tokens(self, tokens: int, seconds: float) -> None:
        """A running request made so many tokens in so long."""
        if tokens > 0 and seconds > 0:
            self.token_s += PACE_SHARE * (seconds / tokens - self.token_s)

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """So much queued prefill was done in so long."""
        if tokens > 0 and seconds > 0:
            self.prefill_token_s += PACE_SHARE * (seconds / tokens - self.prefill_token_s)


FIRSTS_SHARE = 0.01
"""Of a new sample in what first tokens take: about the last hundred count."""
FIRSTS_GUESS = (0.03, 0.1, 0.03, 0.0)
"""Seconds; seconds for a thousand tokens of own input, and of input queued before it, and for a
hundred requests beside it [T]."""
FIRSTS_DOUBT = 1.0
"""What the guess weighs, for good, beside 1 / seconds of each sample: while all requests are alike
it tells one coefficient from another."""
FIRSTS_AT_LEAST_S = 0.05
"""Errors count relative to the time it took, but to no less."""


@dataclass(slots=True)
class FirstTokens:
    """Seconds from the placing of a request to its first token: a plane through what reports tell,
    over its own input, the prefill that was queued before it, and how many requests were there:
    of short prompts that come at once each is delayed by those before it, whatever they hold. For
    predictions only."""

    _moments: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]" = field(
        default_factory=lambda: np.zeros((4, 5))
    )
    """Weighted sums of products of (1, own, before, beside) with themselves and the seconds."""
    _known: tuple[float, float, float, float] = FIRSTS_GUESS

    def saw(self, own_tokens: int, before_tokens: int, beside: int, seconds: float) -> None:
        """One took so long."""
        if own_tokens <= 0 or seconds <= 0:
            return
        before = max(0, before_tokens) / 1000
        row = np.array((1.0, own_tokens / 1000, before, beside / 100, seconds))
        self._moments *= 1.0 - FIRSTS_SHARE
        self._moments += np.outer(row[:4], row) / max(seconds, FIRSTS_AT_LEAST_S)
        left = self._moments[:, :4] + FIRSTS_DOUBT * np.eye(4)
        right = self._moments[:, 4] + FIRSTS_DOUBT * np.array(FIRSTS_GUESS)
        fixed, own, queued, company = np.maximum(0.0, np.linalg.solve(left, right)).tolist()
        self._known = fixed, own, queued, company

    def after_s(self, own_tokens: int, before_tokens: float, beside: float) -> float:
        """From its placing to its first token."""
        fixed, own, before, company = self._known
        return fixed + (own * own_tokens + before * before_tokens) / 1000 + company * beside / 100

    @property
    def token_s(self) -> float:
        """Each token of input."""
        return self._known[1] / 1000


CROWDING_SHARE = 0.002
"""Of a new sample in the line of pace over company: about the last 500 count."""
CROWDING_DOUBT = 4.0
"""Requests squared: while batches differ less than by two requests, nothing is said."""


@dataclass(slots=True)
class Crowding:
    """What each running request adds to the time of every token beside it: the slope of a line
    through what reports tell, pulled to 0 while all batches are alike."""

    seen: int = 0
    running: float = 0.0
    token_s: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    def saw(self, lease_seconds: float, tokens: int, seconds: float) -> None:
        """A request made so many tokens in so long; of all that ran there meanwhile, itself among
        them, the seconds sum up to that."""
        if tokens <= 0 or seconds <= 0:
            return
        running = lease_seconds / seconds
        self.seen += 1
        share = max(CROWDING_SHARE, 1 / self.seen)
        off, slow = running - self.running, seconds / tokens - self.token_s
        self.running += share * off
        self.token_s += share * slow
        self.variance += share * ((1 - share) * off * off - self.variance)
        self.covariance += share * ((1 - share) * off * slow - self.covariance)

    @property
    def request_s(self) -> float:
        """Seconds a token for each request; never negative."""
        return max(0.0, self.covariance / (self.variance + CROWDING_DOUBT))

    def sooner(self, here: int, there: int) -> float:
        """The share of a token's time that is saved among `there` requests instead of `here`."""
        here_s = self.token_s + self.request_s * (here - self.running)
        return self.request_s * (here - there) / max(here_s, 1e-9)


BUSY_MEMORY_S = 15.0
"""Of a busy rate: seconds of waiting after which an event counts for 1/e. On the Azure
conversations 5 s were worse and 30 s no better [T]."""
BUSY_EVENTS = 20.0
"""Or longer, until so many events count: on slow workers few happen."""
BUSY_MEMORY_MAX_S = 300.0
GUESSED_S = 1.0
"""Less observation than this is filled up with a guess."""


@dataclass(slots=True)
class BusyRate:
    """Work per second of the time in which some of it waited: what can be done, not what came.
    While nothing waits it stays as it is."""

    work: float = 0.0
    events: float = 0.0
    since: float = 0.0
    """Busy seconds of observation; all three are forgotten alike."""
    at: float = 0.0
    busy: bool = False

    def turn(self, now: float, *, busy: bool) -> None:
        """From now on something waits, or nothing."""
        self._pass(now)
        self.busy = busy

    def add(self, now: float, work: float) -> None:
        """So much was done of what waited."""
        self._pass(now)
        self.work += work
        self.events += 1.0

    def per_s(self, now: float, guess: float) -> float:
        """Work per second; `guess` counts as long as there is little observation."""
        self._pass(now)
        missing_s = max(0.0, GUESSED_S - self.since)
        seconds = self.since + missing_s
        return (self.work + guess * missing_s) / seconds

    @property
    def event_work(self) -> float:
        """Mean work of what was done at once."""
        return self.work / self.events if self.events > 0 else 0.0

    def _pass(self, now: float) -> None:
        passed, self.at = max(0.0, now - self.at), max(now, self.at)
        if not self.busy or passed <= 0:
            return
        few_s = BUSY_EVENTS * self.since / max(1.0, self.events)
        memory_s = min(max(BUSY_MEMORY_S, few_s), BUSY_MEMORY_MAX_S)
        kept = math.exp(-passed / memory_s)
        self.work, self.events = self.work * kept, self.events * kept
        self.since = self.since * kept + memory_s * (1.0 - kept)
