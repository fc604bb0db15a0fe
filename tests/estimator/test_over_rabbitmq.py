"""The estimator over a real RabbitMQ: what was reported while it was away or failing arrives."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared.bus.api import Delivery
from shared.bus.connect import make_bus
from shared.bus.topology import ESTIMATOR_QUEUE, SCHEDULER_QUEUE, addresses_of
from shared.messages import LengthForecast
from shared.telemetry import setup
from shared.telemetry.logs import reset_logs
from shared.telemetry.metered_bus import make_metered_bus
from shared.tokens import unpack
from tests.estimator.reports import report


async def reached(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def estimator(url: str, database: Path) -> AsyncIterator[None]:
    settings = EstimatorSettings(bus=url, database=str(database), forecast_interval_s=0.05)
    registry, stop = CollectorRegistry(), asyncio.Event()
    telemetry = setup.start(settings, "estimator-1", registry)
    bus = make_metered_bus(url, service="estimator", registry=registry)
    await bus.open()
    async with asyncio.timeout(40), asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(settings, bus, telemetry, stop))
        yield
        stop.set()
    await bus.close()
    reset_logs()


async def test_reports_survive_an_estimator_that_was_away(broker_url: str, tmp_path: Path) -> None:
    forecasts: list[LengthForecast] = []

    async def on_message(delivery: Delivery) -> None:
        assert isinstance(delivery.message, LengthForecast)
        forecasts.append(delivery.message)

    def lengths() -> list[int]:
        classes = forecasts[-1].classes if forecasts else ()
        return [length for known in classes for length in unpack(known.lengths)]

    scheduler = make_bus(broker_url, service="scheduler")
    await scheduler.open()
    await scheduler.consume(SCHEDULER_QUEUE, on_message)
    await scheduler.declare(ESTIMATOR_QUEUE)

    async def tell(number: int) -> None:
        ended = report(number, number)
        await scheduler.publish(addresses_of(ended)[0], ended)

    await tell(1)
    async with estimator(broker_url, tmp_path / "history.sqlite"):
        await tell(2)
        await reached(lambda: lengths() == [1, 2])
    await tell(2)
    await tell(3)
    forecasts.clear()
    async with estimator(broker_url, tmp_path / "history.sqlite"):
        await reached(lambda: lengths() == [1, 2, 3])
    await scheduler.close()
