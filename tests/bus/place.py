"""A broker of either kind as tests see it: buses on it, raw bytes into it, its dead letters."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

import aio_pika

from shared.bus.api import DEAD_LETTER_QUEUE, Address, Bus, Delivery
from shared.bus.connect import make_bus, memory_broker
from shared.messages import Cancel

TIMEOUT_S = 20.0


async def eventually(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def numbered(number: int) -> Cancel:
    """A message that says its number."""
    return Cancel(gateway="g", request_id=str(number))


def number_of(delivery: Delivery) -> int:
    """The number that `numbered` gave."""
    assert isinstance(delivery.message, Cancel)
    return int(delivery.message.request_id)


class Inbox:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.running = 0
        self.running_max = 0
        self.gate = asyncio.Event()
        """While cleared, the handler waits."""
        self.gate.set()

    @property
    def numbers(self) -> list[int]:
        return [number_of(delivery) for delivery in self.deliveries]

    async def __call__(self, delivery: Delivery) -> None:
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.gate.wait()
            self.deliveries.append(delivery)
        finally:
            self.running -= 1

    async def until(self, count: int) -> None:
        """Wait for this many, more do not hurt."""
        await eventually(lambda: len(self.deliveries) >= count)


class Place(Protocol):
    """One broker."""

    url: str

    async def bus(self, on_dead_letter: Callable[[str], None] | None = None) -> Bus:
        """An open bus that is closed with the place."""

    async def inject(self, address: Address, body: bytes) -> None:
        """Publish any bytes."""

    async def depth(self, queue: str) -> int:
        """Messages that wait in a queue and are in nobody's hands."""

    async def dead_letters(self) -> list[bytes]:
        """The bodies in the dead-letter queue; a second call may give more."""


class _Buses:
    def __init__(self, url: str) -> None:
        self.url = url
        self._stack = AsyncExitStack()

    async def bus(self, on_dead_letter: Callable[[str], None] | None = None) -> Bus:
        bus = make_bus(self.url, service="test", on_dead_letter=on_dead_letter)
        await bus.open()
        self._stack.push_async_callback(bus.close)
        return bus

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()


class MemoryPlace(_Buses):
    """A MemoryBroker."""

    async def inject(self, address: Address, body: bytes) -> None:
        memory_broker(self.url).publish_bytes(address, body)

    async def depth(self, queue: str) -> int:
        return memory_broker(self.url).depths()[queue]

    async def dead_letters(self) -> list[bytes]:
        return [letter.body for letter in memory_broker(self.url).dead_letters]


class RabbitPlace(_Buses):
    """A virtual host, also seen over a connection of our own, by aio-pika alone."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._dead: list[bytes] = []
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._injecting: aio_pika.abc.AbstractChannel | None = None

    async def channel(self) -> aio_pika.abc.AbstractChannel:
        """A fresh one, closed with the place."""
        if self._connection is None:
            self._connection = await aio_pika.connect(self.url)
            self._stack.push_async_callback(self._connection.close)
        return await self._connection.channel(on_return_raises=True)

    async def inject(self, address: Address, body: bytes) -> None:
        if self._injecting is None:
            self._injecting = await self.channel()
        exchange = self._injecting.default_exchange
        if address.exchange:
            exchange = await self._injecting.get_exchange(address.exchange, ensure=False)
        await exchange.publish(aio_pika.Message(body), address.routing_key)

    async def depth(self, queue: str) -> int:
        channel = await self.channel()
        declared = await channel.declare_queue(queue, passive=True)
        await channel.close()
        return declared.declaration_result.message_count or 0

    async def dead_letters(self) -> list[bytes]:
        channel = await self.channel()
        queue = await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
        while (message := await queue.get(fail=False, no_ack=True)) is not None:
            self._dead.append(message.body)
        await channel.close()
        return list(self._dead)


async def until_dead(place: Place, count: int) -> list[bytes]:
    """Wait for this many dead letters."""
    async with asyncio.timeout(TIMEOUT_S):
        while len(letters := await place.dead_letters()) < count:
            await asyncio.sleep(0.02)
    return letters
