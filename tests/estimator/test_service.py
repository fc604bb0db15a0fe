"""The estimator over a memory bus and real SQLite files: reports in, forecasts out, faults."""

import asyncio
import contextlib
import resource
import socket
import sqlite3
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared.bus.api import Address, Delivery
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.topology import HISTORY, INBOX, SCHEDULER_QUEUE, addresses_of
from shared.messages import (
    Finished,
    LengthForecast,
    LengthPredicted,
    PredictionWanted,
    SchedulerBeat,
    encode,
)
from shared.telemetry import setup
from shared.telemetry.logs import reset_logs
from shared.telemetry.metered_bus import MeteredBus
from shared.telemetry.tracing import headers_for
from shared.tokens import unpack
from tests.estimator.reports import report
from tests.telemetry.otlp_receiver import OtlpReceiver

INTERVAL_S = 0.02
TRACE = f"00-{'4' * 32}-{'7' * 16}-01"
DEAD = "tranche_bus_handler_errors_total"


class Mesh:
    """A broker, a scheduler that only listens, and estimators on one database."""

    def __init__(self, database: Path) -> None:
        self.broker = MemoryBroker()
        self.scheduler = MemoryBus(self.broker)
        self.database = database
        self.forecasts: list[LengthForecast] = []
        self.predictions: list[LengthPredicted] = []

    async def open(self) -> None:
        await self.scheduler.open()
        await self.scheduler.consume(SCHEDULER_QUEUE, self._on_message)

    async def _on_message(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, LengthPredicted):
            self.predictions.append(delivery.message)
            return
        assert isinstance(delivery.message, LengthForecast)
        self.forecasts.append(delivery.message)

    async def tell(
        self, *messages: Finished | SchedulerBeat | PredictionWanted, trace: str = ""
    ) -> None:
        for message in messages:
            address = addresses_of(message)[-1]  # a beat's last address is the estimator's
            await self.scheduler.publish(address, message, headers_for(trace))

    @contextlib.asynccontextmanager
    async def estimator(self, **settings: Any) -> AsyncIterator["Running"]:
        """One run of the service."""
        values = {
            "database": str(self.database),
            "forecast_interval_s": INTERVAL_S,
            "store_patience_s": 0.0,
            **settings,
        }
        running = Running(self.broker, EstimatorSettings(**values))
        async with running.run():
            await reached(lambda: "tranche.estimator" in self.broker.depths())
            yield running

    @property
    def lengths(self) -> list[int]:
        """Of the latest forecast."""
        classes = self.forecasts[-1].classes if self.forecasts else ()
        return [length for known in classes for length in unpack(known.lengths)]


class Running:
    """A served estimator and its numbers."""

    def __init__(self, broker: MemoryBroker, settings: EstimatorSettings) -> None:
        self.settings = settings
        self.registry = CollectorRegistry()
        self.bus = MeteredBus(MemoryBus(broker), self.registry, "estimator")
        self.stop = asyncio.Event()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        telemetry = setup.start(self.settings, "estimator-1", self.registry)
        await self.bus.open()
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(self.settings, self.bus, telemetry, self.stop))
            yield
            self.stop.set()
        await self.bus.close()
        await asyncio.to_thread(setup.stop, telemetry)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tranche_{name}", labels) or 0.0


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path / "history.sqlite")
    await mesh.open()
    yield mesh
    await mesh.scheduler.close()
    reset_logs()


