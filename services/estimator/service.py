"""The estimator's shell: reports in, database, forecasts out.

A report is settled after its commit, so that a killed estimator loses none. If the database fails,
the report is tried again for a while and then given back to the broker; forecasts go on from what
is in memory. Consumers: reports, and the scheduler's beats. Tasks: forecasts, and operations.
"""

import asyncio
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from opentelemetry.trace import SpanKind
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
)

from services.estimator.core.history import History, fault_of
from services.estimator.database import Database, is_damage
from services.estimator.metrics import EstimatorMetrics
from services.estimator.predictor import PredictorThread, load
from services.estimator.settings import EstimatorSettings
from shared.bus.api import Bus, BusError, Delivery
from shared.bus.topology import ESTIMATOR_QUEUE, HISTORY, estimator_beat_queue, from_estimator
from shared.config import SetupError
from shared.messages import Finished, LengthPredicted, PredictionWanted, SchedulerBeat
from shared.telemetry.attributes import messaging_attributes
from shared.telemetry.logs import bind_request
from shared.telemetry.metrics import metrics_for
from shared.telemetry.ops import serve_ops
from shared.telemetry.setup import Telemetry
from shared.telemetry.tracing import TRACEPARENT, record_span

RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
ANSWER_DEADLINE_S = 1.0
ANSWERS_MAX = 1_024
"""Predictions that wait to be sent; more are not."""
PUBLISH_DEADLINE_S = 5.0
"""A forecast is repeated anyway; an older one is not worth a longer wait."""


