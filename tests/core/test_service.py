"""The scheduler's shell over the in-process bus, with scripted peers around it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from structlog.testing import capture_logs

from services.scheduler import journal
from services.scheduler.core.replay import replay
from services.scheduler.service import serve
from services.scheduler.settings import SchedulerSettings
from shared import tokens
from shared.bus.api import Address, Delivery
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.topology import (
    ESTIMATOR_QUEUE,
    INBOX,
    SCHEDULER_QUEUE,
    from_estimator,
    from_gateway,
    from_worker,
    gateway_queue,
    worker_queue,
)
from shared.messages import (
    Elected,
    Finished,
    GatewayBeat,
    LengthForecast,
    Message,
    Recall,
    Rejected,
    RequestSpec,
    Resume,
    RunSlice,
    SchedulerBeat,
    SliceDone,
    SliceResult,
    SliceTimings,
    Submit,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)
from shared.telemetry.setup import Telemetry

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MEMORY = WorkerMemory(kv_tokens_capacity=4000, kv_tokens_used=1000)
TIMEOUT_S = 5.0


class Peer:
    """Reads queues into one list and waits for what should come."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.deliveries: list[Delivery] = []
        self._arrived = asyncio.Event()

    async def read(self, queue: object) -> None:
        await self.bus.consume(queue, self._receive)  # type: ignore[arg-type]

    async def _receive(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._arrived.set()

    async def get(self, kind: type[Message], where: Callable[..., bool] = bool) -> Delivery:
        """The first delivery of this kind that fits; waits for it."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                self._arrived.clear()
                for delivery in self.deliveries:
                    if isinstance(delivery.message, kind) and where(delivery.message):
                        return delivery
                await self._arrived.wait()


class Mesh:
    """A scheduler and one scripted gateway, worker and estimator."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.bus = MemoryBus(broker)
        self.peer = Peer(self.bus)
        self.registry = CollectorRegistry()
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = provider.get_tracer("test")

    async def open(self) -> None:
        await self.bus.open()
        await self.bus.declare(SCHEDULER_QUEUE)
        for queue in (gateway_queue("g1"), worker_queue("w1"), ESTIMATOR_QUEUE):
            await self.peer.read(queue)

    @asynccontextmanager
    async def scheduler(
        self, bus: MemoryBus | None = None, **settings: object
    ) -> AsyncIterator[asyncio.Task[None]]:
        """A scheduler of its own connection; stopped and awaited at the end."""
        bus = bus or MemoryBus(self.broker)
        await bus.open()
        stop = asyncio.Event()
        telemetry = Telemetry(
            service="scheduler",
            boot_id="s1",
            log=structlog.get_logger(),
            tracer=self.tracer,
            registry=self.registry,
        )
        record = SchedulerSettings(**{"policy": "scls", **settings})  # type: ignore[arg-type]
        task = asyncio.create_task(serve(record, bus, telemetry, stop))
        try:
            yield task
        finally:
            stop.set()
            async with asyncio.timeout(TIMEOUT_S):
                await task
            await bus.close()

    async def say(self, message: Message, address: Address | None = None) -> None:
        await self.bus.publish(address or from_gateway("g1"), message)

    async def beat(self, forms: tuple[str, ...] = ("closed",)) -> None:
        info = WorkerInfo(
            worker="w1",
            name="worker-one",
            engine="padded",
            forms=forms,  # type: ignore[arg-type]
            model="demo",
            context_tokens_max=1024,
        )
        await self.say(WorkerBeat(info=info, memory=MEMORY), from_worker("w1"))

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    mesh = Mesh(MemoryBroker())
    await mesh.open()
    yield mesh
    await mesh.bus.close()


def request(request_id: str = "r1", max_tokens: int = 20, trace: str = "") -> Submit:
    return Submit(
        spec=RequestSpec(
            request_id=request_id,
            parent_id=request_id,
            gateway="g1",
            model="demo",
            prompt=tokens.pack([1, 2, 3]),
            max_tokens=max_tokens,
            trace=trace,
        )
    )


def done(run: RunSlice, *, finish: bool) -> SliceDone:
    results = tuple(
        SliceResult(
            request_id=order.spec.request_id,
            attempt=order.attempt,
            position=tokens.count(order.tokens),
            tokens=tokens.pack([7] * order.lease_tokens),
            finish_reason="stop" if finish else None,
        )
        for order in run.orders
    )
    return SliceDone(
        epoch=run.epoch,
        worker=run.worker,
        batch_id=run.batch_id,
        form="closed",
        results=results,
        timings=SliceTimings(
            prefill_s=0.01, decode_s=0.1, iterations=8, input_tokens_max=3, batch_size=1
        ),
        memory=MEMORY,
    )


async def test_one_request_in_two_slices(mesh: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "journal"
    async with mesh.scheduler(slice_tokens=16, journal=str(file)):
        await mesh.beat()
        assert (await mesh.peer.get(SchedulerBeat)).message == SchedulerBeat(
            epoch=1, workers=1, kv_usage=0.25, context_tokens_max=1024
        )
        await mesh.say(request(trace=TRACE))
        first = await mesh.peer.get(RunSlice)
        assert isinstance(first.message, RunSlice)
        assert first.headers["traceparent"]
        assert [order.lease_tokens for order in first.message.orders] == [16]
        await mesh.say(done(first.message, finish=False), from_worker("w1"))
        second = await mesh.peer.get(RunSlice, lambda m: m.orders[0].attempt == 2)
        assert isinstance(second.message, RunSlice)
        order = second.message.orders[0]
        assert (order.lease_tokens, order.tokens) == (4, tokens.pack([7] * 16))
        await mesh.say(done(second.message, finish=True), from_worker("w1"))
        ended = (await mesh.peer.get(Finished)).message
        assert isinstance(ended, Finished)
        assert (ended.output_tokens, ended.reason) == (20, "stop")
    names = [span.name for span in mesh.spans.get_finished_spans()]
    assert sorted(names) == [
        "dispatch batch",
        "dispatch batch",
        "pool wait",
        "pool wait",
        "request queue",
    ]
    text = mesh.metrics()
    assert "tranche_dispatched_batches_total 2.0" in text
    assert 'vllm:num_requests_waiting{engine="0",model_name="demo"}' in text
    steps, difference = replay(file.read_bytes())
    assert steps > 5
    assert difference is None
    assert replay(file.read_bytes(), policy="sls")[1] is not None


async def test_a_journal_that_cannot_be_written_is_said_once(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: scheduling goes on, and whoever wanted the record is told."""
    monkeypatch.setattr(journal, "FLUSHED_S", 0.0)
    with capture_logs() as logs:
        async with mesh.scheduler(journal="/dev/full"):
            await mesh.beat()
            await mesh.peer.get(SchedulerBeat)
            await mesh.beat()
            await mesh.peer.get(SchedulerBeat)
    (said,) = [line for line in logs if line["event"] == "scheduler.journal_ended"]
    assert "No space left" in said["error"]
    assert 'kind="journal"' in mesh.metrics()


async def test_an_idle_mesh_answers_at_once(mesh: Mesh) -> None:
    async with mesh.scheduler():
        await mesh.beat()
        await mesh.peer.get(SchedulerBeat)
        loop = asyncio.get_running_loop()
        waits = []
        for number in range(5):
            began = loop.time()
            await mesh.say(request(f"r{number}"))
            wanted = f"r{number}"
            run = await mesh.peer.get(
                RunSlice, lambda m, wanted=wanted: m.orders[0].spec.request_id == wanted
            )
            waits.append(loop.time() - began)
            assert isinstance(run.message, RunSlice)
            await mesh.say(done(run.message, finish=True), from_worker("w1"))
        assert min(waits) < 0.05


async def test_a_worker_whose_queue_is_gone_is_lost(mesh: Mesh) -> None:
    gone = MemoryBus(mesh.broker)
    await gone.open()
    info = WorkerInfo(
        worker="w9", name="w9", engine="x", forms=("closed",), model="demo", context_tokens_max=1024
    )
    async with mesh.scheduler():
        await mesh.say(WorkerBeat(info=info, memory=MEMORY), from_worker("w9"))
        await mesh.say(request())
        recall = (await mesh.peer.get(Recall)).message
        assert recall == Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)
    assert "tranche_lost_workers_total 1.0" in mesh.metrics()
    await gone.close()


async def test_a_standby_takes_over_with_a_higher_epoch(mesh: Mesh) -> None:
    async with AsyncExitStack() as first:
        await first.enter_async_context(mesh.scheduler())
        await mesh.beat()
        await mesh.peer.get(SchedulerBeat, lambda m: m.epoch == 1)
        async with mesh.scheduler():
            await mesh.beat()
            await mesh.peer.get(SchedulerBeat, lambda m: m.workers == 1)
            await first.aclose()
            await mesh.beat()
            await mesh.peer.get(SchedulerBeat, lambda m: m.epoch == 2)


class Interrupted(MemoryBus):
    """A bus whose connection the test can break."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.callbacks: list[Callable[[], None]] = []

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)


async def test_after_a_lost_connection_it_leads_anew_or_not_at_all(mesh: Mesh) -> None:
    """Another may have led meanwhile: what was known is forgotten, the epoch rises."""
    bus = Interrupted(mesh.broker)
    async with mesh.scheduler(bus=bus):
        await mesh.beat()
        await mesh.say(request())
        await mesh.peer.get(RunSlice)
        for callback in bus.callbacks:
            callback()
        assert "tranche_epoch 0.0" in mesh.metrics()
        await mesh.beat()
        await mesh.peer.get(SchedulerBeat, lambda m: m.epoch == 2)
        spec = request().spec
        await mesh.say(Resume(spec=spec, attempt=0, tokens=tokens.pack([5])))
        recall = (await mesh.peer.get(Recall)).message
        assert recall == Recall(epoch=2, gateway="g1", request_id="r1", attempt=1_000_000)


async def test_who_speaks_for_another_is_not_heard(mesh: Mesh) -> None:
    async with mesh.scheduler():
        await mesh.beat()
        await mesh.say(request("forged"), from_gateway("g2"))
        await mesh.say(LengthForecast(version=1, classes=()), from_worker("w1"))
        await mesh.say(LengthForecast(version=1, classes=()), from_estimator("e1"))
        await mesh.say(request("true"))
        run = (await mesh.peer.get(RunSlice)).message
        assert isinstance(run, RunSlice)
        assert [order.spec.request_id for order in run.orders] == ["true"]
    assert 'tranche_scheduler_errors_total{kind="sender"} 2.0' in mesh.metrics()


async def test_a_message_of_another_kind_is_a_dead_letter(mesh: Mesh) -> None:
    async with mesh.scheduler():
        await mesh.say(Elected(epoch=77), Address(INBOX, "gateway.g1"))
        await mesh.say(GatewayBeat(gateway="g1"))
        await mesh.beat()
        await mesh.peer.get(SchedulerBeat, lambda m: m.workers == 1)
    assert [letter.queue for letter in mesh.broker.dead_letters] == ["tranche.scheduler"]


async def test_a_policy_that_no_worker_can_run_is_refused_with_advice(mesh: Mesh) -> None:
    async with mesh.scheduler():
        await mesh.beat(forms=("leased",))
        await mesh.say(request())
        answer = (await mesh.peer.get(Rejected)).message
        assert isinstance(answer, Rejected)
        assert answer.reason == "no_worker"
        assert "--engine" in answer.detail


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("future_reserve", "5", "0.05"),
        ("prompt_watermark", "1", "0"),
        ("memory_share", "90", "1"),
        ("aggressive_watermark", "0", "0.95"),
        ("cold_start_share", "1.5", "1"),
        ("conservative_overcommit", "-1", "1.5"),
    ],
)
def test_shares_are_not_per_cents(name: str, wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerSettings(set={name: wrong})
    assert getattr(SchedulerSettings(set={name: right}).constants(), name) == float(right)


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(ValueError, match="known are: sls, ils, so, pm, ab, lb, scls"):
        SchedulerSettings(policy="best")
    with pytest.raises(ValueError, match=r"unknown constant 'gama'.*interval_floor_s"):
        SchedulerSettings(set={"gama": "1"})
    with pytest.raises(ValueError, match="'slice_token', did you mean 'slice_tokens'"):
        SchedulerSettings(set={"slice_token": "8"})
    with pytest.raises(ValueError, match="overdue_s wants a number, not 'soon'"):
        SchedulerSettings(set={"overdue_s": "soon"})
    assert SchedulerSettings(set={"overdue_s": "7.5"}).constants().overdue_s == 7.5