async def reached(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def test_reports_become_a_forecast_and_survive_a_restart(mesh: Mesh) -> None:
    async with mesh.estimator():
        await mesh.tell(report(1, 30), report(2, 100, reason="length"))
        await mesh.tell(report(3, reason="cancelled"), report(4, 20))
        await reached(lambda: mesh.lengths == [30, 100, 20])
    first = mesh.forecasts[-1]
    assert first.classes[0].censored == bytes([0, 1, 0])
    assert first.classes[0].finished == 3
    mesh.forecasts.clear()
    async with mesh.estimator() as running:
        await reached(lambda: mesh.lengths == [30, 100, 20])
        assert mesh.forecasts[-1].version > first.version
        assert mesh.forecasts[-1].classes == first.classes
        await mesh.tell(report(2, 100, reason="length"), report(5, 40))
        await reached(lambda: mesh.lengths == [30, 100, 20, 40])
        assert running.value("estimator_repeated_requests_total") == 1
    versions = [forecast.version for forecast in mesh.forecasts]
    assert versions == sorted(versions)


async def test_reports_wait_in_the_queue_while_the_estimator_is_away(mesh: Mesh) -> None:
    async with mesh.estimator():
        await reached(lambda: len(mesh.forecasts) > 0)
    await mesh.tell(report(1, 30))
    async with mesh.estimator():
        await reached(lambda: mesh.lengths == [30])


async def test_a_repeat_counts_once(mesh: Mesh) -> None:
    async with mesh.estimator() as running:
        await mesh.tell(report(1, 30), report(1, 30), report(1, 31), report(2, 40))
        await reached(lambda: mesh.lengths == [30, 40])
        assert running.value("estimator_repeated_requests_total") == 2
        assert running.value("estimator_finished_requests_total", reason="stop") == 2


async def test_the_window_forgets_also_over_a_restart(mesh: Mesh) -> None:
    async with mesh.estimator(window=3):
        await mesh.tell(*(report(number, number) for number in range(1, 8)))
        await reached(lambda: mesh.lengths == [5, 6, 7])
        assert mesh.forecasts[-1].classes[0].finished == 7
    mesh.forecasts.clear()
    async with mesh.estimator(window=2):
        await reached(lambda: mesh.lengths == [6, 7])
        assert mesh.forecasts[-1].classes[0].finished == 7


async def test_a_new_epoch_gets_a_forecast_at_once_and_an_old_one_none(mesh: Mesh) -> None:
    async with mesh.estimator(forecast_interval_s=60.0) as running:
        await reached(lambda: len(mesh.forecasts) == 1)
        await mesh.tell(report(1, 30), report(2, 40))  # the next turn is a minute away
        finished = "estimator_finished_requests_total"
        await reached(lambda: running.value(finished, reason="stop") == 2)
        assert len(mesh.forecasts) == 1
        await mesh.tell(SchedulerBeat(epoch=5))
        await reached(lambda: mesh.lengths == [30, 40])
        assert len(mesh.forecasts) == 2
        await mesh.tell(SchedulerBeat(epoch=5), SchedulerBeat(epoch=4), SchedulerBeat(epoch=6))
        await reached(lambda: len(mesh.forecasts) == 3)
        await asyncio.sleep(0)
        assert mesh.broker.depths()["tranche.scheduler"] == 0
    assert len(mesh.forecasts) == 3


async def test_forecasts_are_an_interval_apart(mesh: Mesh) -> None:
    async with mesh.estimator(forecast_interval_s=0.2):
        began = time.monotonic()
        for number in range(200):
            await mesh.tell(report(number, number))
        await reached(lambda: len(mesh.lengths) == 200)
        elapsed = time.monotonic() - began
    assert len(mesh.forecasts) <= 2 + elapsed / 0.2


async def test_without_a_scheduler_the_forecast_waits_for_one(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path / "history.sqlite")
    await mesh.scheduler.open()
    async with mesh.estimator() as running:
        await reached(lambda: "tranche.estimator" in mesh.broker.depths())
        await mesh.tell(report(1, 30))
        await reached(lambda: running.value("estimator_forecasts_total", result="failed") >= 2)
        await mesh.open()
        await reached(lambda: mesh.lengths == [30])
    await mesh.scheduler.close()


async def test_nonsense_is_refused_counted_and_stops_nothing(mesh: Mesh) -> None:
    async with mesh.estimator() as running:
        await reached(lambda: len(mesh.forecasts) > 0)
        await mesh.tell(report(1, -1), report(2, 2**40), report(3, model=""))
        stray = Address(HISTORY, "finished")
        mesh.broker.publish_bytes(stray, encode(SchedulerBeat(epoch=9)))
        mesh.broker.publish_bytes(stray, b"\xc1garbage")
        await mesh.tell(report(4, 30))
        await reached(lambda: mesh.lengths == [30])
        assert running.value("estimator_refused_requests_total") == 4
        assert [dead.queue for dead in mesh.broker.dead_letters] == ["tranche.estimator"]


async def test_a_locked_database_delays_and_loses_nothing(mesh: Mesh) -> None:
    async with mesh.estimator(store_patience_s=20.0) as running:
        await mesh.tell(report(1, 30))
        await reached(lambda: mesh.lengths == [30])
        with contextlib.closing(sqlite3.connect(mesh.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await mesh.tell(report(2, 40))
            await reached(lambda: running.value("estimator_store_errors_total") >= 1)
            count = len(mesh.forecasts)
            await mesh.tell(SchedulerBeat(epoch=3))
            await reached(lambda: len(mesh.forecasts) > count)
            assert mesh.lengths == [30]
        await reached(lambda: mesh.lengths == [30, 40])
        assert (
            running.value(
                "bus_handler_errors_total",
                service="estimator",
                queue="tranche.estimator",
                message="Finished",
            )
            == 0
        )


@contextlib.contextmanager
def full_disk(file: Path) -> Iterator[None]:
    """No file of this process may grow beyond that one's size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_gives_reports_back_and_forecasts_go_on(mesh: Mesh) -> None:
    async with mesh.estimator() as running:
        await mesh.tell(report(1, 30))
        await reached(lambda: mesh.lengths == [30])
        with full_disk(mesh.database.with_name("history.sqlite-wal")):
            await mesh.tell(report(2, 40))
            await reached(lambda: len(mesh.broker.dead_letters) == 1)
            count = len(mesh.forecasts)
            await mesh.tell(SchedulerBeat(epoch=3))
            await reached(lambda: len(mesh.forecasts) > count)
        assert running.value("estimator_store_errors_total") == 5
        await mesh.tell(report(3, 50))
        await reached(lambda: mesh.lengths == [30, 50])


async def test_a_database_damaged_at_the_start_is_moved_aside(mesh: Mesh) -> None:
    mesh.database.write_bytes(b"no database" * 1000)
    async with mesh.estimator() as running:
        await mesh.tell(report(1, 30))
        await reached(lambda: mesh.lengths == [30])
        assert running.value("estimator_damaged_databases_total") == 1
    assert len(list(mesh.database.parent.glob("history.sqlite.corrupt-*"))) == 1


async def test_a_database_damaged_while_serving_is_replaced_from_memory(mesh: Mesh) -> None:
    async with mesh.estimator(store_patience_s=20.0) as running:
        await mesh.tell(*(report(number, number) for number in range(1, 51)))
        await reached(lambda: len(mesh.lengths) == 50)
        with contextlib.closing(sqlite3.connect(mesh.database, isolation_level=None)) as other:
            other.execute("UPDATE finished SET stored_at = 0")  # the service's page cache is stale
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with mesh.database.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (mesh.database.stat().st_size - 4096))
        for number in range(51, 400):
            await mesh.tell(report(number, number))
        await reached(lambda: len(mesh.lengths) == 399)
        assert running.value("estimator_damaged_databases_total") == 1
    assert len(list(mesh.database.parent.glob("history.sqlite.corrupt-*"))) >= 1
    mesh.forecasts.clear()
    async with mesh.estimator():
        await reached(lambda: len(mesh.lengths) == 399)


async def test_metrics_health_and_readiness(mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    async with mesh.estimator(ops_port=port) as running:
        reasons = ["stop"] * 5 + ["length"] * 4 + ["error"]
        await mesh.tell(*(report(n, 10 * n, reason=why) for n, why in enumerate(reasons, 1)))
        await reached(lambda: len(mesh.lengths) == 9)
        text = await asyncio.to_thread(get, "/metrics")
        for line in (
            'tranche_estimator_history_requests{model="demo"} 9.0',
            'tranche_estimator_output_mean_tokens{model="demo"} 50.0',
            'tranche_estimator_output_quantile_tokens{model="demo",quantile="0.5"} 50.0',
            'tranche_estimator_output_quantile_tokens{model="demo",quantile="0.95"} 90.0',
            'tranche_estimator_ended_requests{model="demo",reason="stop"} 5.0',
            'tranche_estimator_finished_requests_total{reason="error"} 1.0',
            "tranche_estimator_store_seconds_count 10.0",
        ):
            assert line in text
        assert running.value("estimator_censored_ratio", model="demo") == pytest.approx(4 / 9)
        assert await asyncio.to_thread(get, "/ready") == '{"ready":true}'
        assert await asyncio.to_thread(get, "/health") == '{"status":"ok"}'


async def test_storing_is_part_of_the_requests_trace(mesh: Mesh) -> None:
    with OtlpReceiver() as receiver:
        async with mesh.estimator(otlp_endpoint=receiver.url):
            await mesh.tell(report(1, 30), trace=TRACE)
            await mesh.tell(report(2, 30))
            await reached(lambda: mesh.lengths == [30, 30])
        (span,) = receiver.wait_for(lambda spans: len(spans) == 1)
    assert (span.service, span.name, span.kind) == (
        "tranche-estimator",
        "estimator.store",
        "CONSUMER",
    )
    assert (span.trace_id, span.parent_id) == ("4" * 32, "7" * 16)
    assert span.attributes["messaging.destination.name"] == (
        "tranche.history:finished:tranche.estimator"
    )


async def test_forecasts_go_into_the_schedulers_inbox(mesh: Mesh) -> None:
    keys: list[str] = []

    async def on_message(delivery: Delivery) -> None:
        keys.append(delivery.routing_key)

    queue = SCHEDULER_QUEUE.__class__("spy", "exclusive", ((INBOX, "estimator.*"),))
    await mesh.scheduler.consume(queue, on_message)
    async with mesh.estimator():
        await reached(lambda: keys == ["estimator.estimator-1"])


async def test_questions_are_answered_by_the_predictor_beside_the_reports(mesh: Mesh) -> None:
    learnt = [report(n, 7, tenant="t", prompt_tokens=3) for n in range(20)]
    question = PredictionWanted(
        epoch=1, request_id="asked", model="demo", tenant="t", prompt=bytes(12), max_tokens=50
    )
    async with mesh.estimator(predictor="tenant-classes", predictor_timeout_s=5.0):
        await mesh.tell(*learnt)
        await reached(lambda: bool(mesh.forecasts) and len(mesh.lengths) == 20)
        assert mesh.forecasts[-1].predicts
        await mesh.tell(question)
        await reached(lambda: bool(mesh.predictions))
    assert mesh.predictions == [LengthPredicted(request_id="asked", output_tokens=7)]


async def test_without_a_predictor_questions_are_not_answered(mesh: Mesh) -> None:
    question = PredictionWanted(
        epoch=1, request_id="asked", model="demo", prompt=bytes(12), max_tokens=50
    )
    async with mesh.estimator():
        await mesh.tell(question, report(1))
        await reached(lambda: mesh.lengths == [10])
    assert not mesh.forecasts[-1].predicts
    assert not mesh.predictions
