"""What the gateway still has to say to the mesh, in order, with many messages under way at once."""

import asyncio

from services.gateway.metrics import GatewayMetrics
from shared.bus.api import Address, Bus, BusError, Unroutable
from shared.bus.topology import addresses_of, from_gateway
from shared.messages import FinishAck, Message
from shared.telemetry.setup import Telemetry

WAITING_MAX = 20_000
"""Messages that wait for the broker: with 1,024 open requests about twenty for each. What does not
fit is dropped and counted; each of these messages is said again when the mesh needs it."""
UNDER_WAY_MAX = 64
"""Unconfirmed at once: enough to hide the broker's 1 to 4 ms."""
PUBLISH_DEADLINE_S = 30.0
DRAIN_S = 5.0


class Outbox:
    """Publishes messages in the background."""

    def __init__(self, bus: Bus, gateway: str, telemetry: Telemetry) -> None:
        self._bus = bus
        self._to_scheduler = from_gateway(gateway)
        self._log = telemetry.log
        self._metrics = GatewayMetrics.of(telemetry.registry)
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(WAITING_MAX)
        self._under_way = asyncio.Semaphore(UNDER_WAY_MAX)

    def put(self, message: Message) -> None:
        """Sends it soon."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            self._metrics.errors.labels("outbox_full").inc()

    async def run(self) -> None:
        """Publishes for ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                message = await self._waiting.get()
                await self._under_way.acquire()
                tasks.create_task(self._publish(message))

    async def drain(self) -> None:
        """Waits until all is said, within a limit."""
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._waiting.join()
        except TimeoutError:
            self._log.warning("messages not sent", count=self._waiting.qsize())

    async def _publish(self, message: Message) -> None:
        try:
            await self._bus.publish(self._address(message), message, deadline_s=PUBLISH_DEADLINE_S)
        except Unroutable:
            pass  # a worker that is gone needs no acknowledgement
        except BusError as error:
            self._metrics.errors.labels("bus").inc()
            self._log.warning("message not sent", message=type(message).__name__, error=str(error))
        finally:
            self._under_way.release()
            self._waiting.task_done()

    def _address(self, message: Message) -> Address:
        if isinstance(message, FinishAck):
            return addresses_of(message)[0]
        return self._to_scheduler
