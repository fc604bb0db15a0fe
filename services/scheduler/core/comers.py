"""Comers: the requests that came lately, as a rehearsal draws them (rehearsal.py)."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from services.scheduler.core.policies.ranks import Turn

KEPT = 300
"""On the Azure conversations 100 were worse and 600 no better [T]."""
AT_ONCE, PER_S = 10.0, 5.0
"""Rehearsals: a busy mesh spends 4 % of a core on them."""
ENOUGH = 32
"""With fewer nothing is said."""


class Comer(NamedTuple):
    """One that came lately, taken in or not."""

    turn: Turn
    """Its place in the order, counted from its coming."""
    tokens: int
    within_s: float
    """It is refused if its start is predicted later than that; infinite: it names no deadline."""


@dataclass(slots=True)
class Allowance:
    """So many at once, and so many a second in the long run: rehearsals cost milliseconds."""

    left: float = AT_ONCE
    at: float = 0.0

    def has(self, now: float) -> bool:
        """Whether one more may be made now."""
        self.left = min(AT_ONCE, self.left + PER_S * max(0.0, now - self.at))
        self.at = max(self.at, now)
        return self.left >= 1

    def take(self) -> None:
        """It is."""
        self.left -= 1


@dataclass(slots=True)
class Comers:
    """Of the last few hundred. Nobody is written down before the first deadline is named, as
    nobody asks before that."""

    wanted: bool = False
    rehearsals: Allowance = field(default_factory=Allowance)
    _latest: deque[tuple[float, Comer]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def came(self, comer: Comer, now: float) -> None:
        """One more."""
        self._latest.append((now, comer))

    def latest(self, late: float) -> list[Comer]:
        """Those known; a start may come `late` times as late as predicted. Empty: too few."""
        if len(self._latest) < ENOUGH:
            return []
        return [comer._replace(within_s=comer.within_s / late) for _, comer in self._latest]

    def per_s(self, now: float) -> float:
        """How many came in a second."""
        if not self._latest:
            return 0.0
        return len(self._latest) / max(1e-3, now - self._latest[0][0])
