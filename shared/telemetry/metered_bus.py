"""A bus that counts and times all that passes, so that every service is metered without own code.

Queue labels are base names: `tranche.worker.<boot>` is `tranche.worker`, since a label for every
boot would grow without bound.
"""

import time
from collections.abc import Callable, Mapping
from typing import get_args
from weakref import WeakSet

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.bus.api import Address, Bus, BusError, Delivery, Handler, QueueSpec, Subscription
from shared.bus.connect import make_bus
from shared.messages import Message, ToEstimator, ToGateway, ToScheduler, ToWorker
from shared.telemetry.metrics import LATENCY_SECONDS, MESSAGE_SECONDS, metrics_for

_BASE_WORDS = 2
"""`tranche.<service>`: what a queue's base name keeps of an exclusive queue's name."""
_READ = {
    "tranche.scheduler": get_args(ToScheduler),
    "tranche.gateway": get_args(ToGateway),
    "tranche.worker": get_args(ToWorker),
    "tranche.estimator": get_args(ToEstimator),
}
"""What each queue brings, by its base name."""


class BusMetrics:
    """What all buses of this process report; `service` tells them apart."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.published = Counter(
            "tranche_bus_published_messages_total",
            "Messages handed to the broker and confirmed.",
            ("service", "exchange", "message"),
            registry=registry,
        )
        self.publish_errors = Counter(
            "tranche_bus_publish_errors_total",
            "Messages that could not be published; the error's class says why.",
            ("service", "exchange", "error"),
            registry=registry,
        )
        self.publish_seconds = Histogram(
            "tranche_bus_publish_seconds",
            "From publish to the broker's confirm.",
            ("service", "exchange"),
            buckets=MESSAGE_SECONDS,
            registry=registry,
        )
        self.consumed = Counter(
            "tranche_bus_consumed_messages_total",
            "Messages handled and settled.",
            ("service", "queue", "message"),
            registry=registry,
        )
        self.handler_errors = Counter(
            "tranche_bus_handler_errors_total",
            "Handler calls that failed; their message came back or became a dead letter.",
            ("service", "queue", "message"),
            registry=registry,
        )
        self.redelivered = Counter(
            "tranche_bus_redelivered_messages_total",
            "Messages that arrived once more.",
            ("service", "queue"),
            registry=registry,
        )
        self.dead_lettered = Counter(
            "tranche_bus_dead_lettered_messages_total",
            "Messages that this process condemned: undecodable, or failed too often.",
            ("service", "queue"),
            registry=registry,
        )
        self.queue_wait_seconds = Histogram(
            "tranche_bus_queue_wait_seconds",
            "From a message's publish to its receipt, by the two machines' wall clocks.",
            ("service", "queue"),
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.handle_seconds = Histogram(
            "tranche_bus_handle_seconds",
            "One handler call.",
            ("service", "queue"),
            buckets=MESSAGE_SECONDS,
            registry=registry,
        )
        self.reconnects = Counter(
            "tranche_bus_reconnects_total",
            "Connections to the broker that were lost and came back.",
            ("service",),
            registry=registry,
        )
        self._connections = Gauge(
            "tranche_bus_connections",
            "Buses of this process whose broker is within reach.",
            ("service",),
            registry=registry,
        )
        self._buses: dict[str, WeakSet[Bus]] = {}

    def add(self, service: str, bus: Bus) -> None:
        """Count this bus's reconnects and its connection while it lives."""
        buses = self._buses.setdefault(service, WeakSet())
        buses.add(bus)
        self._connections.labels(service).set_function(
            lambda: float(sum(known.connected for known in tuple(buses)))
        )
        bus.on_reconnect(self.reconnects.labels(service).inc)

    def expect(self, service: str, queue: str) -> None:
        """The queue of this base name is read from now on: its errors are 0, not absent, so that
        the first one shows as an increase."""
        self.dead_lettered.labels(service, queue)
        for kind in _READ.get(queue, ()):
            self.handler_errors.labels(service, queue, kind.__name__)

    def count_dead_letter(self, service: str, queue: str) -> None:
        """One more message condemned from the queue of this (full) name."""
        self.dead_lettered.labels(service, base_name(queue)).inc()


class MeteredBus:
    """A bus around another one. See shared.bus.api.Bus; headers and errors pass unchanged."""

    def __init__(self, bus: Bus, registry: CollectorRegistry, service: str) -> None:
        self._bus = bus
        self._service = service
        self._metrics = metrics_for(registry, BusMetrics)
        self._metrics.add(service, bus)

    @property
    def inner(self) -> Bus:
        """The bus that does the work."""
        return self._bus

    @property
    def connected(self) -> bool:
        return self._bus.connected

    async def open(self, deadline_s: float = 60.0) -> None:
        await self._bus.open(deadline_s)

    async def publish(
        self,
        address: Address,
        message: Message,
        headers: Mapping[str, str] | None = None,
        *,
        deadline_s: float = 30.0,
        persistent: bool = True,
        mandatory: bool = True,
    ) -> None:
        labels = (self._service, address.exchange)
        started = time.perf_counter()
        try:
            await self._bus.publish(
                address,
                message,
                headers,
                deadline_s=deadline_s,
                persistent=persistent,
                mandatory=mandatory,
            )
        except BusError as error:
            self._metrics.publish_errors.labels(*labels, type(error).__name__).inc()
            raise
        self._metrics.publish_seconds.labels(*labels).observe(time.perf_counter() - started)
        self._metrics.published.labels(*labels, type(message).__name__).inc()

    async def consume(self, queue: QueueSpec, handler: Handler) -> Subscription:
        name = base_name(queue.name)
        self._metrics.expect(self._service, name)
        return await self._bus.consume(queue, self._metered(name, handler))

    async def declare(self, queue: QueueSpec) -> None:
        await self._bus.declare(queue)

    async def raise_epoch(self) -> int:
        return await self._bus.raise_epoch()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._bus.on_reconnect(callback)

    async def close(self) -> None:
        await self._bus.close()

    def _metered(self, queue: str, handler: Handler) -> Handler:
        metrics, labels = self._metrics, (self._service, queue)
        wait_seconds = metrics.queue_wait_seconds.labels(*labels)
        handle_seconds = metrics.handle_seconds.labels(*labels)

        async def handle(delivery: Delivery) -> None:
            kind = type(delivery.message).__name__
            wait_seconds.observe(delivery.queue_wait_s)
            if delivery.redelivered:
                metrics.redelivered.labels(*labels).inc()
            started = time.perf_counter()
            try:
                await handler(delivery)
            except Exception:
                metrics.handler_errors.labels(*labels, kind).inc()
                raise
            finally:
                handle_seconds.observe(time.perf_counter() - started)
            metrics.consumed.labels(*labels, kind).inc()

        return handle


def make_metered_bus(url: str, *, service: str, registry: CollectorRegistry) -> MeteredBus:
    """`make_bus` with everything counted, dead letters included. Raises ValueError as it does."""
    metrics = metrics_for(registry, BusMetrics)

    def count_dead_letter(queue: str) -> None:
        metrics.count_dead_letter(service, queue)

    inner = make_bus(url, service=service, on_dead_letter=count_dead_letter)
    return MeteredBus(inner, registry, service)


def base_name(queue: str) -> str:
    """`tranche.worker.<boot>` without the boot id; shared queues keep their name."""
    return ".".join(queue.split(".")[:_BASE_WORDS])
