"""A worker on a bus, between a scripted scheduler and scripted gateways."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from prometheus_client import CollectorRegistry

from services.worker.service import serve
from services.worker.settings import WorkerSettings
from shared.bus.api import Bus, Delivery
from shared.bus.topology import SCHEDULER_QUEUE, addresses_of, gateway_queue
from shared.messages import Message, SliceDone, TokenBatch, WorkerBeat
from shared.telemetry import setup
from shared.tokens import unpack

WAIT_S = 20.0
WORKER = "worker-1"


class Mesh:
    """What the scheduler and the gateways saw, and a way to speak to the worker."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.stop = asyncio.Event()
        self.beats: list[WorkerBeat] = []
        self.results: list[SliceDone] = []
        self.batches: list[TokenBatch] = []
        self.registry = CollectorRegistry()
        self.serving: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    async def listen(self) -> None:
        """Read the scheduler's queue."""
        await self.bus.consume(SCHEDULER_QUEUE, self._on_delivery)

    async def listen_at(self, gateway: str) -> None:
        """Read a gateway's queue."""
        await self.bus.consume(gateway_queue(gateway), self._on_delivery)

    async def say(self, message: Message) -> None:
        """As the scheduler, or a gateway."""
        for address in addresses_of(message):  # type: ignore[arg-type]
            await self.bus.publish(address, message, mandatory=False)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something to be seen."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    async def done(self, number: int = 1) -> SliceDone:
        """The result of the `number`th batch that ends."""
        await self.until(lambda: len(self.results) >= number)
        return self.results[number - 1]

    def text(self, request_id: str, attempt: int = 1) -> list[int]:
        """A request's tokens, as a gateway puts them together."""
        ids: list[int] = []
        for batch in self.batches:
            for run in batch.runs:
                if (run.request_id, run.attempt) == (request_id, attempt):
                    assert run.position <= len(ids), "a gap"
                    ids[run.position :] = unpack(run.ids)
        return ids

    async def hears(self, request_id: str, ids: list[int]) -> None:
        """Wait until a request's tokens are these: they come by another queue than results."""
        with suppress(TimeoutError):
            await self.until(lambda: self.text(request_id) == ids)
        assert self.text(request_id) == ids

    def finish_of(self, request_id: str) -> str | None:
        """Why the request ended, as its gateway knows."""
        reasons = [
            run.finish_reason
            for batch in self.batches
            for run in batch.runs
            if run.request_id == request_id and run.finish_reason
        ]
        return reasons[-1] if reasons else None

    async def _on_delivery(self, delivery: Delivery) -> None:
        match delivery.message:
            case WorkerBeat() as beat:
                self.beats.append(beat)
            case SliceDone() as done:
                self.results.append(done)
            case TokenBatch() as batch:
                self.batches.append(batch)
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def a_mesh(
    open_bus: Callable[[], Awaitable[Bus]],
    settings: WorkerSettings,
    gateways: tuple[str, ...] = ("gateway-1",),
) -> AsyncIterator[Mesh]:
    """A served worker, ready; it is stopped at the end."""
    mesh = Mesh(await open_bus())
    worker_bus = await open_bus()
    await mesh.listen()
    for gateway in gateways:
        await mesh.listen_at(gateway)
    telemetry = setup.start(settings, WORKER, mesh.registry)
    mesh.serving = asyncio.create_task(serve(settings, worker_bus, telemetry, mesh.stop))
    try:
        await mesh.until(lambda: mesh.beats)
        yield mesh
    finally:
        mesh.stop.set()
        try:
            async with asyncio.timeout(WAIT_S):
                await mesh.serving
        finally:
            await worker_bus.close()
            await mesh.bus.close()
