"""Shares: how many requests each tenant has running, and who has more of them than chance explains.

Of m running requests a tenant whose share is p has m p on average, and sqrt(m p (1 - p)) more or
less if all ask alike. So what is above that by some deviations tells a tenant that crowds the
others out, with two tenants or a thousand, from one that happens to have more.
"""

from dataclasses import dataclass, field
from math import sqrt

from services.scheduler.core.state import HELD, Request


@dataclass(slots=True)
class Shares:
    """Tenants with nothing running are not in it."""

    running: dict[str, int] = field(default_factory=dict)
    total: int = 0
    crowd: frozenset[str] = frozenset()
    """Who has too many, as of `looked_at` (yielding.py)."""
    looked_at: float = float("-inf")
    most: dict[str, int] = field(default_factory=dict)
    """The most that each has had running at one time since it waits, or began to run."""
    leased: dict[str, int] = field(default_factory=dict)
    """Output tokens that its leases cover, and that are not reported yet."""
    lease_max: int = 0
    """The most of those that one request has had,"""
    prompt_max: int = 0
    """and the largest prompt placed: what bounds leads (leads.py)."""
    resting: dict[str, dict[str, Request]] = field(default_factory=dict)
    """Tenant and request id to who had to stop, since its tenant is too far ahead."""
    resting_at: float = float("-inf")
    """When they are looked at next."""

    def took(self, tenant: str) -> None:
        """A worker has one more request of it."""
        self.running[tenant] = running = self.running.get(tenant, 0) + 1
        self.most[tenant] = max(running, self.most.get(tenant, 0))
        self.total += 1

    def count(self, request: Request) -> None:
        """What its lease covers has changed, or was made."""
        held = request.state in HELD
        tokens = max(0, request.until - request.output_tokens) if held else 0
        change, tenant = tokens - request.leased_tokens, request.spec.tenant
        request.leased_tokens = tokens
        self.lease_max = max(self.lease_max, tokens)
        leased = self.leased.get(tenant, 0) + change
        if leased:
            self.leased[tenant] = leased
        else:
            self.leased.pop(tenant, None)

    def rests(self, request: Request) -> None:
        """Its next lease has to wait for others."""
        self.resting.setdefault(request.spec.tenant, {})[request.request_id] = request

    def is_resting(self, request: Request) -> bool:
        return request.request_id in self.resting.get(request.spec.tenant, ())

    def goes_on(self, request: Request) -> None:
        """It does not rest, or not any more."""
        resting = self.resting.get(request.spec.tenant)
        if resting is None:
            return
        resting.pop(request.request_id, None)
        if not resting:
            del self.resting[request.spec.tenant]

    def gave_back(self, tenant: str) -> None:
        """One fewer."""
        self.total -= 1
        if self.running[tenant] > 1:
            self.running[tenant] -= 1
        else:
            del self.running[tenant], self.most[tenant]

    def begins_to_wait(self, tenant: str) -> None:
        """It had nothing waiting."""
        if tenant in self.running:
            self.most[tenant] = self.running[tenant]


def hoards(running: int, total: int, share: float, deviations: float) -> bool:
    """Whether so many of `total` are more than a share explains."""
    return running > total * share + deviations * sqrt(max(0.0, total * share * (1 - share)))
