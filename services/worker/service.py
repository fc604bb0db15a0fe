"""The worker's shell: bus, engine thread, beats, telemetry around the pure core.

All events, from the bus, the engine and the clock, go through one queue and one task, so the core
sees them in one order; an error in it ends the service. Beats begin once the model is loaded.
"""

import asyncio
import time
from collections import deque

from services.worker.core.events import (
    BatchBegan,
    CancelRequest,
    Command,
    EngineStepped,
    Event,
    GiveBack,
    Leave,
    ParkLease,
    Reconnected,
    RenewLease,
    StartBatch,
    StopWanted,
    TokensNotSent,
    TokensSent,
)
from services.worker.core.worker import Worker
from services.worker.engines.registry import engine_maker
from services.worker.loop import EngineFailed, EngineReady, EngineThread, Report
from services.worker.metrics import WorkerMetrics
from services.worker.pretend_host import serve_many
from services.worker.scheduler_line import SchedulerLine
from services.worker.settings import WorkerSettings
from services.worker.spans import LeaseSpans, record_slice
from shared.bus.api import Bus, BusError, Delivery, Unroutable
from shared.bus.topology import SCHEDULER_QUEUE, addresses_of, said_rightly, worker_queue
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
)
from shared.telemetry.metrics import metrics_for
from shared.telemetry.ops import serve_ops
from shared.telemetry.setup import Telemetry

TOKENS_DEADLINE_S = 10.0
"""A token batch that is not confirmed by then is tried again, joined with newer tokens."""
SHOWN_EVERY_S = 0.25
"""Between two updates of the memory's gauges."""


class Misdirected(Exception):
    """A message that is none of a worker's; it becomes a dead letter."""


async def serve(
    settings: WorkerSettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
) -> None:
    """Load the model, serve until `stop` or `DrainWorker`, drain, return.

    Raises SetupError (the model or the engine cannot be had) and BusUnavailable.
    """
    make = engine_maker(settings.engine)
    if settings.pretend_workers:
        await serve_many(settings, bus, telemetry, stop)
        return
    shell = _Shell(settings, bus, telemetry)
    engine = EngineThread(lambda: make(settings), shell.report_from_thread)
    done = asyncio.Event()
    ops = asyncio.ensure_future(
        serve_ops(
            settings.ops_host, settings.ops_port, telemetry.registry, lambda: shell.ready, done
        )
    )
    try:
        engine.start()
        await shell.run(engine, stop)
    finally:
        done.set()
        try:
            await asyncio.to_thread(engine.close)
        finally:
            await ops


