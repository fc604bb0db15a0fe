"""The bus over RabbitMQ 3.10 or 4.x: one service's connections. See shared.bus.api.

Publishing and consuming have a connection each: a broker that is short of memory stops reading from
publishers, and acknowledgements must not wait behind that.
"""

import asyncio
from collections.abc import Callable, Mapping

import structlog
from aio_pika.robust_connection import RobustConnection
from aiormq import Channel

from shared.bus.api import Address, BusUnavailable, Handler, QueueSpec
from shared.bus.handling import OnDeadLetter
from shared.bus.rabbit_consumer import RabbitSubscription
from shared.bus.rabbit_epoch import raise_epoch
from shared.bus.rabbit_line import (
    HEARTBEAT_S,
    SCHEDULER_HEARTBEAT_S,
    KeptChannel,
    connect,
    hang_up,
)
from shared.bus.rabbit_publisher import Publisher
from shared.bus.rabbit_queues import declare_queue, may_declare
from shared.messages import Message, encode

_log = structlog.get_logger(__name__)

DECLARE_DEADLINE_S = 30.0
"""For `consume` and `declare`; a restarting broker is back within it."""


class RabbitBus:
    """See shared.bus.api.Bus."""

    def __init__(
        self, url: str, *, service: str, on_dead_letter: OnDeadLetter | None = None
    ) -> None:
        """`service` names the connections at the broker. `on_dead_letter` is called with the
        queue's name for every message that this bus condemns."""
        self._url = url
        self._service = service
        self._heartbeat_s = SCHEDULER_HEARTBEAT_S if service == "scheduler" else HEARTBEAT_S
        self._on_dead_letter = on_dead_letter
        self._connections: tuple[RobustConnection, ...] = ()
        self._publisher: Publisher | None = None
        self._topology: KeptChannel | None = None
        self._declared: dict[str, QueueSpec] = {}
        self._subscriptions: set[RabbitSubscription] = set()
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._was_lost = False
        self._given = False
        """This account makes no shared exchanges and queues; they are the operator's."""

    @property
    def connected(self) -> bool:
        return bool(self._connections) and all(c.connected.is_set() for c in self._connections)

    async def open(self, deadline_s: float = 60.0) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        try:
            for purpose in ("publish", "consume"):
                name = f"tranche {self._service} {purpose}"
                connection = await connect(
                    self._url, name, deadline - loop.time(), heartbeat_s=self._heartbeat_s
                )
                self._connections += (connection,)
            publishing, consuming = self._connections
            self._given = not await _may_declare(consuming, deadline - loop.time())
            self._topology = KeptChannel(
                consuming, "topology", self._declare_all, self._on_line_change
            )
            await self._topology.open(deadline - loop.time())
            publisher = Publisher(publishing, self._on_line_change, given=self._given)
            await publisher.open(deadline - loop.time())
            self._publisher = publisher
        except BaseException:
            await self.close()
            raise

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
        if self._publisher is None:
            raise BusUnavailable("the bus is not open")
        await self._publisher.publish(
            address,
            encode(message),
            headers,
            deadline_s=deadline_s,
            persistent=persistent,
            mandatory=mandatory,
        )

    async def consume(self, queue: QueueSpec, handler: Handler) -> RabbitSubscription:
        if self._publisher is None:
            raise BusUnavailable("the bus is not open")
        subscription = RabbitSubscription(
            self._connections[1],
            queue,
            handler,
            on_change=self._on_line_change,
            on_dead_letter=self._on_dead_letter,
            on_closed=self._subscriptions.discard,
            given=self._given,
        )
        await subscription.open(DECLARE_DEADLINE_S)
        self._subscriptions.add(subscription)
        return subscription

    async def declare(self, queue: QueueSpec) -> None:
        if self._topology is None:
            raise BusUnavailable("the bus is not open")
        once = KeptChannel(
            self._connections[1],
            f"queue {queue.name}",
            lambda channel: declare_queue(channel, queue, given=self._given),
        )
        await once.open(DECLARE_DEADLINE_S)
        await once.close()
        self._declared[queue.name] = queue

    async def raise_epoch(self) -> int:
        return await raise_epoch(self._url, f"tranche {self._service} epoch")

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._reconnect_callbacks.append(callback)

    async def close(self) -> None:
        """Handlers first (they may publish), then what waits for a confirm, then the line."""
        await asyncio.gather(*(s.close() for s in tuple(self._subscriptions)))
        channels = (self._publisher, self._topology)
        self._publisher = self._topology = None
        await asyncio.gather(*(channel.close() for channel in channels if channel is not None))
        connections, self._connections = self._connections, ()
        await asyncio.gather(*(hang_up(connection) for connection in connections))

    async def _declare_all(self, channel: Channel) -> None:
        for queue in self._declared.values():
            await declare_queue(channel, queue, given=self._given)

    def _on_line_change(self) -> None:
        """A channel was lost, or is back. When all are back, tell who asked for it."""
        if self._topology is None or self._publisher is None:
            return
        own_ready = self._topology.is_ready and self._publisher.is_ready
        if not own_ready or not all(s.is_ready for s in self._subscriptions):
            self._was_lost = True
        elif self._was_lost:
            self._was_lost = False
            _log.info("bus.reconnected", service=self._service)
            for callback in self._reconnect_callbacks:
                try:
                    callback()
                except Exception:
                    _log.exception("bus.reconnect_callback_failed", service=self._service)


async def _may_declare(connection: RobustConnection, deadline_s: float) -> bool:
    """Asked once, when the bus opens."""
    answers: list[bool] = []

    async def ask(channel: Channel) -> None:
        scratch = await channel.connection.channel()  # a refusal ends it
        if await may_declare(scratch):
            await scratch.close()
            answers.append(True)
        else:
            answers.append(False)

    probe = KeptChannel(connection, "rights", ask)
    await probe.open(deadline_s)
    await probe.close()
    return answers[-1]
