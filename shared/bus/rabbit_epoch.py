"""The epoch: a number that only rises, kept in a durable one-message queue.

Theory of operation. Whoever raises it holds a lock: an exclusive queue, which only one connection
can have and which the broker frees when that connection ends. Reading, writing and the lock use one
short-lived connection, so nobody writes who has lost the lock. The new number is confirmed before
the old one is removed; a crash in between leaves both, and the larger counts.

One moment needs care. If a holder dies while it has the old number in hand, the lock may be free an
instant before that number is back in the queue. An empty queue is therefore believed only if it was
just made, or if it stays empty for a while.
"""

import asyncio

import structlog
from aio_pika import Channel, Connection, DeliveryMode, Message, connect
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import ChannelNotFoundEntity
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_delay,
    wait_random,
)
from yarl import URL

from shared.bus.api import DEAD_LETTER_EXCHANGE, BusUnavailable
from shared.bus.rabbit_line import (
    ATTEMPT_TIMEOUT_S,
    SCHEDULER_HEARTBEAT_S,
    LineLost,
    line_errors,
)
from shared.bus.rabbit_queues import declare_dead_letters
from shared.bus.topology import EPOCH_QUEUE

_log = structlog.get_logger(__name__)

LOCK_QUEUE = f"{EPOCH_QUEUE}.lock"
DEADLINE_S = 60.0
"""Longer than RabbitMQ takes to notice a dead holder of the lock (three heartbeats)."""
EMPTY_PATIENCE_S = 2.0
"""How long an empty queue must stay so to be believed; a return takes milliseconds."""
LENGTH_MAX = 1000
"""One message is in use; the rest is room for rubbish until somebody raises the epoch."""
ARGUMENTS: dict[str, str | int] = {
    "x-queue-type": "quorum",
    "x-max-length": LENGTH_MAX,
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE,
    # A number that was in the hands of so many dying schedulers is still the number.
    "x-delivery-limit": 1_000_000,
}


async def raise_epoch(url: str, name: str) -> int:
    """One more than anybody ever got. Raises BusUnavailable."""
    address = URL(url)
    query = {"heartbeat": str(SCHEDULER_HEARTBEAT_S), "name": name, **address.query}
    retrying = AsyncRetrying(
        wait=wait_random(0.05, 0.3),
        stop=stop_after_delay(DEADLINE_S),
        retry=retry_if_exception_type(LineLost),
    )
    try:
        async for attempt in retrying:
            with attempt:
                return await _raise_once(address.with_query(query))
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise BusUnavailable(f"no new epoch within {DEADLINE_S:g} s: {cause}") from cause
    raise AssertionError("tenacity ends by return or RetryError")


async def _raise_once(address: URL) -> int:
    with line_errors():
        async with await connect(address, timeout=ATTEMPT_TIMEOUT_S) as connection:
            assert isinstance(connection, Connection)
            lock = await _channel(connection)
            await lock.declare_queue(
                LOCK_QUEUE,
                exclusive=True,
                arguments={"x-queue-type": "classic"},
                timeout=ATTEMPT_TIMEOUT_S,
            )
            existed = await _exists(connection)
            channel = await _channel(connection)
            if not existed:
                await declare_dead_letters(await channel.get_underlay_channel())
            queue = await channel.declare_queue(
                EPOCH_QUEUE,
                durable=True,
                passive=existed,  # it may be the operator's, and not ours to declare
                arguments=dict(ARGUMENTS),
                timeout=ATTEMPT_TIMEOUT_S,
            )
            held = await _take_all(queue)
            if existed and not held:
                held = await _take_patiently(queue)
            epoch = 1 + max((number for number, _ in held), default=0)
            await channel.default_exchange.publish(
                Message(b"%d" % epoch, delivery_mode=DeliveryMode.PERSISTENT),
                EPOCH_QUEUE,
                timeout=ATTEMPT_TIMEOUT_S,
            )
            for _, message in held:
                await message.ack()
            return epoch


async def _channel(connection: Connection) -> Channel:
    channel = connection.channel(on_return_raises=True)
    await channel.initialize(timeout=ATTEMPT_TIMEOUT_S)
    assert isinstance(channel, Channel)
    return channel


async def _exists(connection: Connection) -> bool:
    probe = await _channel(connection)  # a miss closes the channel
    try:
        await probe.declare_queue(EPOCH_QUEUE, passive=True, timeout=ATTEMPT_TIMEOUT_S)
    except ChannelNotFoundEntity:
        return False
    await probe.close()
    return True


async def _take_all(queue: AbstractQueue) -> list[tuple[int, AbstractIncomingMessage]]:
    """Everything that is ready, as numbers; what is no number becomes a dead letter."""
    held: list[tuple[int, AbstractIncomingMessage]] = []
    rubbish = 0
    while (message := await queue.get(fail=False, timeout=ATTEMPT_TIMEOUT_S)) is not None:
        if message.body.isdigit() and len(message.body) <= 18:
            held.append((int(message.body), message))
        else:
            rubbish += 1
            await message.reject(requeue=False)
    if rubbish:
        _log.warning("bus.epoch_rubbish", messages=rubbish, queue=EPOCH_QUEUE)
    return held


async def _take_patiently(queue: AbstractQueue) -> list[tuple[int, AbstractIncomingMessage]]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + EMPTY_PATIENCE_S
    while loop.time() < deadline:
        await asyncio.sleep(0.1)
        held = await _take_all(queue)
        if held:
            return held
    return []
