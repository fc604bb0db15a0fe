"""The worker's mind: which orders it takes, what it holds, what it owes to whom. Pure.

Theory of operation. Orders arrive at least once, possibly late and from a deposed scheduler; the
engine reports iterations. From both follow: batches for the engine, tokens for gateways
(`outbox`), results and beats for the scheduler. Tokens are kept until a gateway confirms the end
(`retained`), so that they can be sent again. A closed batch ends with exactly one `SliceDone`; of
leased requests, each iteration makes at most one (`leases`).

Draining: nothing new is taken, what waits is given back, what runs ends (a lease at its end, where
it is parked), tokens go out, then the last beat says `leaving`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from services.worker.core.events import (
    BatchBegan,
    BatchRefused,
    CancelRequest,
    Command,
    EngineStepped,
    Event,
    GiveBack,
    Leave,
    Order,
    Reconnected,
    StartBatch,
    StopWanted,
    TokensNotSent,
    TokensSent,
)
from services.worker.core.leases import LEASES_MAX, Held, Lease, Leases
from services.worker.core.orders import batch_fault, error_run, order_fault, refused_result
from services.worker.core.outbox import Outbox, run_of
from services.worker.core.retained import Retained
from services.worker.engines.api import EngineInfo, SliceEnd, StepTokens
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    Form,
    Park,
    Resident,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    TokenRun,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)
from shared.tokens import count

BEAT_S = 0.5
LIST_S = 10.0
"""Residents are listed at least so often: what was lost on its way is noticed by it."""
BATCHES_MAX = 64
"""Batches that run or wait here; a scheduler that sends more has lost sight of this worker."""
BATCH_IDS_MAX = 4_096
"""Ids of earlier batches, to know a repeat. Repeats come within seconds of the first."""
DROPS_MAX = 4_096
"""Drops remembered, to know an order that comes after its own drop: what a broken line left
unconfirmed is said again, behind what was said since."""
LEAVE_S = 10.0
"""A leaving worker waits this long for a broker to take its last tokens."""
DRAINING = "draining"
QUEUE_FULL = "queue full"
UNKNOWN_REQUEST = "unknown request"


@dataclass(slots=True)
class _OpenBatch:
    """A closed batch between its order and its `SliceDone`."""

    order: RunSlice
    faulty: tuple[SliceResult, ...]
    """Results of requests that could never run; they are reported with the others."""


class Worker:
    """See the module's text. Events in, commands out; `now` is monotonic seconds."""

    def __init__(
        self, worker: str, name: str, engine: EngineInfo, memory: WorkerMemory, now: float
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._info = WorkerInfo(
            worker=worker,
            name=name,
            engine=engine.engine,
            forms=engine.forms,
            model=engine.model,
            context_tokens_max=engine.context_tokens_max,
            vocabulary_size=engine.vocabulary_size,
            batch_size_max=engine.batch_size_max,
            device=engine.device,
            kv_block_tokens=engine.kv_block_tokens,
            shares_prefixes=engine.shares_prefixes,
        )
        self._epoch = 0
        self._heard_at: float | None = None
        self._held: dict[str, Held] = {}
        self._open: dict[str, _OpenBatch] = {}
        self._leases = Leases(self._held)
        self._known: OrderedDict[str, None] = OrderedDict()
        self._dropped: OrderedDict[str, int] = OrderedDict()
        """Request -> the latest attempt that was dropped."""
        self._outbox = Outbox(worker)
        self._retained = Retained()
        self._next_beat = now
        self._list_residents = True
        self._listed_at = now
        self._draining_since: float | None = None
        self._left = False

    @property
    def _draining(self) -> bool:
        return self._draining_since is not None

    @property
    def memory(self) -> WorkerMemory:
        """The engine's latest telemetry."""
        return self._memory

    def deadline(self) -> float | None:
        """When to call `wake` next; None after the end."""
        if self._left:
            return None
        sending = self._outbox.deadline()
        return self._next_beat if sending is None else min(self._next_beat, sending)

    def wake(self, now: float) -> list[Command]:
        """The deadline came."""
        return self._finish([], now)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Something happened. Late, repeated and foreign messages answer nothing."""
        if self._left:
            return []
        commands: list[Command] = []
        match event:
            case RunSlice() | Park() | Drop() | SendTokens() | DrainWorker() | SchedulerBeat():
                if self._follow(event, now):
                    commands = self._obey(event, now)
            case FinishAck():
                for request_id in event.request_ids:
                    self._retained.forget(request_id)
            case EngineStepped():
                commands = self._on_step(event, now)
            case BatchBegan():
                self._memory = event.memory
            case BatchRefused():
                commands = self._on_refused(event)
            case TokensSent():
                self._outbox.sent(event.gateway)
            case TokensNotSent():
                self._outbox.failed(event.batch, now, unroutable=event.unroutable)
            case Reconnected():
                self._heard_at = None
                self._beat_now(now)
            case StopWanted():
                commands = self._drain(now)
        return self._finish(commands, now)

    # ---------------------------------------------------------------------------- orders

    def _follow(self, event: Order, now: float) -> bool:
        """Whether the sender leads; a new leader is told at once what is here."""
        if event.epoch < self._epoch:
            return False
        if event.epoch > self._epoch:
            self._epoch = event.epoch
            self._beat_now(now)
            self._leases.new_leader()
        if isinstance(event, SchedulerBeat):
            self._heard_at = now
        return isinstance(event, SchedulerBeat) or event.worker == self._info.worker

    def _obey(self, event: Order, now: float) -> list[Command]:
        match event:
            case RunSlice():
                return self._on_order(event, now)
            case Park():
                return self._leases.park(event.request_id, event.attempt)
            case Drop():
                return self._on_drop(event)
            case SendTokens():
                return self._on_tokens_wanted(event)
            case DrainWorker():
                return self._drain(now)
            case SchedulerBeat():
                return []

    def _on_order(self, order: RunSlice, now: float) -> list[Command]:
        commands: list[Command] = []
        if order.form == "leased":
            commands += self._leases.obey(order, draining=self._draining)
            if not order.orders:
                return commands
        if order.batch_id in self._known:
            return commands
        self._remember(order.batch_id)
        refusal = self._refusal(order)
        if refusal:
            return [*commands, self._slice_done(order, refused=refusal)]
        taken: list[SliceOrder] = []
        faulty: list[SliceResult] = []
        for share in order.orders:
            fault = order_fault(share, self._engine)
            held = self._held.get(share.spec.request_id)
            if fault:
                faulty.append(refused_result(share, "error", fault))
                self._send(error_run(share, fault), share.spec.gateway, now)
            elif share.attempt <= self._dropped.get(share.spec.request_id, 0):
                faulty.append(refused_result(share, "cancelled", "it was dropped"))
            elif held is not None and held.attempt > share.attempt:
                faulty.append(refused_result(share, "cancelled", "a newer attempt is here"))
            else:
                if held is not None and held.attempt < share.attempt:
                    commands += self._let_go(share.spec.request_id, held.attempt)
                if order.form == "leased" and share.spec.request_id in self._held:
                    continue  # this very placement is here: the batch's id was forgotten
                taken.append(share)
        return commands + self._take(order, taken, tuple(faulty))

    def _take(
        self, order: RunSlice, taken: list[SliceOrder], faulty: tuple[SliceResult, ...]
    ) -> list[Command]:
        """Hold what can run and give it to the engine. Faults of a closed batch are reported with
        its end, those of leases at once."""
        leased, told = order.form == "leased", faulty
        if leased:
            told = (*told, *self._leases.take(order, taken))
        elif taken:
            self._open[order.batch_id] = _OpenBatch(order, faulty)
            for share in taken:
                self._held[share.spec.request_id] = Held(
                    share.attempt, share.spec.gateway, count(share.tokens), order.batch_id
                )
        commands: list[Command] = []
        if taken:
            reduced = msgspec.structs.replace(order, orders=tuple(taken), renewals=())
            commands.append(StartBatch(reduced))
        if told if leased else not taken:
            commands.append(self._slice_done(order, results=told))
        return commands

    def _refusal(self, order: RunSlice) -> str:
        if self._draining:
            return DRAINING
        if len(self._open) >= BATCHES_MAX or len(self._held) + len(order.orders) > LEASES_MAX:
            return QUEUE_FULL
        if any(o.resident and not o.spec.prompt for o in order.orders):
            return UNKNOWN_REQUEST
        return batch_fault(order, self._engine)

    def _on_drop(self, drop: Drop) -> list[Command]:
        self._retained.forget(drop.request_id, drop.attempt)
        self._outbox.forget(drop.request_id, drop.attempt)
        latest = max(drop.attempt, self._dropped.pop(drop.request_id, 0))
        self._dropped[drop.request_id] = latest
        if len(self._dropped) > DROPS_MAX:
            self._dropped.popitem(last=False)
        return self._let_go(drop.request_id, drop.attempt)

    def _let_go(self, request_id: str, attempt: int) -> list[Command]:
        """Stop with attempts up to this one."""
        held = self._held.get(request_id)
        if held is None or held.attempt > attempt:
            return []
        del self._held[request_id]
        return [CancelRequest(request_id, attempt)]

    def _on_tokens_wanted(self, wish: SendTokens) -> list[Command]:
        kept = self._retained.run_from(wish.request_id, wish.attempt, wish.position)
        if kept is not None:
            gateway, run = kept
            if run.ids or run.finish_reason:
                self._outbox.add(gateway, run)
                return []
        held = self._held.get(wish.request_id)
        if held is not None and held.attempt == wish.attempt and held.position <= wish.position:
            return []
        result = SliceResult(
            request_id=wish.request_id, attempt=wish.attempt, position=wish.position
        )
        return [self._slice_done(None, results=(result,), refused=UNKNOWN_REQUEST)]

    def _drain(self, now: float) -> list[Command]:
        if self._draining:
            return []
        self._draining_since = now
        self._beat_now(now)
        return [GiveBack(DRAINING), *self._leases.park_used_up()]

    # ------------------------------------------------------------------------- the engine

    def _on_step(self, event: EngineStepped, now: float) -> list[Command]:
        if event.memory is not None:
            self._memory = event.memory
        for tokens in event.report.tokens:
            self._on_tokens(tokens, now)
        commands: list[Command] = [self._on_end(end) for end in event.report.ended]
        results, parking = self._leases.on_step(event.report, draining=self._draining)
        self._list_residents |= any(end.evicted for end in event.report.left)
        if results:
            summed = self._leases.take_timings()
            timings = event.report.timings or summed
            commands.append(self._slice_done(None, "leased", results=results, timings=timings))
        return commands + parking

    def _on_tokens(self, tokens: StepTokens, now: float) -> None:
        held = self._held.get(tokens.request_id)
        if held is None or held.attempt != tokens.attempt:
            return
        held.position = tokens.position + len(tokens.ids)
        run = run_of(tokens)
        if isinstance(held, Lease):
            held.made += run.ids
        self._send(run, held.gateway, now)

    def _send(self, run: TokenRun, gateway: str, now: float) -> None:
        self._retained.add(run, gateway, now)
        self._outbox.add(gateway, run)

    def _on_end(self, end: SliceEnd) -> SliceDone:
        batch = self._open.pop(end.batch_id)
        for result in end.results:
            self._release(result.request_id, result.attempt, end.batch_id)
        return self._slice_done(
            batch.order, results=(*end.results, *batch.faulty), timings=end.timings
        )

    def _on_refused(self, event: BatchRefused) -> list[Command]:
        """What does not fit was promised by somebody who does not know all that is here, since a
        `Drop` was lost, say: the next beat lists it."""
        self._list_residents = True
        if event.memory is not None:
            self._memory = event.memory
        batch = self._open.pop(event.order.batch_id, None)
        order = batch.order if batch else event.order
        for share in order.orders:
            self._release(share.spec.request_id, share.attempt, order.batch_id)
        return [self._slice_done(order, refused=event.reason)]

    def _release(self, request_id: str, attempt: int, batch_id: str) -> None:
        held = self._held.get(request_id)
        if held is not None and held.attempt == attempt and held.batch_id == batch_id:
            del self._held[request_id]

    # ------------------------------------------------------------------------ what goes out

    def _finish(self, commands: list[Command], now: float) -> list[Command]:
        """Tokens that are due go before results, beats after them."""
        idle = not self._open and not self._held
        out: list[Command] = [*self._outbox.due(now, self._epoch, at_once=idle), *commands]
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self._list_residents |= now - self._listed_at >= LIST_S
            self._listed_at = now if self._list_residents else self._listed_at
            out += [*self._leases.park_forgotten(now), self._beat(now)]
        if self._may_leave(now):
            self._left = True
            self._list_residents = True
            out += [self._beat(now, leaving=True), Leave()]
        return out

    def _may_leave(self, now: float) -> bool:
        if self._draining_since is None or self._open or self._held:
            return False
        return self._outbox.empty or now >= self._draining_since + LEAVE_S

    def _beat_now(self, now: float) -> None:
        self._next_beat = now
        self._list_residents = True

    def _beat(self, now: float, *, leaving: bool = False) -> WorkerBeat:
        listed, self._list_residents = self._list_residents, False
        return WorkerBeat(
            info=self._info,
            memory=self._memory,
            epoch=self._epoch,
            heard_s=0.0 if self._heard_at is None else now - self._heard_at,
            residents=self._residents() if listed else (),
            residents_listed=listed,
            draining=self._draining,
            leaving=leaving,
        )

    def _residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                request_id=request_id,
                attempt=held.attempt,
                position=held.position,
                until=held.until if isinstance(held, Lease) else 0,
            )
            for request_id, held in self._held.items()
        )

    def _slice_done(
        self,
        order: RunSlice | None,
        form: Form | None = None,
        *,
        results: tuple[SliceResult, ...] = (),
        timings: SliceTimings | None = None,
        refused: str = "",
    ) -> SliceDone:
        return SliceDone(
            epoch=self._epoch,
            worker=self._info.worker,
            batch_id=order.batch_id if order else "",
            form=order.form if order else form or self._engine.forms[0],
            results=results,
            timings=timings or SliceTimings(),
            memory=self._memory,
            refused=refused,
        )

    def _remember(self, batch_id: str) -> None:
        self._known[batch_id] = None
        if len(self._known) > BATCH_IDS_MAX:
            self._known.popitem(last=False)
