"""Leases: how far each request in the running batch may go, and what the scheduler is told of it.

Theory of operation. A lease is credit: its request may make output up to `until`, an absolute
position that is only ever raised. At `until` the engine lets it pause, its KV stays, and it goes on
with a renewal. What the scheduler hears is derived here from the tokens of each iteration: the
first token, little left (`margin_tokens`), used up, finished, parked, evicted. All reports of one
iteration make one `SliceDone`; a request has at most one in it.

A report begins where the last one ended. A new leader has never heard the earlier ones, and does
not listen before it has collected who is where. So until its first renewal, and once after that,
a report begins where the placement began: it then overlaps what the gateway has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.worker.core.events import Command, ParkLease, RenewLease
from services.worker.engines.api import LeaseEnd, StepReport
from shared.messages import FinishReason, RunSlice, SliceOrder, SliceResult, SliceTimings
from shared.tokens import TOKEN_BYTES, count

UNRENEWED_S = 30.0
"""A lease that was used up and gets no renewal for so long is forgotten by its scheduler (a `Drop`
that was lost, say): its memory is given back."""
LEASES_MAX = 4_096
"""Requests of one worker; 256 run together on large devices, the rest waits for credit."""


@dataclass(slots=True)
class Held:
    """A request that runs or waits here."""

    attempt: int
    gateway: str
    position: int
    """Output tokens so far."""
    batch_id: str


@dataclass(slots=True)
class Lease(Held):
    """A request with a lease of its own."""

    begin: int
    """Where this placement began in the output."""
    until: int
    output_tokens_max: int
    reported: int
    """The end of the last report."""
    made: bytearray = field(default_factory=bytearray)
    """Packed ids from `begin` on."""
    known: bool = True
    """The leader goes by the reports: it gave this lease, or has renewed it."""
    said_first: bool = False
    said_margin_of: int = -1
    """The `until` whose nearing end was reported."""
    said_end_of: int = -1
    paused_since: float | None = None
    """When it was first seen to be used up; None: it is not."""
    parking: bool = False
    """The engine is asked to let go of it; its end is reported then."""

    @property
    def used_up(self) -> bool:
        """It may make no more tokens without a renewal."""
        return self.position >= self.until and self.position < self.output_tokens_max

    def renew(self, until: int) -> bool:
        """Raise the end; True if it is later now."""
        until = min(until, self.output_tokens_max)
        if until <= self.until or self.parking:
            return False
        self.until, self.paused_since = until, None
        return True

    def due(self, margin_tokens: int) -> bool:
        """Whether the scheduler has to hear of it now."""
        first = self.position > self.begin and not self.said_first
        low = self.until - self.position <= margin_tokens and self.until < self.output_tokens_max
        margin = low and self.said_margin_of != self.until
        return first or margin or (self.used_up and self.said_end_of != self.until)

    def report(
        self,
        request_id: str,
        *,
        resident: bool,
        finish_reason: FinishReason | None = None,
        evicted: bool = False,
        detail: str = "",
        margin_tokens: int = 0,
    ) -> SliceResult:
        """What is new since the last report."""
        begin = self.reported
        if self.known:
            self.reported = self.position
        self.said_first |= self.position > self.begin
        if self.until - self.position <= margin_tokens:
            self.said_margin_of = self.until
        if self.used_up:
            self.said_end_of = self.until
        return SliceResult(
            request_id=request_id,
            attempt=self.attempt,
            position=begin,
            tokens=bytes(self.made[(begin - self.begin) * TOKEN_BYTES :]),
            finish_reason=finish_reason,
            resident=resident,
            evicted=evicted,
            detail=detail,
        )


class Leases:
    """All leases here. They live in `held`, which the worker's core has in its keeping, among the
    requests of closed batches."""

    def __init__(self, held: dict[str, Held]) -> None:
        self._held = held
        self._margin_tokens = 0
        self._timings = SliceTimings()

    def take(self, order: RunSlice, shares: Sequence[SliceOrder]) -> list[SliceResult]:
        """New placements; returns reports of those that may not make a single token yet."""
        reports = []
        for share in shares:
            begin, most = count(share.tokens), share.spec.max_tokens
            lease = Lease(
                attempt=share.attempt,
                gateway=share.spec.gateway,
                position=begin,
                batch_id=order.batch_id,
                begin=begin,
                until=min(begin + share.lease_tokens, max(begin, most)),
                output_tokens_max=most,
                reported=begin,
            )
            self._held[share.spec.request_id] = lease
            if lease.used_up:
                reports.append(self._progress(share.spec.request_id, lease))
        return reports

    def obey(self, order: RunSlice, *, draining: bool) -> list[Command]:
        """Its margin and its renewals; while draining nothing is renewed."""
        self._margin_tokens = order.margin_tokens
        commands: list[Command] = []
        for renewal in () if draining else order.renewals:
            lease = self._of(renewal.request_id, renewal.attempt)
            if lease is None:
                continue
            lease.known = True
            if lease.renew(renewal.until):
                commands.append(RenewLease(renewal.request_id, renewal.attempt, lease.until))
        return commands

    def park(self, request_id: str, attempt: int) -> list[Command]:
        """Have the engine let go of it. Unknown or other attempts, and repeats: nothing."""
        lease = self._of(request_id, attempt)
        if lease is None or lease.parking:
            return []
        lease.parking = True
        return [ParkLease(request_id, attempt)]

    def park_used_up(self) -> list[Command]:
        """What pauses now will get no renewal: this worker drains."""
        commands: list[Command] = []
        for request_id, lease in self._held.items():
            if isinstance(lease, Lease) and lease.used_up:
                commands += self.park(request_id, lease.attempt)
        return commands

    def park_forgotten(self, now: float) -> list[Command]:
        """Let go of leases that nobody renews. To be called every half second or so."""
        commands: list[Command] = []
        for request_id, lease in self._held.items():
            if not isinstance(lease, Lease) or not lease.used_up:
                continue
            if lease.paused_since is None:
                lease.paused_since = now
            elif now - lease.paused_since > UNRENEWED_S:
                commands += self.park(request_id, lease.attempt)
        return commands

    def new_leader(self) -> None:
        """It knows none of the reports so far."""
        for lease in self._held.values():
            if isinstance(lease, Lease):
                lease.reported, lease.known = lease.begin, False

    def on_step(
        self, report: StepReport, *, draining: bool
    ) -> tuple[tuple[SliceResult, ...], list[Command]]:
        """Reports of one iteration, whose tokens the leases have already; and what is to be parked
        because this worker drains. What ended is not held any more."""
        self._count(report)
        ended = {end.request_id for end in report.left}
        results: list[SliceResult] = []
        commands: list[Command] = []
        for tokens in report.tokens:
            request_id = tokens.request_id
            lease = self._of(request_id, tokens.attempt)
            if lease is None:
                continue
            if tokens.finish_reason is not None:
                del self._held[request_id]
                results.append(
                    lease.report(request_id, resident=False, finish_reason=tokens.finish_reason)
                )
            elif request_id in ended or lease.parking:
                continue
            elif draining and lease.used_up:
                commands += self.park(request_id, lease.attempt)
            elif lease.due(self._margin_tokens):
                results.append(self._progress(request_id, lease))
        return (*results, *self._left(report.left)), commands

    def take_timings(self) -> SliceTimings:
        """Of all iterations since the last call."""
        taken, self._timings = self._timings, SliceTimings()
        return taken

    def _of(self, request_id: str, attempt: int) -> Lease | None:
        held = self._held.get(request_id)
        return held if isinstance(held, Lease) and held.attempt == attempt else None

    def _progress(self, request_id: str, lease: Lease) -> SliceResult:
        return lease.report(request_id, resident=True, margin_tokens=self._margin_tokens)

    def _left(self, left: Iterable[LeaseEnd]) -> list[SliceResult]:
        results = []
        for end in left:
            lease = self._of(end.request_id, end.attempt)
            if lease is not None:
                del self._held[end.request_id]
                results.append(
                    lease.report(
                        end.request_id, resident=False, evicted=end.evicted, detail=end.detail
                    )
                )
        return results

    def _count(self, report: StepReport) -> None:
        if report.prefill_s or report.decode_s:
            so_far = self._timings
            self._timings = SliceTimings(
                prefill_s=so_far.prefill_s + report.prefill_s,
                decode_s=so_far.decode_s + report.decode_s,
                iterations=so_far.iterations + 1,
                batch_size=max(so_far.batch_size, report.batch_size),
            )
