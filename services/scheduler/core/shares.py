"""Shares: how many requests each tenant has running, and who has more of them than chance explains.

Of m running requests a tenant whose share is p has m p on average, and sqrt(m p (1 - p)) more or
less if all ask alike. So what is above that by some deviations tells a tenant that crowds the
others out, with two tenants or a thousand, from one that happens to have more.
"""

from dataclasses import dataclass, field
from math import sqrt


@dataclass(slots=True)
class Shares:
    """Tenants with nothing running are not in it."""

    running: dict[str, int] = field(default_factory=dict)
    total: int = 0
    crowd: frozenset[str] = frozenset()
    """Who has too many, as of `looked_at` (yielding.py)."""
    looked_at: float = float("-inf")

    def took(self, tenant: str) -> None:
        """A worker has one more request of it."""
        self.running[tenant] = self.running.get(tenant, 0) + 1
        self.total += 1

    def gave_back(self, tenant: str) -> None:
        """One fewer."""
        self.total -= 1
        if self.running[tenant] > 1:
            self.running[tenant] -= 1
        else:
            del self.running[tenant]


def hoards(running: int, total: int, share: float, deviations: float) -> bool:
    """Whether so many of `total` are more than a share explains."""
    return running > total * share + deviations * sqrt(max(0.0, total * share * (1 - share)))
