"""A worker's credit: which leases it has been given, and how many KV blocks they reserve.

Nothing runs without credit. A lease up to output position `until` reserves the blocks that the
request can fill until then, before its order goes out; the blocks come back when the worker has
said that the request ended or was parked. So what is reserved is never less than what is used.
"""

from dataclasses import dataclass, field

from services.scheduler.core.state import Request
from shared.memory import leased_blocks


@dataclass(slots=True)
class Credit:
    """The leases of one worker."""

    block_tokens: int = 1
    leases: dict[str, Request] = field(default_factory=dict)
    """In order of admission; those that are being parked among them."""
    wanting: dict[str, Request] = field(default_factory=dict)
    """Who has little left of its lease, in the order in which they said so."""
    blocks: int = 0
    """Reserved by all leases."""
    parking_blocks: int = 0
    """Of these, what comes back once parked requests have answered."""
    worst_blocks: int = 0
    """What all leases would fill if every request made as much as it may."""
    backlog_tokens: int = 0
    """Input of leases that have made no token yet: prefill that is still to be done."""
    prefilling: dict[str, Request] = field(default_factory=dict)
    """Who made no token yet, in order of admission: the first one's prefill is under way."""
    prefill_since: float = 0.0
    """When that began."""
    lease_seconds: float = 0.0
    """Leases times the seconds that each was here, ever, up to `counted_at`."""
    counted_at: float = 0.0

    def capacity_blocks(self, capacity_tokens: int) -> int:
        return capacity_tokens // self.block_tokens

    def blocks_for(self, request: Request, until: int) -> int:
        return leased_blocks(request.prompt_tokens, until, self.block_tokens)

    def rounded(self, request: Request, until: int) -> int:
        """A lease up to `until`, to the end of its last block: as far as it can go without
        reserving more."""
        slots = self.blocks_for(request, until) * self.block_tokens
        return min(max(until, slots - request.prompt_tokens + 1), request.spec.max_tokens)

    def count(self, now: float) -> float:
        """`lease_seconds` until now."""
        self.lease_seconds += len(self.leases) * max(0.0, now - self.counted_at)
        self.counted_at = max(now, self.counted_at)
        return self.lease_seconds

    def take(self, request: Request, until: int, now: float) -> None:
        """A new lease here."""
        request.until, request.listed = until, 0
        request.timed_at, request.lease_seconds, request.stood = now, self.count(now), False
        request.blocks = self.blocks_for(request, until)
        request.first_token = False
        request.backlog_tokens = request.input_tokens
        request.beside = len(self.leases)
        self.leases[request.request_id] = request
        self.blocks += request.blocks
        self.worst_blocks += self.blocks_for(request, request.spec.max_tokens)
        self.backlog_tokens += request.backlog_tokens
        if not self.prefilling:
            self.prefill_since = now
        self.prefilling[request.request_id] = request
        request.backlog_ahead = self.backlog_tokens

    def extend(self, request: Request, until: int) -> None:
        """The next lease of a request that is here."""
        blocks = self.blocks_for(request, until)
        self.blocks += blocks - request.blocks
        request.until, request.blocks = until, blocks
        self.wanting.pop(request.request_id, None)

    def prefilled(self, request: Request, now: float) -> None:
        """It has made its first token here."""
        request.first_token = True
        self._end_prefill(request, now)
        request.backlog_tokens = 0

    def _end_prefill(self, request: Request, now: float) -> None:
        self.backlog_tokens -= request.backlog_tokens
        if self.prefilling.pop(request.request_id, None) is not None:
            self.prefill_since = now

    def under_way_tokens(self) -> int:
        """Input of the request whose prefill is under way."""
        return next((request.backlog_tokens for request in self.prefilling.values()), 0)

    def backlog_left(self, now: float, token_s: float) -> float:
        """Queued prefill, less what should be done by now of that under way, at so many seconds a
        token."""
        done = max(0.0, now - self.prefill_since) / token_s
        return self.backlog_tokens - min(self.under_way_tokens(), done)

    def park(self, request: Request) -> None:
        """It was told to end its lease."""
        self.parking_blocks += request.blocks
        self.wanting.pop(request.request_id, None)

    def release(self, request: Request, now: float, *, parking: bool) -> None:
        """It is not here any more."""
        self.count(now)
        if self.leases.pop(request.request_id, None) is None:
            return
        self.wanting.pop(request.request_id, None)
        self.blocks -= request.blocks
        self.worst_blocks -= self.blocks_for(request, request.spec.max_tokens)
        if parking:
            self.parking_blocks -= request.blocks
        self._end_prefill(request, now)
        request.until = request.blocks = request.backlog_tokens = 0
