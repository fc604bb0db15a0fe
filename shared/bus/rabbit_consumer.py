"""Reading one queue: deliveries in order, one handler call at a time, settled in batches.

Every subscription has a channel of its own, so its delivery tags are settled in order and one
acknowledgement can stand for many: that saves more than half of the CPU per message.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
from aio_pika.robust_connection import RobustConnection
from aiormq import Channel
from aiormq.abc import DeliveredMessage

from shared.bus.api import Handler, QueueSpec
from shared.bus.handling import HANDLER_GRACE_S, OnDeadLetter, Received, Verdict, handle
from shared.bus.rabbit_line import KeptChannel, LineLost, line_errors
from shared.bus.rabbit_publisher import SENT_AT
from shared.bus.rabbit_queues import declare_queue

_log = structlog.get_logger(__name__)

ACK_BATCH = 32
"""Most messages that one acknowledgement stands for (and come again if the line breaks)."""
ACK_DELAY_S = 0.01
"""Longest time a handled message waits for its acknowledgement while the handler is idle."""
SETTLE_TIMEOUT_S = 5.0
"""For handing an acknowledgement to the connection's writer; its queue hangs if that one died."""
FAILURES_MAX = 10_000
"""Messages whose failures are remembered; the oldest are forgotten first."""


class RabbitSubscription:
    """A running consumer."""

    def __init__(
        self,
        connection: RobustConnection,
        queue: QueueSpec,
        handler: Handler,
        *,
        on_change: Callable[[], None],
        on_dead_letter: OnDeadLetter | None,
        on_closed: Callable[["RabbitSubscription"], None],
        given: bool = False,
    ) -> None:
        """`given`: shared queues and exchanges are the operator's."""
        self._spec = queue
        self._given = given
        self._handler = handler
        self._on_dead_letter = on_dead_letter
        self._on_closed = on_closed
        self._kept = KeptChannel(connection, f"queue {queue.name}", self._set_up, on_change)
        self._arrived: deque[DeliveredMessage] = deque()
        """At most `prefetch`: the broker sees to it."""
        self._wake = asyncio.Event()
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._unacknowledged: DeliveredMessage | None = None
        """The last handled message that no acknowledgement covers yet."""
        self._unacknowledged_count = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_due = False
        self._ack_batch = max(1, min(ACK_BATCH, queue.prefetch // 2))
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """False while the line is lost."""
        return self._kept.is_ready

    async def open(self, deadline_s: float) -> None:
        """Raises BusUnavailable."""
        await self._kept.open(deadline_s)
        self._task = asyncio.create_task(self._run(), name=f"bus:{self._spec.name}")

    async def close(self) -> None:
        """Lets the running call end (for HANDLER_GRACE_S at most); the rest goes back."""
        self._closing = True
        self._wake.set()
        if self._task is None or asyncio.current_task() is self._task:
            return  # called by the handler: the task ends after this call
        await asyncio.wait([self._task], timeout=HANDLER_GRACE_S)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _set_up(self, channel: Channel) -> None:
        # Sync from here to the end of this step: what the lost channel delivered comes again.
        self._arrived.clear()
        self._forget_unacknowledged()
        await channel.basic_qos(prefetch_count=self._spec.prefetch)
        await declare_queue(channel, self._spec, given=self._given)
        await channel.basic_consume(self._spec.name, self._on_message)

    async def _on_message(self, message: DeliveredMessage) -> None:
        self._arrived.append(message)
        self._wake.set()

    async def _run(self) -> None:
        try:
            while not self._closing:
                if self._arrived:
                    await self._handle(self._arrived.popleft())
                if self._ack_due or self._unacknowledged_count >= self._ack_batch:
                    await self._acknowledge()
                if not self._arrived and not self._closing:
                    self._wake.clear()
                    await self._wake.wait()
            await self._acknowledge()
        finally:
            self._forget_unacknowledged()
            await self._kept.close()
            self._on_closed(self)

    async def _handle(self, message: DeliveredMessage) -> None:
        if message.channel.is_closed:
            return  # it comes again
        identity = message.header.properties.message_id or str(hash(message.body))
        received = received_from(message, self._failures.get(identity, 0))
        match await handle(self._spec.name, self._handler, received):
            case Verdict.DONE:
                if self._failures:
                    self._failures.pop(identity, None)
                self._note_handled(message)
            case Verdict.RETRY:
                self._failures[identity] = received.failures + 1
                while len(self._failures) > FAILURES_MAX:
                    self._failures.popitem(last=False)
                await self._reject(message, requeue=True)
            case Verdict.DEAD:
                self._failures.pop(identity, None)
                await self._reject(message, requeue=False)
                if self._on_dead_letter is not None:
                    self._on_dead_letter(self._spec.name)

    def _note_handled(self, message: DeliveredMessage) -> None:
        self._unacknowledged = message
        self._unacknowledged_count += 1
        if self._ack_timer is None:
            loop = asyncio.get_running_loop()
            self._ack_timer = loop.call_later(ACK_DELAY_S, self._make_ack_due)

    def _make_ack_due(self) -> None:
        self._ack_due = True
        self._wake.set()

    def _forget_unacknowledged(self) -> None:
        self._unacknowledged = None
        self._unacknowledged_count = 0
        self._ack_due = False
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None

    async def _acknowledge(self) -> None:
        message = self._unacknowledged
        self._forget_unacknowledged()
        if message is None or message.delivery_tag is None:
            return
        await self._settle(
            message.channel.basic_ack(message.delivery_tag, multiple=True, wait=False)
        )

    async def _reject(self, message: DeliveredMessage, *, requeue: bool) -> None:
        # basic.reject, not basic.nack: from 4.3 only the former counts to the delivery limit.
        assert message.delivery_tag is not None
        await self._settle(
            message.channel.basic_reject(message.delivery_tag, requeue=requeue, wait=False)
        )

    async def _settle(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                with line_errors():
                    await sending
        except (LineLost, TimeoutError) as error:
            # The broker gives out again what was not settled on a lost channel.
            _log.debug("bus.not_settled", queue=self._spec.name, error=str(error))
            self._kept.renew()


def received_from(message: DeliveredMessage, failures: int) -> Received:
    """The parts that a handler may see; foreign headers that are no text are left out."""
    headers = message.header.properties.headers or {}
    sent_at = headers.get(SENT_AT)
    received_at = time.time()
    return Received(
        body=message.body,
        routing_key=message.routing_key or "",
        sent_at=sent_at / 1e6 if isinstance(sent_at, int) else received_at,
        headers={name: value for name, value in headers.items() if isinstance(value, str)},
        redelivered=bool(message.redelivered),
        exchange=message.exchange or "",
        failures=failures,
    )