class _Shell:
    """One worker's life between start and stop."""

    def __init__(self, settings: WorkerSettings, bus: Bus, telemetry: Telemetry) -> None:
        self.ready = False
        self._settings = settings
        self._bus = bus
        self._telemetry = telemetry
        self._log = telemetry.log.bind(worker=settings.name)
        self._metrics = metrics_for(telemetry.registry, WorkerMetrics)
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event | EngineReady | EngineFailed] = deque()
        self._stirred = asyncio.Event()
        self._line = SchedulerLine(bus, telemetry.boot_id, self._log, self._on_error)
        self._batches: dict[str, tuple[RunSlice, float]] = {}
        """Open closed batches and the wall clock at their receipt, for spans."""
        self._shown_at = float("-inf")
        self._lease_spans = LeaseSpans(telemetry.tracer, settings.name)

    def report_from_thread(self, *reports: Report) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, *reports)
        except RuntimeError:
            return  # the event loop is closed: nobody listens any more

    async def run(self, engine: EngineThread, stop: asyncio.Event) -> None:
        """From loading to leaving."""
        stopping = asyncio.ensure_future(self._watch(stop))
        try:
            loaded = await self._wait_for_engine(stop)
            if loaded is None:
                return
            core = Worker(
                self._telemetry.boot_id,
                self._settings.name,
                loaded.info,
                loaded.memory,
                self._loop.time(),
            )
            await self._bus.declare(SCHEDULER_QUEUE)
            self._bus.on_reconnect(lambda: self._put(Reconnected()))
            subscription = await self._bus.consume(
                worker_queue(self._telemetry.boot_id), self._on_delivery
            )
            self._log.info("worker.ready", model=loaded.info.model, **loaded.info.details)
            self.ready = True
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(self._line.run())
                    await self._pump(core, engine, tasks)
                    await self._line.flush()
                    sending.cancel()
            finally:
                self.ready = False
                await subscription.close()
            self._log.info("worker.left")
        finally:
            stopping.cancel()

    async def _watch(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._put(StopWanted())

    async def _wait_for_engine(self, stop: asyncio.Event) -> EngineReady | None:
        """None if the worker is stopped before the model is loaded."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while self._events:
                event = self._events.popleft()
                match event:
                    case EngineReady():
                        return None if stop.is_set() else event
                    case EngineFailed():
                        raise event.error
                    case _:
                        return None

    # ------------------------------------------------------------------------- events in

    def _put(self, *events: Event | Report) -> None:
        self._events.extend(events)
        self._stirred.set()

    async def _on_delivery(self, delivery: Delivery) -> None:
        message = delivery.message if said_rightly(delivery) else None
        match message:
            case SchedulerBeat() | FinishAck():
                self._put(message)
            case RunSlice() | Park() | Drop() | SendTokens() | DrainWorker() if (
                message.worker == self._telemetry.boot_id
            ):
                self._put(message)
            case _:
                self._on_error("misdirected")
                what = type(delivery.message).__name__
                raise Misdirected(
                    f"{what} is nothing for this worker, or not from {delivery.exchange}"
                )

    async def _pump(self, core: Worker, engine: EngineThread, tasks: asyncio.TaskGroup) -> None:
        """Every event into the core, every command out, until the core leaves."""
        while (deadline := core.deadline()) is not None:
            timer = self._loop.call_at(deadline, self._stirred.set)
            await self._stirred.wait()
            timer.cancel()
            self._stirred.clear()
            while self._events:
                event = self._events.popleft()
                if isinstance(event, EngineFailed):
                    raise event.error
                if isinstance(event, EngineReady):
                    continue
                if isinstance(event, EngineStepped):
                    self._metrics.on_step(self._settings.name, event.report)
                elif isinstance(event, BatchBegan):
                    self._metrics.on_began(self._settings.name, event)
                self._perform(core.handle(event, self._loop.time()), engine, tasks)
            now = self._loop.time()
            self._perform(core.wake(now), engine, tasks)
            if now >= self._shown_at + SHOWN_EVERY_S:
                self._shown_at = now
                self._metrics.on_memory(self._settings.name, core.memory)

    # ----------------------------------------------------------------------- commands out

    def _perform(
        self, commands: list[Command], engine: EngineThread, tasks: asyncio.TaskGroup
    ) -> None:
        for command in commands:
            match command:
                case StartBatch():
                    if command.order.form == "leased":
                        self._lease_spans.began(command.order, time.time())
                    else:
                        self._batches[command.order.batch_id] = (command.order, time.time())
                    engine.submit(command.order)
                case RenewLease():
                    engine.renew(command.request_id, command.attempt, command.until)
                case ParkLease():
                    engine.park(command.request_id, command.attempt)
                case CancelRequest():
                    self._lease_spans.forget(command.request_id)
                    engine.cancel(command.request_id, command.attempt)
                case GiveBack():
                    engine.give_back(command.reason)
                case TokenBatch():
                    tasks.create_task(self._send_tokens(command))
                case SliceDone():
                    self._account(command)
                    self._line.put_result(command)
                case WorkerBeat():
                    self._line.put_beat(command)
                case Leave():
                    pass

    async def _send_tokens(self, batch: TokenBatch) -> None:
        """At most one per gateway at a time; the core sees to that."""
        (address,) = addresses_of(batch)
        try:
            await self._bus.publish(address, batch, deadline_s=TOKENS_DEADLINE_S, persistent=False)
        except BusError as error:
            self._on_error("tokens_not_sent")
            self._log.warning(
                "worker.tokens_not_sent",
                gateway=batch.gateway,
                request_ids=[run.request_id for run in batch.runs],
                error=str(error),
            )
            self._put(TokensNotSent(batch, unroutable=isinstance(error, Unroutable)))
        else:
            self._put(TokensSent(batch.gateway))

    def _account(self, done: SliceDone) -> None:
        """Metrics, spans and the log line of what ended."""
        if done.refused:
            self._log.warning("worker.refused", batch_id=done.batch_id, reason=done.refused)
            self._lease_spans.refused(done.batch_id)
        if done.form == "leased" and not done.refused:
            self._metrics.on_leases(self._settings.name, done)
            self._lease_spans.told(done, time.time())
            return
        if done.batch_id:
            self._metrics.on_slice(self._settings.name, done)
        batch = self._batches.pop(done.batch_id, None)
        if batch is not None and not done.refused:
            order, received_s = batch
            record_slice(self._telemetry.tracer, self._settings.name, order, done, received_s)

    def _on_error(self, kind: str) -> None:
        self._metrics.errors.labels(self._settings.name, kind).inc()