async def serve(
    settings: EstimatorSettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
) -> None:
    """Serve until `stop` is set. Raises SetupError for a database that cannot be used,
    BusUnavailable."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="history") as thread:
        database = await Database.open(settings, thread)
        try:
            await Estimator(settings, bus, telemetry, database).run(stop)
        finally:
            await database.close()


class Estimator:
    """One run of the service."""

    def __init__(
        self, settings: EstimatorSettings, bus: Bus, telemetry: Telemetry, database: Database
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._telemetry = telemetry
        self._log = telemetry.log
        self._database = database
        self._metrics = metrics_for(telemetry.registry, EstimatorMetrics)
        # Versions must rise over restarts too, and over a history that was lost: count on from
        # the clock, in microseconds, which no rate of requests can overtake.
        self._history = History(settings.window, version=int(time.time() * 1e6))
        self._predictor = self._make_predictor()
        self._epoch = 0
        self._published_version = 0
        self._answers: asyncio.Queue[LengthPredicted] = asyncio.Queue(ANSWERS_MAX)
        self._news = asyncio.Event()
        """Something to show or to say."""
        self._urgent = asyncio.Event()
        """Say it now, changed or not."""
        self._stopping = threading.Event()
        self._serving = False
        self._unheard = False

    def _make_predictor(self) -> PredictorThread | None:
        """Raises SetupError."""
        settings = self._settings
        if not settings.predictor:
            return None
        return PredictorThread(
            load(settings.predictor), settings.predictor_timeout_s, self._on_prediction
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Load, consume, publish; drain once `stop` is set."""
        await self._load()
        self._loop = asyncio.get_running_loop()
        if self._predictor is not None:
            self._predictor.start()
        self._bus.on_reconnect(self._speak_now)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._serve_ops(stop), name="ops")
            answering = tasks.create_task(self._answer_forever(), name="predictions")
            reports = await self._bus.consume(ESTIMATOR_QUEUE, self._on_report)
            beat_queue = estimator_beat_queue(self._telemetry.boot_id)
            beats = await self._bus.consume(beat_queue, self._on_beat)
            forecasting = tasks.create_task(self._forecast_forever(), name="forecasts")
            self._serving = True
            self._log.info("estimator.ready", database=self._settings.database_path())
            await stop.wait()
            self._serving = False
            self._stopping.set()
            await beats.close()
            await reports.close()
            forecasting.cancel()
            answering.cancel()
            if self._predictor is not None:
                self._predictor.stop()

    async def _load(self) -> None:
        """The history as it was. Raises sqlite3.Error."""
        for path in self._database.moved:
            self._metrics.damaged.inc()
            self._log.error("estimator.database_damaged", moved_to=path)
        rows, totals = await self._database.load(self._settings.window)
        self._history.restore(rows, totals)
        self._speak_now()
        self._log.info("estimator.loaded", requests=len(rows), models=len(self._history.models()))

    async def _serve_ops(self, stop: asyncio.Event) -> None:
        settings = self._settings

        def ready() -> bool:
            return self._serving and self._bus.connected

        await serve_ops(settings.ops_host, settings.ops_port, self._telemetry.registry, ready, stop)

    # ------------------------------------------------------------------------------------ reports

    async def _on_report(self, delivery: Delivery) -> None:
        """Store one report; return when it is durable. Raises sqlite3.Error to give it back."""
        finished = delivery.message
        if not isinstance(finished, Finished):
            self._refuse(delivery, "not a report of a finished request")
            return
        fault = fault_of(finished)
        if fault:
            self._refuse(delivery, fault)
            return
        is_new = not self._history.knows(finished.request_id) and await self._store(finished)
        if is_new and self._history.add(finished):
            self._metrics.finished.labels(finished.reason).inc()
            if self._predictor is not None:
                self._predictor.learn(finished)
            self._news.set()
        else:
            self._metrics.repeated.inc()
        self._record(delivery)

    async def _store(self, finished: Finished) -> bool:
        """Store durably, with patience; False if it was stored before. Raises sqlite3.Error."""
        patience = stop_after_delay(self._settings.store_patience_s)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(sqlite3.Error),
            stop=patience | stop_when_event_set(self._stopping),
            wait=wait_exponential(multiplier=RETRY_MIN_S, max=RETRY_MAX_S),
            reraise=True,
        )
        return await retrying(self._store_once, finished)

    async def _store_once(self, finished: Finished) -> bool:
        started = time.perf_counter()
        try:
            is_new = await self._database.add(finished)
        except sqlite3.Error as error:
            self._metrics.store_errors.inc()
            log = bind_request(self._log, finished.request_id)
            log.warning("estimator.store_failed", error=str(error))
            if is_damage(error):
                await self._replace_database()
            raise
        self._metrics.store_seconds.observe(time.perf_counter() - started)
        return is_new

    async def _replace_database(self) -> None:
        """Move the damaged file aside and begin a new one with what is in memory."""
        try:
            moved = await self._database.reopen(self._history.rows())
        except (sqlite3.Error, SetupError) as error:
            self._metrics.store_errors.inc()
            self._log.error("estimator.database_lost", error=str(error))
            return
        if moved:
            self._metrics.damaged.inc()
            self._log.error("estimator.database_damaged", moved_to=moved)

    def _refuse(self, delivery: Delivery, fault: str) -> None:
        self._metrics.refused.inc()
        request_id = getattr(delivery.message, "request_id", "")
        log = bind_request(self._log, request_id, delivery.headers.get(TRACEPARENT, ""))
        log.warning("estimator.refused", fault=fault, message=type(delivery.message).__name__)

    def _record(self, delivery: Delivery) -> None:
        record_span(
            self._telemetry.tracer,
            "estimator.store",
            start_s=delivery.received_at,
            end_s=time.time(),
            parent=delivery.headers.get(TRACEPARENT, ""),
            attributes=messaging_attributes(
                "process",
                queue=ESTIMATOR_QUEUE.name,
                exchange=HISTORY,
                routing_key=delivery.routing_key,
            ),
            kind=SpanKind.CONSUMER,
        )

    # ---------------------------------------------------------------------------------- forecasts

    async def _on_beat(self, delivery: Delivery) -> None:
        """A scheduler took over: it knows nothing yet; or it asks for a prediction."""
        beat = delivery.message
        if isinstance(beat, PredictionWanted):
            if self._predictor is not None:
                self._predictor.ask(beat, delivery.queue_wait_s)
            return
        if isinstance(beat, SchedulerBeat) and beat.epoch > self._epoch:
            self._epoch = beat.epoch
            self._log.info("estimator.new_epoch", epoch=beat.epoch)
            self._speak_now()

    def _on_prediction(self, wanted: PredictionWanted, output_tokens: int) -> None:
        """In the predictor's thread."""
        answer = LengthPredicted(request_id=wanted.request_id, output_tokens=output_tokens)
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._offer, answer)

    def _offer(self, answer: LengthPredicted) -> None:
        with suppress(asyncio.QueueFull):
            self._answers.put_nowait(answer)

    async def _answer_forever(self) -> None:
        """Send predictions; one that does not go out is not worth another try."""
        address = from_estimator(self._telemetry.boot_id)
        while True:
            answer = await self._answers.get()
            with suppress(BusError):
                await self._bus.publish(
                    address, answer, deadline_s=ANSWER_DEADLINE_S, persistent=False
                )

    def _speak_now(self) -> None:
        self._urgent.set()
        self._news.set()

    async def _forecast_forever(self) -> None:
        """Publish after changes, `forecast_interval_s` apart, and at once when it is urgent."""
        while True:
            await self._news.wait()
            is_urgent = self._urgent.is_set()
            self._news.clear()
            self._urgent.clear()
            self._metrics.show(self._history)
            if self._predictor is not None:
                self._metrics.show_predictor(self._predictor.counts)
                if self._predictor.error:
                    self._log.warning("estimator.predictor_failed", error=self._predictor.error)
                    self._predictor.error = ""
            if is_urgent or self._history.version != self._published_version:
                await self._publish()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.forecast_interval_s):
                    await self._urgent.wait()

    async def _publish(self) -> None:
        """Send the forecast; if nobody takes it, the next turn tries again."""
        predictor = self._predictor
        predicts = predictor is not None and not predictor.hangs
        forecast = self._history.forecast(predicts=predicts)
        address = from_estimator(self._telemetry.boot_id)
        try:
            await self._bus.publish(
                address, forecast, deadline_s=PUBLISH_DEADLINE_S, persistent=False
            )
        except BusError as error:
            self._metrics.forecasts.labels("failed").inc()
            self._published_version = 0
            self._news.set()
            if not self._unheard:  # said once, counted always
                self._log.info("estimator.forecast_unheard", error=str(error))
            self._unheard = True
            return
        self._metrics.forecasts.labels("sent").inc()
        self._published_version = forecast.version
        self._unheard = False
