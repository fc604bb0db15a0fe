"""The scheduler's shell: the inbox, one timer, the outbox, journal and telemetry around the core.

The inbox has a single active consumer. The first delivery says that we are it: the epoch is raised
and a new core elected. When the connection was lost, or the core failed, the leadership ends; if
deliveries come again, a new one begins and learns everything anew from gateways and workers.
"""

import asyncio
import time
from pathlib import Path

from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from services.scheduler.core import replay
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.garbage import spare_full_collections
from services.scheduler.journal import Journal
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.outbox import Outbox
from services.scheduler.settings import SchedulerSettings
from services.scheduler.spans import (
    record_dispatch,
    record_parked,
    record_refused,
    record_request_queue,
)
from shared.bus.api import Bus, BusError, BusUnavailable, Delivery, Unroutable
from shared.bus.topology import ESTIMATOR_QUEUE, SCHEDULER_QUEUE, hosted_by
from shared.messages import (
    Accepted,
    AnyMessage,
    Cancel,
    DrainWorker,
    Drop,
    Elected,
    GatewayBeat,
    OrderReturned,
    Park,
    Reading,
    Recall,
    Rejected,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SendTokens,
    SliceDone,
    Stopped,
    Submit,
    TokensWanted,
    ToScheduler,
    WorkerBeat,
    WorkerBeats,
)
from shared.telemetry.metrics import metrics_for
from shared.telemetry.ops import serve_ops
from shared.telemetry.setup import Telemetry

ELECTION_S = 60.0
"""Then the delivery that would elect us goes back to the queue."""
FLUSH_S = 5.0
"""At the stop: how long the outbox may take to empty."""
FULL_PAUSE_S = 0.1
"""While the outbox is full, the timer rests so long."""


class Misdirected(Exception):
    """A message that is none of a scheduler's; it becomes a dead letter."""


async def serve(
    settings: SchedulerSettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
) -> None:
    """Stand by, lead when it is our turn, until `stop`.

    Raises BusUnavailable if the inbox cannot be read, and OSError for a journal or port that
    cannot be had.
    """
    journal = None
    if settings.journal:
        journal = Journal(Path(settings.journal), settings.journal_bytes_max)
    done = asyncio.Event()
    spare_full_collections()
    try:
        async with asyncio.TaskGroup() as tasks:
            shell = _Shell(settings, bus, telemetry, tasks, journal)
            ops = serve_ops(
                settings.ops_host, settings.ops_port, telemetry.registry, shell.ready, done
            )
            tasks.create_task(ops, name="ops")
            timer = tasks.create_task(shell.keep_time(), name="timer")
            try:
                await shell.run(stop)
            finally:
                timer.cancel()
                done.set()
    finally:
        if journal is not None:
            journal.close()


