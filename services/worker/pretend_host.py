"""One process that pretends to be many workers, for load tests of a mesh with hundreds of them.

Theory of operation. Every member is a worker of its own to the scheduler: it has an id, leases,
memory and beats. What they share is the way to the broker: one bus, one queue (a binding with a
wildcard takes in the orders of all), and one clock that ticks every `TICK_S`. At a tick every
member that is due takes its turn. The tokens of all go out together, one message per gateway and
tick, and not more than one under way; the beats of all are one message. Results go one by one, in
order for each member, some lines of them side by side. A beat that lists what a member holds must
not overtake that member's results, so it goes behind them if any wait. Since a message of tokens
has many makers, gateways acknowledge ends to the host.
"""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Iterable

import msgspec

from services.worker.core.events import (
    BatchBegan,
    Event,
    Reconnected,
    StopWanted,
    TokensNotSent,
    TokensSent,
)
from services.worker.core.worker import BEAT_S
from services.worker.metrics import WorkerMetrics
from services.worker.pretend_member import Member, Outgoing
from services.worker.scheduler_line import SchedulerLine
from services.worker.settings import WorkerSettings
from shared.bus.api import Bus, BusError, Delivery, Unroutable
from shared.bus.topology import (
    SCHEDULER_QUEUE,
    addresses_of,
    host_queue,
    hosted_worker,
    said_rightly,
)
from shared.config import SetupError
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    Park,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    TokenBatch,
    WorkerBeat,
    WorkerBeats,
)
from shared.telemetry.metrics import metrics_for
from shared.telemetry.ops import serve_ops
from shared.telemetry.setup import Telemetry
from shared.tokens import count

TICK_S = 0.1
"""Tokens are held back this long at most; a member's engine starts nothing sooner."""
LINES = 16
"""Results under way to the scheduler at once; a confirm takes milliseconds."""
TOKENS_DEADLINE_S = 10.0
"""As of a plain worker."""
ENDS_MAX = 50_000
"""Ended requests whose maker is remembered until the gateway acknowledges them, which it does at
once. Whoever is forgotten keeps the tokens for two minutes."""


class Misdirected(Exception):
    """A message that is none of a worker's; it becomes a dead letter."""


async def serve_many(
    settings: WorkerSettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
) -> None:
    """Pretend to be `pretend_workers` workers until `stop`, drain them all, return.

    Raises SetupError and BusUnavailable.
    """
    if settings.engine != "simulated":
        raise SetupError("pretend_workers is for the engine simulated: add --engine simulated")
    host = Host(settings, bus, telemetry)
    done = asyncio.Event()
    ops = asyncio.ensure_future(
        serve_ops(
            settings.ops_host, settings.ops_port, telemetry.registry, lambda: host.ready, done
        )
    )
    try:
        await host.run(stop)
    finally:
        done.set()
        await ops


