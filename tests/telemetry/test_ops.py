"""The operations port: health, readiness, metrics; it starts, serves and ends with its service."""

import asyncio
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families as plain_metrics

from shared.telemetry.metrics import ProcessMetrics, metrics_for
from shared.telemetry.ops import serve_ops


class Ops:
    """A running port and what it is asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.is_ready = True
        self.stop = asyncio.Event()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    async def serve(self) -> None:
        await serve_ops("127.0.0.1", self.port, self.registry, lambda: self.is_ready, self.stop)

    async def get(self, path: str, accept: str = "*/*") -> tuple[int, str, str]:
        """Status, content type, text."""
        return await asyncio.to_thread(self._get, path, accept)

    def _get(self, path: str, accept: str) -> tuple[int, str, str]:
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, headers={"accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.headers["content-type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["content-type"], error.read().decode()

    async def up(self) -> None:
        """Wait until it answers."""
        async with asyncio.timeout(5):
            while True:
                try:
                    await self.get("/health")
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    return


@pytest.fixture
async def ops() -> AsyncIterator[Ops]:
    running = Ops()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(running.serve())
        await running.up()
        yield running
        running.stop.set()


async def test_health_and_readiness_are_two_things(ops: Ops) -> None:
    assert await ops.get("/ready") == (200, "application/json", '{"ready":true}')
    ops.is_ready = False
    assert await ops.get("/ready") == (503, "application/json", '{"ready":false}')
    assert await ops.get("/health") == (200, "application/json", '{"status":"ok"}')
    assert (await ops.get("/other"))[0] == 404


async def test_metrics_keep_their_names_for_every_scraper(ops: Ops) -> None:
    Counter("tranche_things_total", "Things.", registry=ops.registry).inc(3)
    metrics_for(ops.registry, ProcessMetrics)
    status, kind, text = await ops.get("/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    parsed = plain_metrics(text)
    families = {family.name: family for family in parsed}
    assert families["tranche_things"].samples[0].value == 3
    assert families["process_resident_memory_bytes"].samples[0].value > 0
    Counter("vllm:things", "Things.", registry=ops.registry).inc()
    status, kind, text = await ops.get("/metrics", "application/openmetrics-text; version=1.0.0")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert "vllm:things_total 1.0" in text


async def test_no_port_no_server() -> None:
    await asyncio.wait_for(
        serve_ops("127.0.0.1", 0, CollectorRegistry(), lambda: True, asyncio.Event()), 1
    )


async def test_a_taken_port_is_an_error_that_names_it(ops: Ops) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{ops.port}"):
        await asyncio.wait_for(ops.serve(), 5)


async def test_signals_stay_the_services_own() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ops = Ops()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ops.serve())
        await ops.up()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        ops.stop.set()


async def test_stopping_frees_the_port() -> None:
    ops = Ops()
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(ops.serve())
        await ops.up()
        ops.stop.set()
    socket.create_server(("127.0.0.1", ops.port)).close()