class _Shell:
    """One scheduler process."""

    def __init__(
        self,
        settings: SchedulerSettings,
        bus: Bus,
        telemetry: Telemetry,
        tasks: asyncio.TaskGroup,
        journal: Journal | None,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._log = telemetry.log
        self._tracer = telemetry.tracer
        self._metrics = metrics_for(telemetry.registry, SchedulerMetrics)
        self._outbox = Outbox(bus, tasks, self._on_unsent)
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._core: Scheduler | None = None
        self._leadership = 0
        """Counts resignations, to notice one that happened during an election."""
        self._reading = False
        self._stirred = asyncio.Event()
        self._workers_lost = 0
        self._compared = 0
        self._advice = ""

    def ready(self) -> bool:
        """Leading, or able to take over."""
        return self._reading and self._bus.connected

    async def run(self, stop: asyncio.Event) -> None:
        """Read the inbox until `stop`."""
        self._bus.on_reconnect(lambda: self._resign("the connection was lost"))
        await self._bus.declare(ESTIMATOR_QUEUE)
        subscription = await self._bus.consume(SCHEDULER_QUEUE, self._on_delivery)
        self._reading = True
        self._log.info("scheduler.reading", policy=self._settings.policy)
        try:
            await stop.wait()
        finally:
            self._reading = False
            await subscription.close()
            self._core = None
            await self._flush()

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._outbox.drained()
        except TimeoutError:
            self._log.warning("scheduler.unsent", messages=self._outbox.waiting)
            self._outbox.clear()

    async def keep_time(self) -> None:
        """Wake the core at its deadline; ends by being cancelled."""
        while True:
            self._stirred.clear()
            core = self._core
            deadline = None if core is None else core.deadline()
            if core is not None and deadline is not None and deadline <= self._loop.time():
                if self._outbox.full:
                    await asyncio.sleep(FULL_PAUSE_S)
                else:
                    self._ask(core, None)
                    await asyncio.sleep(0)
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    await self._stirred.wait()
            except TimeoutError:
                continue

    async def _on_delivery(self, delivery: Delivery) -> None:
        """One message of the inbox. Raises Misdirected, and BusError if no election succeeds."""
        await self._outbox.wait_for_room()
        core = self._core or await self._elect()
        message = delivery.message
        if not isinstance(message, ToScheduler):
            raise Misdirected(f"{type(message).__name__} on {delivery.routing_key}")
        expected = _sender(message)
        if not _came_as(delivery.routing_key, expected):
            self._count("sender")
            self._log.warning(
                "scheduler.wrong_sender",
                message=type(message).__name__,
                says=expected,
                came_as=delivery.routing_key,
                request_id=_request_id(message),
            )
            return
        if isinstance(message, Submit):
            self._metrics.request_queue.observe(delivery.queue_wait_s)
            record_request_queue(self._tracer, message, delivery)
        elif isinstance(message, SliceDone):
            self._metrics.on_slice_done(message)
        self._ask(core, message)

    async def _elect(self) -> Scheduler:
        """We are the active consumer: take an epoch of our own and begin anew."""
        leadership = self._leadership
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(BusUnavailable),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            stop=stop_after_delay(ELECTION_S),
            reraise=True,
        )
        epoch: int = await retrying(self._bus.raise_epoch)
        if leadership != self._leadership:
            raise BusUnavailable("the connection was lost during the election")
        settings = self._settings
        core = Scheduler(settings.preset(), settings.constants())
        self._core = core
        self._workers_lost = self._compared = 0
        self._record(replay.started(settings.policy, settings.constants()))
        self._metrics.elected()
        self._log.info("scheduler.elected", epoch=epoch)
        self._ask(core, Elected(epoch=epoch))
        return core

    def _record(self, record: replay.Started | replay.Step) -> None:
        """Into the journal, if there is one; that it ends is said once."""
        journal = self._journal
        if journal is None or journal.error:
            return
        journal.record(record)
        if journal.error:
            self._count("journal")
            self._log.error(
                "scheduler.journal_ended", file=self._settings.journal, error=journal.error
            )

    def _resign(self, why: str) -> None:
        """What we know may be out of date; another may lead by now."""
        self._leadership += 1
        if self._core is None:
            return
        self._log.warning("scheduler.resigned", why=why, epoch=self._core.books.epoch)
        self._core = None
        self._outbox.clear()
        self._metrics.deposed()
        self._stirred.set()

    def _ask(self, core: Scheduler, event: SchedulerEvent | None) -> None:
        """One call of the core. A core that fails is not trusted any more: we resign, and the next
        delivery elects a new one. The message comes back, and is a dead letter at last."""
        if core is not self._core:
            return
        decided_s = time.time()
        now = self._loop.time()
        began = time.perf_counter()
        try:
            commands = core.wake(now) if event is None else core.handle(event, now)
        except Exception:
            self._count("core")
            self._log.exception(
                "scheduler.core_failed",
                message=type(event).__name__,
                request_id=_request_id(event),
            )
            self._resign("the core failed")
            if event is not None:
                raise
            return
        self._metrics.decision.observe(time.perf_counter() - began)
        if self._journal is not None:
            self._record(replay.Step(now=now, event=event, commands=tuple(commands)))
        for command in commands:
            if isinstance(event, Submit) and isinstance(command, Rejected):
                record_refused(self._tracer, event, command, decided_s)
            self._send(core, command, decided_s)
        self._notice(core)
        self._stirred.set()

    def _send(self, core: Scheduler, command: SchedulerCommand, decided_s: float) -> None:
        self._metrics.on_command(command)
        headers: dict[str, str] = {}
        if isinstance(command, RunSlice):
            worker = core.books.workers.active.get(command.worker)
            name = worker.info.name if worker else command.worker
            headers = record_dispatch(self._tracer, command, name, decided_s, time.time())
        elif isinstance(command, SchedulerBeat):
            workers = core.books.workers.active.values()
            model = next((worker.info.model for worker in workers), "")
            self._metrics.on_beat(command, model)
            self._metrics.outbox.set(self._outbox.waiting)
        elif isinstance(command, Park):
            parked = core.books.requests.open.get(command.request_id)
            if parked is not None:
                name = core.books.workers.active[command.worker].info.name
                record_parked(self._tracer, parked.spec.trace, command, name, decided_s)
        elif isinstance(command, Rejected):
            self._log.info(
                "scheduler.rejected",
                request_id=command.request_id,
                reason=command.reason,
                detail=command.detail,
            )
        self._outbox.put(command, headers)

    def _notice(self, core: Scheduler) -> None:
        """Say aloud what the core only counts."""
        lost = core.books.workers_lost
        if lost > self._workers_lost:
            self._metrics.workers_lost.inc(lost - self._workers_lost)
            self._log.warning("scheduler.worker_lost", workers=len(core.books.workers.active))
        self._workers_lost = lost
        self._compared = self._metrics.on_misses(core.books.promises, self._compared)
        self._metrics.on_books(core.books)
        if core.advice != self._advice:
            self._advice = core.advice
            if self._advice:
                self._log.error("scheduler.no_fitting_worker", advice=self._advice)

    def _on_unsent(self, command: SchedulerCommand, error: BusError) -> None:
        """A command did not reach its receiver's queue."""
        self._count(type(error).__name__)
        self._log.warning(
            "scheduler.unsent_command",
            command=type(command).__name__,
            request_id=_request_id(command),
            error=str(error),
        )
        core = self._core
        to_worker = RunSlice | Park | Drop | SendTokens | DrainWorker
        if core is None or not isinstance(command, to_worker):
            return
        gone = isinstance(error, Unroutable) or isinstance(command, RunSlice)
        if gone and command.epoch == core.books.epoch:
            self._ask(core, OrderReturned(worker=command.worker))

    def _count(self, kind: str) -> None:
        self._metrics.errors.labels(kind).inc()


def _sender(message: AnyMessage) -> str:
    """The routing key that this message has to come under; of an estimator's, the beginning."""
    match message:
        case Submit() | Resume():
            return f"gateway.{message.spec.gateway}"
        case Cancel() | Stopped() | TokensWanted() | Reading() | GatewayBeat():
            return f"gateway.{message.gateway}"
        case SliceDone():
            return f"worker.{message.worker}"
        case WorkerBeat():
            return f"worker.{message.info.worker}"
        case WorkerBeats():
            own = all(hosted_by(message.host, beat.info.worker) for beat in message.beats)
            return f"worker.{message.host}" if own else "worker"  # under which nothing comes
        case _:
            return "estimator."


def _came_as(routing_key: str, expected: str) -> bool:
    if expected.endswith("."):
        return routing_key.startswith(expected)
    return routing_key == expected


def _request_id(message: AnyMessage | None) -> str:
    """For the log."""
    match message:
        case Submit() | Resume():
            return message.spec.request_id
        case Cancel() | Stopped() | TokensWanted() | Reading() | Recall() | Accepted() | Rejected():
            return message.request_id
        case Park() | Drop() | SendTokens():
            return message.request_id
        case _:
            return ""
