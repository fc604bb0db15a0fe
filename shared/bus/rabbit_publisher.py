"""Publishing with confirms: pipelined, bounded, tried again over lost connections."""

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Mapping

import structlog
from aio_pika.exceptions import DeliveryError, PublishError
from aio_pika.robust_connection import RobustConnection
from aiormq import Channel, spec
from tenacity import AsyncRetrying, retry_if_exception_type

from shared.bus.api import Address, BusFull, BusUnavailable, Unroutable
from shared.bus.rabbit_line import BACKOFF, KeptChannel, LineLost, line_errors
from shared.bus.rabbit_queues import declare_exchange
from shared.bus.topology import EXCHANGES

_log = structlog.get_logger(__name__)

SENT_AT = "sent_at_us"
"""Header: wall-clock microseconds. AMQP's own timestamp has whole seconds only, and pamqp sends
floats with 32 bits."""
IN_FLIGHT_MAX = 256
"""Messages that wait for their confirm at once: enough to fill the pipe, few enough to send again
after a loss."""
UNDRAINED_BYTES_MAX = 64 * 1024
"""Larger bodies wait until the socket took them, so that what is in flight stays below 16 MiB."""
ROUTING_KEY_BYTES_MAX = 255
"""AMQP's own. A name in a broken message may be longer; nobody's is."""
FLUSH_TIMEOUT_S = 3.0
"""How long closing waits for confirms."""


class Publisher:
    """All that one bus publishes goes through here, over one channel."""

    def __init__(
        self, connection: RobustConnection, on_change: Callable[[], None], *, given: bool = False
    ) -> None:
        """`given`: the exchanges are the operator's; nothing is declared."""
        self._given = given
        self._kept = KeptChannel(connection, "publishing", self._set_up, on_change)
        self._exchanges = dict.fromkeys(EXCHANGES)
        self._window = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._prefix = uuid.uuid4().hex[:16]
        self._numbers = itertools.count(1)

    @property
    def is_ready(self) -> bool:
        """False while the line is lost."""
        return self._kept.is_ready

    async def open(self, deadline_s: float) -> None:
        """Raises BusUnavailable."""
        await self._kept.open(deadline_s)

    async def close(self) -> None:
        """Wait for what is in flight, within FLUSH_TIMEOUT_S."""
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("bus.closed_unconfirmed", messages=self._in_flight)
        await self._kept.close()

    async def publish(
        self,
        address: Address,
        body: bytes,
        headers: Mapping[str, str] | None,
        *,
        deadline_s: float,
        persistent: bool,
        mandatory: bool,
    ) -> None:
        """See Bus.publish."""
        if len(address.routing_key.encode()) > ROUTING_KEY_BYTES_MAX:
            raise Unroutable(f"a routing key of {len(address.routing_key)} characters names nobody")
        properties = spec.Basic.Properties(
            content_type="application/msgpack",
            delivery_mode=2 if persistent else 1,
            # Names the message in confirms and returns, and its failures at the consumer.
            message_id=f"{self._prefix}-{next(self._numbers):x}",
            headers={**(headers or {}), SENT_AT: time.time_ns() // 1000},
        )
        self._in_flight += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(deadline_s), self._window:
                await self._until_confirmed(address, body, properties, mandatory)
        except TimeoutError as error:
            raise BusUnavailable(
                f"{address.routing_key} at {address.exchange}: not confirmed "
                f"within {deadline_s:g} s"
            ) from error
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _until_confirmed(
        self, address: Address, body: bytes, properties: spec.Basic.Properties, mandatory: bool
    ) -> None:
        try:
            await self._publish_once(address, body, properties, mandatory)
        except LineLost as error:
            # The loss itself is a warning of the channel's; this is one line per message.
            _log.debug("bus.publish_again", routing_key=address.routing_key, error=str(error))
        else:
            return
        retrying = AsyncRetrying(wait=BACKOFF, retry=retry_if_exception_type(LineLost))
        async for attempt in retrying:
            with attempt:
                await self._publish_once(address, body, properties, mandatory)

    async def _publish_once(
        self, address: Address, body: bytes, properties: spec.Basic.Properties, mandatory: bool
    ) -> None:
        channel = await self._kept.channel()
        with line_errors():
            if address.exchange not in self._exchanges:
                await declare_exchange(channel, address.exchange, given=self._given)
                self._exchanges[address.exchange] = None
            # While the broker is out of memory or disk it blocks publishers; do not pile up then.
            await channel.connection.ready()
            try:
                await channel.basic_publish(
                    body,
                    exchange=address.exchange,
                    routing_key=address.routing_key,
                    properties=properties,
                    mandatory=mandatory,
                    wait=len(body) > UNDRAINED_BYTES_MAX,
                )
            except PublishError as error:
                raise Unroutable(
                    f"no queue for {address.routing_key} at {address.exchange}"
                ) from error
            except DeliveryError as error:
                raise BusFull(
                    f"the broker refused a message for {address.routing_key} at "
                    f"{address.exchange}: a queue is at its length limit (or without a leader)"
                ) from error

    async def _set_up(self, channel: Channel) -> None:
        for exchange in self._exchanges:
            await declare_exchange(channel, exchange, given=self._given)
