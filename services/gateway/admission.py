"""Who may come in: limits of this gateway and of each tenant, and whether the mesh is there.

Nothing waits here. Who cannot be served soon hears it at once, with the time to come back.
"""

import math
from collections import Counter
from collections.abc import Mapping

from services.gateway.calls import Call
from services.gateway.core.door import Door
from services.gateway.core.quota import Quotas, TenantLimits
from services.gateway.errors import NO_WORKER, ApiError, busy, rate_limited, unavailable
from services.gateway.link import MeshLink
from services.gateway.settings import GatewaySettings

RETRY_MIN_S = 1.0


class Admission:
    """Counts what is open, from the admission to the last byte of the answer."""

    def __init__(
        self,
        settings: GatewaySettings,
        link: MeshLink,
        tenants: Mapping[str, TenantLimits] | None = None,
    ) -> None:
        """`tenants`: those that have limits of their own."""
        usual = TenantLimits(
            settings.tenant_requests_max,
            settings.tenant_requests_per_minute,
            settings.tenant_tokens_per_minute,
        )
        self._quotas = Quotas(usual, tenants or {})
        self._settings = settings
        self._link = link
        self._by_tenant: Counter[str] = Counter()
        self._open = 0
        self._door = Door(settings.open_requests_max)
        self.draining = False

    @property
    def obstacle(self) -> ApiError | None:
        """Why no request can be served now, limits aside; None: it can. 503."""
        if self.draining:
            return unavailable("This gateway is shutting down. Try again.", RETRY_MIN_S)
        if not self._link.connected:
            return unavailable("The mesh is starting, or its scheduler cannot be reached.")
        workerless_s = self._link.workerless_s
        if workerless_s is None:
            return None
        if self._link.advice:
            return unavailable(f"No worker can be used: {self._link.advice}.", code=NO_WORKER)
        if math.isinf(workerless_s):
            return unavailable("No worker has its model loaded yet.", code=NO_WORKER)
        return unavailable(f"No worker has been there for {workerless_s:.0f} s.", code=NO_WORKER)

    @property
    def open_choices(self) -> int:
        """Choices whose answer is under way."""
        return self._open

    def check_ready(self) -> None:
        """Raises ApiError (503) while nobody can serve; a worker may be away for a while."""
        obstacle = self.obstacle
        if obstacle is None:
            return
        away_s = self._link.workerless_s or 0.0
        if obstacle.code != NO_WORKER or away_s > self._settings.worker_grace_s:
            raise obstacle

    def enter(self, call: Call) -> None:
        """Lets a call in. Raises ApiError (429, 503); otherwise `leave` must follow. Its deadlines
        are the scheduler's to judge, which knows the queue as it is now."""
        self.check_ready()
        wait_s = self._link.predicted_wait_s
        retry_s = max(RETRY_MIN_S, wait_s)
        count = len(call.choices)
        most, now = self._settings.open_requests_max, self._link.now()
        if self._door.refuses(self._open, now) or self._open + count > most:
            opens_s = self._door.opens_in_s(self._open, now) if self._door.closed else None
            raise busy(
                f"{self._open} requests are open on this gateway, of at most {most}. "
                "Try again later.",
                retry_s if opens_s is None else opens_s,
            )
        limit = self._quotas.limits(call.tenant).open_requests
        if limit and self._by_tenant[call.tenant] + count > limit:
            raise busy(f"Your limit of {limit} open requests is reached.", retry_s)
        longest_s = self._settings.wait_max_s
        if longest_s and wait_s > longest_s:
            raise busy(f"The queue's wait is {wait_s:.1f} s now. Try again later.", retry_s)
        shortage = self._quotas.take(call.tenant, _tokens_max(call), self._link.now())
        if shortage is not None:
            raise rate_limited(call.tenant, shortage)
        self._open += count
        self._by_tenant[call.tenant] += count

    def leave(self, call: Call) -> None:
        """The call's answer is over."""
        count = len(call.choices)
        unused = _tokens_max(call) - call.prompt_tokens - call.output_tokens
        self._quotas.give_back(call.tenant, max(0, unused), self._link.now())
        self._open -= count
        self._door.left(count, self._link.now())
        self._by_tenant[call.tenant] -= count
        if not self._by_tenant[call.tenant]:
            del self._by_tenant[call.tenant]

    def rate_headers(self, tenant: str) -> dict[str, str]:
        """What is left of the tenant's quotas, for the answer's head."""
        return self._quotas.headers(tenant, self._link.now())


def _tokens_max(call: Call) -> int:
    """What the call may cost at most."""
    return call.prompt_tokens + sum(choice.spec.max_tokens for choice in call.choices)
