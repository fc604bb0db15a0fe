"""Gateways for tests: a live one for clients in other threads, and one in the test's own loop."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvloop

from services.gateway.service import serve
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import ModelText, load_model_text
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.messages import SchedulerBeat
from shared.telemetry.setup import Telemetry, start
from tests.api.fake_mesh import FIRST_BEAT, FakeMesh

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo_model"
READY_S = 90.0
"""Importing transformers takes seconds, and many of them on a busy machine."""


@dataclass(frozen=True, slots=True)
class LiveGateway:
    """Where a live gateway is, and what it serves. Override the `live_gateway` fixture to run the
    client suites against another one."""

    base_url: str
    """With /v1."""
    model: str


@dataclass(slots=True)
class Stage:
    """A gateway with a scripted mesh behind it, in the test's own event loop."""

    mesh: FakeMesh
    client: httpx.AsyncClient
    settings: GatewaySettings
    telemetry: Telemetry
    stop: asyncio.Event
    serving: asyncio.Task[None]

    async def complete(self, **body: object) -> httpx.Response:
        """POST /v1/completions."""
        return await self.client.post(
            "/v1/completions", json={"model": "demo_model", "prompt": "ROMEO:", **body}
        )

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value now; 0 if there is none."""
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def staged(
    telemetry: Telemetry | None = None,
    beat: SchedulerBeat = FIRST_BEAT,
    verify: ssl.SSLContext | None = None,
    **changes: object,
) -> AsyncIterator[Stage]:
    """A gateway and a scripted mesh on a memory broker of their own; it is ready if the beat says
    that there are workers. `verify`: whom the client trusts; it speaks TLS then."""
    broker = MemoryBroker()
    gateway_bus, mesh_bus = MemoryBus(broker), MemoryBus(broker)
    await gateway_bus.open()
    await mesh_bus.open()
    usual = {"port": free_port(), "model": str(DEMO_MODEL), "drain_s": 5.0, "log_level": "error"}
    settings = GatewaySettings.model_validate(usual | changes)
    telemetry = telemetry or start(settings, "gateway-test")
    stop = asyncio.Event()
    host = "https://localhost" if verify else "http://127.0.0.1"
    url = f"{host}:{settings.port}"
    async with (
        FakeMesh(mesh_bus, beat=beat).running() as mesh,
        httpx.AsyncClient(base_url=url, timeout=30.0, verify=verify or True) as client,
        asyncio.TaskGroup() as tasks,
    ):
        serving = tasks.create_task(serve(settings, gateway_bus, telemetry, stop))
        await until_answered(client, 200 if beat.workers else 503)
        yield Stage(mesh, client, settings, telemetry, stop, serving)
        stop.set()
        await serving
    await gateway_bus.close()
    await mesh_bus.close()


async def until_answered(client: httpx.AsyncClient, status: int) -> None:
    """Waits for this answer of /ready."""
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == status:
                    return
            await asyncio.sleep(0.02)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """The usual gateway with a scripted mesh."""
    async with staged() as made:
        yield made


@pytest.fixture(scope="session")
def model_text() -> ModelText:
    """The demo model's tokenizer."""
    return load_model_text(str(DEMO_MODEL), "demo_model")


@pytest.fixture(scope="session")
def live_gateway() -> Iterator[LiveGateway]:
    """A gateway in a thread of its own, for clients that block."""
    ready, over = threading.Event(), threading.Event()
    found: list[LiveGateway] = []

    async def main() -> None:
        async with staged() as made:
            url = f"http://127.0.0.1:{made.settings.port}/v1"
            found.append(LiveGateway(url, "demo_model"))
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=uvloop.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(READY_S), "the gateway did not become ready"
    yield found[0]
    over.set()
    thread.join(READY_S)
