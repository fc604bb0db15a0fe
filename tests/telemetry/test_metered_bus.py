"""Every message is counted and timed, under labels that do not grow, and reaches its reader."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shared.bus.api import Address, BusUnavailable, Delivery, Handler, QueueSpec, Unroutable
from shared.bus.connect import memory_broker
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.topology import ESTIMATOR_QUEUE, addresses_of, from_gateway, worker_queue
from shared.messages import GatewayBeat, Message, SchedulerBeat
from shared.telemetry.metered_bus import BusMetrics, MeteredBus, base_name, make_metered_bus
from shared.telemetry.metrics import metrics_for

BEAT = SchedulerBeat(epoch=4)


class Bench:
    """A metered bus over a memory broker, and its registry."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.registry = CollectorRegistry()
        self.bus = MeteredBus(MemoryBus(self.broker), self.registry, "worker")

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"service": "worker", **labels}) or 0.0


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.bus.open()
    yield bench
    await bench.bus.close()


async def reached(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_message_is_counted_on_both_sides_and_keeps_its_headers(bench: Bench) -> None:
    received: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        received.append(delivery)

    queue = worker_queue("name.with.dots-7f3a")
    subscription = await bench.bus.consume(queue, handler)
    for address in addresses_of(BEAT)[:1]:
        await bench.bus.publish(address, BEAT, {"traceparent": "t"})
    consumed = {"queue": "tranche.worker", "message": "SchedulerBeat"}
    await reached(lambda: bench.value("tranche_bus_consumed_messages_total", **consumed) == 1)
    assert [d.message for d in received] == [BEAT]
    assert received[0].headers["traceparent"] == "t"
    published = {"exchange": "tranche.orders", "message": "SchedulerBeat"}
    assert bench.value("tranche_bus_published_messages_total", **published) == 1
    assert bench.value("tranche_bus_publish_seconds_count", exchange="tranche.orders") == 1
    assert bench.value("tranche_bus_queue_wait_seconds_count", queue="tranche.worker") == 1
    assert bench.value("tranche_bus_handle_seconds_count", queue="tranche.worker") == 1
    assert bench.value("tranche_bus_handler_errors_total", **consumed) == 0
    await subscription.close()


async def test_a_failing_handler_is_counted_and_the_message_comes_back(bench: Bench) -> None:
    calls: list[bool] = []

    async def handler(delivery: Delivery) -> None:
        calls.append(delivery.redelivered)
        if len(calls) == 1:
            raise RuntimeError("not yet")

    await bench.bus.consume(worker_queue("w-1"), handler)
    await bench.bus.publish(addresses_of(BEAT)[0], BEAT)
    await reached(lambda: len(calls) == 2)
    labels = {"queue": "tranche.worker", "message": "SchedulerBeat"}
    await reached(lambda: bench.value("tranche_bus_consumed_messages_total", **labels) == 1)
    assert calls == [False, True]
    assert bench.value("tranche_bus_handler_errors_total", **labels) == 1
    assert bench.value("tranche_bus_redelivered_messages_total", queue="tranche.worker") == 1


async def test_what_cannot_be_published_is_counted_by_its_error(bench: Bench) -> None:
    with pytest.raises(Unroutable):
        await bench.bus.publish(from_gateway("g-1"), GatewayBeat(gateway="g-1"))
    labels = {"exchange": "tranche.inbox", "error": "Unroutable"}
    assert bench.value("tranche_bus_publish_errors_total", **labels) == 1
    assert bench.value("tranche_bus_publish_seconds_count", exchange="tranche.inbox") == 0


async def test_the_rest_of_the_interface_passes_through(bench: Bench) -> None:
    await bench.bus.declare(ESTIMATOR_QUEUE)
    assert "tranche.estimator" in bench.broker.depths()
    assert [await bench.bus.raise_epoch() for _ in range(2)] == [1, 2]
    assert bench.bus.connected
    assert bench.value("tranche_bus_connections") == 1
    await bench.bus.close()
    assert not bench.bus.connected
    assert bench.value("tranche_bus_connections") == 0
    with pytest.raises(BusUnavailable):
        await bench.bus.declare(ESTIMATOR_QUEUE)


async def test_dead_letters_are_counted_by_base_name() -> None:
    registry = CollectorRegistry()
    url = "memory://dead-letters-are-counted"
    bus = make_metered_bus(url, service="worker", registry=registry)
    await bus.open()

    async def handler(delivery: Delivery) -> None:
        raise AssertionError(delivery)

    await bus.consume(worker_queue("w-1"), handler)
    memory_broker(url).publish_bytes(addresses_of(BEAT)[0], b"\xc1 no message")
    labels = {"service": "worker", "queue": "tranche.worker"}
    name = "tranche_bus_dead_lettered_messages_total"
    await reached(lambda: registry.get_sample_value(name, labels) == 1)
    await bus.close()


async def test_errors_are_zero_before_the_first_one(bench: Bench) -> None:
    async def handler(delivery: Delivery) -> None:
        raise AssertionError(delivery)

    await bench.bus.consume(worker_queue("w-1"), handler)
    labels = {"service": "worker", "queue": "tranche.worker"}
    value = bench.registry.get_sample_value
    assert value("tranche_bus_dead_lettered_messages_total", labels) == 0
    for kind in ("RunSlice", "SchedulerBeat", "FinishAck"):
        assert value("tranche_bus_handler_errors_total", {**labels, "message": kind}) == 0


class Reconnecting:
    """A bus that only reconnects."""

    connected = True

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    async def open(self, deadline_s: float = 60.0) -> None: ...

    async def publish(
        self,
        address: Address,
        message: Message,
        headers: Mapping[str, str] | None = None,
        *,
        deadline_s: float = 30.0,
        persistent: bool = True,
        mandatory: bool = True,
    ) -> None: ...

    async def consume(self, queue: QueueSpec, handler: Handler) -> "Reconnecting":
        return self

    async def declare(self, queue: QueueSpec) -> None: ...

    async def raise_epoch(self) -> int:
        return 1

    async def close(self) -> None: ...


def test_reconnects_are_counted_and_told_to_the_service() -> None:
    registry = CollectorRegistry()
    inner = Reconnecting()
    bus = MeteredBus(inner, registry, "worker")
    told: list[str] = []
    bus.on_reconnect(lambda: told.append("again"))
    for callback in inner.callbacks:
        callback()
    assert told == ["again"]
    assert registry.get_sample_value("tranche_bus_reconnects_total", {"service": "worker"}) == 1


async def test_several_services_share_one_registry() -> None:
    registry, broker = CollectorRegistry(), MemoryBroker()
    buses = [MeteredBus(MemoryBus(broker), registry, name) for name in ("worker", "worker", "one")]
    for bus in buses:
        await bus.open()
    for service, count in (("worker", 2), ("one", 1)):
        value = registry.get_sample_value("tranche_bus_connections", {"service": service})
        assert value == count
    assert metrics_for(registry, BusMetrics) is metrics_for(registry, BusMetrics)
    assert metrics_for(CollectorRegistry(), BusMetrics) is not metrics_for(registry, BusMetrics)


@pytest.mark.parametrize(
    ("queue", "base"),
    [
        ("tranche.worker.w-1.2-7f", "tranche.worker"),
        ("tranche.scheduler", "tranche.scheduler"),
        ("tranche.dead", "tranche.dead"),
    ],
)
def test_base_names(queue: str, base: str) -> None:
    assert base_name(queue) == base


def test_names_follow_prometheus_conventions() -> None:
    registry = CollectorRegistry()
    metrics_for(registry, BusMetrics)
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 8
    for family in families:
        assert family.name.startswith("tranche_")
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_tokens", "_bytes"))
