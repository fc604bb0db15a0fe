"""Quotas: how many requests and tokens a tenant may have in a minute. Pure: time is an argument.

Each limit is a bucket that holds one minute's worth and fills steadily. A request takes a piece of
one, and its prompt with all the output that it may make of the other; what it did not make comes
back at its end. So a tenant can have a burst of a whole minute after a quiet one, and never more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, inf

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may have; 0: no limit."""

    open_requests: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


LIMIT_NAMES = tuple(field.name for field in fields(TenantLimits))


@dataclass(frozen=True, slots=True)
class Shortage:
    """What there is too little of."""

    kind: str
    """`requests` or `tokens`, as OpenAI calls them."""
    limit: int
    used: int
    asked: int
    wait_s: float | None
    """None: it asks for more than there ever is."""


class Bucket:
    """See the module's text."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is there; negative where a refund was smaller than thought."""
        self._level = min(self.limit, self._level + self._rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
        return self._level

    def take(self, amount: int) -> None:
        """The caller has looked."""
        self._level -= amount

    def give_back(self, amount: int) -> None:
        """It was not used after all."""
        self._level = min(self.limit, self._level + amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Until so much is there; infinite if it never is."""
        return inf if amount > self.limit else max(0.0, amount - self.level(now)) / self._rate

    @property
    def _rate(self) -> float:
        return self.limit / MINUTE_S


class Quotas:
    """The buckets of all tenants. There are as many as the key file names."""

    def __init__(self, usual: TenantLimits, own: Mapping[str, TenantLimits]) -> None:
        """`own`: by tenant; they win over the usual ones, each for itself, where they are set."""
        self._usual = usual
        self._own = own
        self._buckets: dict[str, dict[str, Bucket]] = {}

    def limits(self, tenant: str) -> TenantLimits:
        """Of this tenant."""
        own = self._own.get(tenant, TenantLimits())
        return TenantLimits(
            **{name: getattr(own, name) or getattr(self._usual, name) for name in LIMIT_NAMES}
        )

    def take(self, tenant: str, tokens: int, now: float) -> Shortage | None:
        """One request of so many tokens; or what there is too little of, and nothing is taken."""
        wanted = {"requests": 1, "tokens": tokens}
        buckets = self._of(tenant, now)
        for kind, bucket in buckets.items():
            wait_s = bucket.wait_s(wanted[kind], now)
            if wait_s > 0.0:
                used = bucket.limit - int(bucket.level(now))
                told = None if wait_s == inf else wait_s
                return Shortage(kind, bucket.limit, used, wanted[kind], told)
        for kind, bucket in buckets.items():
            bucket.take(wanted[kind])
        return None

    def give_back(self, tenant: str, tokens: int, now: float) -> None:
        """Tokens that a request of this tenant did not make."""
        bucket = self._of(tenant, now).get("tokens")
        if bucket is not None:
            bucket.level(now)
            bucket.give_back(tokens)

    def headers(self, tenant: str, now: float) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the limits that there are."""
        shown = {}
        for kind, bucket in self._of(tenant, now).items():
            shown[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            shown[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level(now))))
            shown[f"x-ratelimit-reset-{kind}"] = duration(bucket.wait_s(bucket.limit, now))
        return shown

    def _of(self, tenant: str, now: float) -> Mapping[str, Bucket]:
        if tenant not in self._buckets:
            limits = self.limits(tenant)
            most = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
            self._buckets[tenant] = {
                kind: Bucket(limit, now) for kind, limit in most.items() if limit
            }
        return self._buckets[tenant]


def duration(seconds: float) -> str:
    """As OpenAI writes it: 850ms, 12s, 6m0s."""
    if seconds < 1.0:
        return f"{ceil(seconds * 1_000)}ms"
    whole = ceil(seconds)
    return f"{whole}s" if whole < MINUTE_S else f"{whole // 60}m{whole % 60}s"
