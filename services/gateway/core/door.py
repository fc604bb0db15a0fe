"""The door of a gateway: closed when it is full, until it can be foretold to take calls again.

If a full gateway took a call for each that ends, nobody could be told when to come: the place is
gone in a moment. So a door that had to close stays closed until half of the calls have ended, or as
many as end in `CLOSED_MAX_S`; nothing joins meanwhile, and the time until then follows from the
rate at which calls lately ended.
"""

from dataclasses import dataclass
from math import exp

MEMORY_S = 15.0
"""After so long an end counts for 1/e in the rate."""
CLOSED_MAX_S = 10.0
REOPEN_SHARE = 0.5


@dataclass(slots=True)
class Door:
    """Counts choices. Time is monotonic, in seconds."""

    limit: int
    closed: bool = False
    opens_at: int = 0
    _ended: float = 0.0
    _watched_s: float = 0.0
    _at: float | None = None

    def left(self, count: int, now: float) -> None:
        """So many ended."""
        self._pass(now)
        self._ended += count

    def refuses(self, open_now: int, now: float) -> bool:
        """Whether nobody is let in."""
        if self.closed and open_now <= self.opens_at:
            self.closed = False
        if not self.closed and open_now >= self.limit:
            self.closed = True
            most = int(self._per_s(now) * CLOSED_MAX_S)
            kept = max(round(REOPEN_SHARE * self.limit), self.limit - most)
            self.opens_at = max(0, min(kept, self.limit - 1))
        return self.closed

    def opens_in_s(self, open_now: int, now: float) -> float | None:
        """How long until it lets somebody in; None: no call has ended yet."""
        rate = self._per_s(now)
        return (open_now - self.opens_at) / rate if rate > 0 else None

    def _per_s(self, now: float) -> float:
        self._pass(now)
        return self._ended / self._watched_s if self._watched_s > 0 else 0.0

    def _pass(self, now: float) -> None:
        passed = 0.0 if self._at is None else max(0.0, now - self._at)
        kept = exp(-passed / MEMORY_S)
        self._ended *= kept
        self._watched_s = self._watched_s * kept + MEMORY_S * (1.0 - kept)
        self._at = now