class Host:
    """See the module's text."""

    def __init__(self, settings: WorkerSettings, bus: Bus, telemetry: Telemetry) -> None:
        """Makes the members. Raises SetupError."""
        self.ready = False
        self._name = settings.name
        self._host = telemetry.boot_id
        self._bus = bus
        self._log = telemetry.log.bind(worker=settings.name)
        self._metrics = metrics_for(telemetry.registry, WorkerMetrics)
        self._loop = asyncio.get_running_loop()
        self._beat_line, *self._lines = (
            SchedulerLine(bus, self._host, self._log, self._on_error) for _ in range(1 + LINES)
        )
        numbers = range(1, settings.pretend_workers + 1)
        ids = {number: hosted_worker(self._host, number) for number in numbers}
        self._members = {
            worker: Member(
                worker, hosted_worker(settings.name, number), settings, TICK_S, self._on_began
            )
            for number, worker in ids.items()
        }
        self._line_of = {worker: self._lines[number % LINES] for number, worker in ids.items()}
        self._tokens: defaultdict[str, list[tuple[Member, TokenBatch]]] = defaultdict(list)
        """Gateway to what waits for it."""
        self._under_way: set[str] = set()
        """Gateways with a message that is not yet confirmed."""
        self._ends: OrderedDict[str, Member] = OrderedDict()
        """Request to who made its end."""
        self._beats: dict[str, WorkerBeat] = {}
        self._beats_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """From joining the mesh until every member has left it."""
        await self._bus.declare(SCHEDULER_QUEUE)
        self._bus.on_reconnect(lambda: self._tell_all(Reconnected()))
        subscription = await self._bus.consume(host_queue(self._host), self._on_delivery)
        self._log.info("worker.ready", workers=len(self._members))
        stopping = asyncio.ensure_future(self._stop_when(stop))
        try:
            async with asyncio.TaskGroup() as tasks:
                every = (*self._lines, self._beat_line)
                sending = [tasks.create_task(line.run()) for line in every]
                await self._tick_until_left(tasks)
                await asyncio.gather(*(line.flush() for line in self._lines))
                self._say_beats()
                await self._beat_line.flush()
                for task in sending:
                    task.cancel()
        finally:
            stopping.cancel()
            self.ready = False
            await subscription.close()
        self._log.info("worker.left")

    async def _stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._tell_all(StopWanted())

    async def _tick_until_left(self, tasks: asyncio.TaskGroup) -> None:
        at = self._loop.time()
        while self._members:
            now = self._loop.time()
            self._tick(now, tasks)
            self.ready = True
            at = max(at + TICK_S, now)
            await asyncio.sleep(at - now)

    # ------------------------------------------------------------------------- events in

    async def _on_delivery(self, delivery: Delivery) -> None:
        message = delivery.message if said_rightly(delivery) else None
        match message:
            case RunSlice() | Park() | Drop() | SendTokens() | DrainWorker():
                member = self._members.get(message.worker)
                if member is not None:
                    self._handle(member, message)
            case SchedulerBeat():
                self._tell_all(message)
            case FinishAck():
                self._acknowledged(message)
            case _:
                self._on_error("misdirected")
                what = type(delivery.message).__name__
                raise Misdirected(
                    f"{what} is nothing for a worker, or not from {delivery.exchange}"
                )

    def _handle(self, member: Member, event: Event) -> None:
        self._take(member, member.handle(event, self._loop.time()))

    def _tell_all(self, event: Event) -> None:
        for member in tuple(self._members.values()):
            self._handle(member, event)

    def _acknowledged(self, message: FinishAck) -> None:
        """Tell those who made the ends."""
        makers: defaultdict[Member, list[str]] = defaultdict(list)
        for request_id in message.request_ids:
            maker = self._ends.pop(request_id, None)
            if maker is not None:
                makers[maker].append(request_id)
        for maker, request_ids in makers.items():
            own = msgspec.structs.replace(message, request_ids=tuple(request_ids))
            self._handle(maker, own)

    # ----------------------------------------------------------------------------- ticks

    def _tick(self, now: float, tasks: asyncio.TaskGroup) -> None:
        for member in tuple(self._members.values()):
            if member.due_at <= now:
                self._take(member, member.turn(now))
            if member.left:
                del self._members[member.worker]
        for gateway in [g for g in self._tokens if g not in self._under_way]:
            self._under_way.add(gateway)
            tasks.create_task(self._send_tokens(gateway, self._tokens.pop(gateway)))
        if now - self._beats_at >= BEAT_S and self._beat_line.idle:
            self._beats_at = now
            self._say_beats()
            self._show_memory()

    def _take(self, member: Member, outgoing: Iterable[Outgoing]) -> None:
        """What a member wants to have sent."""
        for message in outgoing:
            match message:
                case TokenBatch():
                    self._tokens[message.gateway].append((member, message))
                    self._note_tokens(member, message)
                case SliceDone():
                    self._note_result(message)
                    self._line_of[member.worker].put_result(message)
                case WorkerBeat():
                    self._take_beat(member, message)

    def _take_beat(self, member: Member, beat: WorkerBeat) -> None:
        line = self._line_of[member.worker]
        if beat.residents_listed and not line.idle:
            line.put_beats(WorkerBeats(host=self._host, beats=(beat,)))
        else:
            self._beats[member.worker] = _newest(self._beats.get(member.worker), beat)

    def _say_beats(self) -> None:
        if self._beats:
            beats, self._beats = tuple(self._beats.values()), {}
            self._beat_line.put_beats(WorkerBeats(host=self._host, beats=beats))

    async def _send_tokens(self, gateway: str, waiting: list[tuple[Member, TokenBatch]]) -> None:
        """All members' tokens for one gateway, in one message."""
        together = TokenBatch(
            gateway=gateway,
            worker=self._host,
            epoch=max(batch.epoch for _, batch in waiting),
            runs=tuple(run for _, batch in waiting for run in batch.runs),
        )
        (address,) = addresses_of(together)
        error: BusError | None = None
        try:
            await self._bus.publish(
                address, together, deadline_s=TOKENS_DEADLINE_S, persistent=False
            )
        except BusError as failure:
            error = failure
            self._on_error("tokens_not_sent")
            self._log.warning("worker.tokens_not_sent", gateway=gateway, error=str(error))
        self._under_way.discard(gateway)
        unroutable = isinstance(error, Unroutable)
        for member, batch in waiting:
            sent = TokensSent(gateway) if error is None else TokensNotSent(batch, unroutable)
            self._handle(member, sent)

    # --------------------------------------------------------------------------- counting

    def _note_tokens(self, member: Member, batch: TokenBatch) -> None:
        for run in batch.runs:
            if run.finish_reason is not None:
                self._ends[run.request_id] = member
        while len(self._ends) > ENDS_MAX:
            self._ends.popitem(last=False)
        made = sum(count(run.ids) for run in batch.runs)
        self._metrics.output_tokens.labels(self._name).inc(made)

    def _on_began(self, began: BatchBegan) -> None:
        self._metrics.on_began(self._name, began)

    def _note_result(self, done: SliceDone) -> None:
        if done.refused:
            self._log.warning("worker.refused", batch_id=done.batch_id, reason=done.refused)
        if done.form == "leased" and not done.refused:
            self._metrics.on_leases(self._name, done)
        elif done.batch_id:
            self._metrics.on_slice(self._name, done)

    def _show_memory(self) -> None:
        """Of all members together."""
        memories = [member.memory for member in self._members.values()]
        if memories:
            summed = {
                name: sum(getattr(memory, name) for memory in memories)
                for name in memories[0].__struct_fields__
            }
            together = msgspec.structs.replace(memories[0], **summed)
            self._metrics.on_memory(self._name, together)

    def _on_error(self, kind: str) -> None:
        self._metrics.errors.labels(self._name, kind).inc()


def _newest(earlier: WorkerBeat | None, later: WorkerBeat) -> WorkerBeat:
    """The later beat, with the list of the earlier one if only that has one."""
    if earlier is None or later.residents_listed or not earlier.residents_listed:
        return later
    return msgspec.structs.replace(later, residents=earlier.residents, residents_listed=True)
