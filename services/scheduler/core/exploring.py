"""Exploring: now and then one is let in that would be refused since outputs are thought too long.

What is known of lengths comes from those who were let in. Where long outputs keep everybody out who
names an end, short ones would never be seen, however many ask. So while nothing waits one of them
is let in from time to time: sooner each time after one that kept its deadline, later after one that
did not, so that where the refusals are right few are lost to it.
"""

from dataclasses import dataclass
from math import inf

FIRST_S, LEAST_S, MOST_S = 10.0, 0.5, 60.0
"""Between two of them: at first, and bounds [T]."""
FACTOR = 2.0
REFUSED_LEAST = 4
"""So many are refused between two, unless it goes well: where few ask, few are let in."""


@dataclass(slots=True)
class Explorer:
    """At most one is under way."""

    every_s: float = FIRST_S
    request_id: str = ""
    """Who was let in last and has not ended."""
    _at: float = inf
    """When that was; before that, when the first one was refused."""
    _refused: int = 0
    """Since then."""

    def may(self, now: float) -> bool:
        """One is about to be refused: whether it is time to let one in."""
        self._at = min(self._at, now)
        self._refused += 1
        if self.every_s >= FIRST_S and self._refused <= REFUSED_LEAST:
            return False
        return now >= self._at + (MOST_S if self.request_id else self.every_s)

    def takes(self, request_id: str, now: float) -> None:
        """This one is let in."""
        self.request_id, self._at, self._refused = request_id, now, 0

    def ended(self, request_id: str, *, kept: bool) -> None:
        """A request ended; if it was let in for this: whether it kept its deadline."""
        if request_id != self.request_id:
            return
        self.request_id = ""
        every_s = self.every_s / FACTOR if kept else self.every_s * FACTOR
        self.every_s = min(max(every_s, LEAST_S), MOST_S)
