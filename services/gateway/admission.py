"""Who may come in: limits of this gateway and of each tenant, and whether the mesh is there.

Nothing waits here. Who cannot be served soon hears it at once, with the time to come back.
"""

import math
from collections import Counter

from services.gateway.calls import Call
from services.gateway.errors import NO_WORKER, ApiError, busy, unavailable
from services.gateway.link import MeshLink
from services.gateway.orders import Wishes
from services.gateway.settings import GatewaySettings

RETRY_MIN_S = 1.0


class Admission:
    """Counts what is open, from the admission to the last byte of the answer."""

    def __init__(self, settings: GatewaySettings, link: MeshLink) -> None:
        self._settings = settings
        self._link = link
        self._by_tenant: Counter[str] = Counter()
        self._open = 0
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

    def enter(self, call: Call, wishes: Wishes) -> None:
        """Lets a call in. Raises ApiError (429, 503); otherwise `leave` must follow."""
        self.check_ready()
        wait_s = self._link.predicted_wait_s
        retry_s = max(RETRY_MIN_S, wait_s)
        count = len(call.choices)
        if self._open + count > self._settings.open_requests_max:
            raise busy(
                f"{self._open} requests are open on this gateway, of at most "
                f"{self._settings.open_requests_max}. Try again later.",
                retry_s,
            )
        limit = self._settings.tenant_requests_max
        if limit and self._by_tenant[call.tenant] + count > limit:
            raise busy(f"Your limit of {limit} open requests is reached.", retry_s)
        longest_s = self._settings.wait_max_s
        if longest_s and wait_s > longest_s:
            raise busy(f"The queue's wait is {wait_s:.1f} s now. Try again later.", retry_s)
        wanted_ms = wishes.ttft_deadline_ms
        if wanted_ms is not None and wait_s * 1_000 > wanted_ms:
            raise busy(
                f"The first token is wanted within {wanted_ms} ms, but the queue's wait is "
                f"{wait_s:.1f} s now.",
                retry_s,
            )
        self._open += count
        self._by_tenant[call.tenant] += count

    def leave(self, call: Call) -> None:
        """The call's answer is over."""
        count = len(call.choices)
        self._open -= count
        self._by_tenant[call.tenant] -= count
        if not self._by_tenant[call.tenant]:
            del self._by_tenant[call.tenant]
