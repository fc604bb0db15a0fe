"""Conformance of every bus: failing handlers, rubbish, consumers that come and go."""

import asyncio
from collections import Counter

import pytest

from shared.bus.api import (
    DELIVERY_LIMIT,
    Address,
    BusUnavailable,
    Delivery,
    QueueSpec,
    Subscription,
)
from shared.bus.topology import (
    ASKS,
    BEAT,
    ESTIMATOR_QUEUE,
    HISTORY,
    INBOX,
    NOTICES,
    ORDERS,
    SCHEDULER_QUEUE,
    TOKENS,
    estimator_beat_queue,
    from_gateway,
    gateway_queue,
    worker_queue,
)
from shared.messages import encode
from tests.bus.place import Inbox, Place, RabbitPlace, eventually, number_of, numbered, until_dead

DURABLE = QueueSpec(name="q", kind="durable", bindings=(("x", "k"),))
EXCLUSIVE = QueueSpec(name="q", kind="exclusive", bindings=(("x", "k"),))
KEY = Address("x", "k")
RUBBISH = (b"", b"\x00", b"{}", b"\xc1\xff", b"\x81\xa4type\xa7Unknown", bytes(1000))


class Refusing(Inbox):
    """A handler that fails on number 13, as often as it is told to."""

    def __init__(self, failures: int, error: type[Exception] = ValueError) -> None:
        super().__init__()
        self.failures = failures
        self.error = error
        self.calls: Counter[int] = Counter()
        self.redelivered: list[bool] = []

    async def __call__(self, delivery: Delivery) -> None:
        number = number_of(delivery)
        self.calls[number] += 1
        if number == 13:
            self.redelivered.append(delivery.redelivered)
            if self.calls[13] <= self.failures:
                raise self.error("13 brings bad luck")
        await super().__call__(delivery)


@pytest.mark.parametrize("queue", [DURABLE, EXCLUSIVE], ids=lambda queue: queue.kind)
async def test_a_failed_message_comes_again(place: Place, queue: QueueSpec) -> None:
    bus, inbox = await place.bus(), Refusing(failures=DELIVERY_LIMIT - 1)
    await bus.consume(queue, inbox)
    for number in (12, 13, 14):
        await bus.publish(KEY, numbered(number))
    await inbox.until(3)
    assert sorted(inbox.numbers) == [12, 13, 14]
    assert inbox.calls == {12: 1, 13: DELIVERY_LIMIT, 14: 1}
    assert inbox.redelivered == [False] + [True] * (DELIVERY_LIMIT - 1)
    assert await place.dead_letters() == []


async def test_a_handler_without_a_bus_condemns_no_message(place: Place) -> None:
    failures = DELIVERY_LIMIT + 2
    bus, inbox = await place.bus(), Refusing(failures, BusUnavailable)
    await bus.consume(DURABLE, inbox)
    await bus.publish(KEY, numbered(13))
    await inbox.until(1)
    assert inbox.calls[13] == failures + 1


@pytest.mark.parametrize("queue", [DURABLE, EXCLUSIVE], ids=lambda queue: queue.kind)
async def test_a_message_that_always_fails_becomes_a_dead_letter(
    place: Place, queue: QueueSpec
) -> None:
    counted: list[str] = []
    bus, inbox = await place.bus(counted.append), Refusing(failures=1000)
    await bus.consume(queue, inbox)
    for number in (12, 13, 14):
        await bus.publish(KEY, numbered(number))
    assert await until_dead(place, 1) == [encode(numbered(13))]
    await inbox.until(2)
    assert inbox.numbers == [12, 14]
    assert inbox.calls[13] == DELIVERY_LIMIT
    assert counted == ["q"]
    await bus.publish(KEY, numbered(15))
    await inbox.until(3)


@pytest.mark.parametrize("queue", [DURABLE, EXCLUSIVE], ids=lambda queue: queue.kind)
async def test_rubbish_becomes_a_dead_letter_at_once(place: Place, queue: QueueSpec) -> None:
    counted: list[str] = []
    bus, inbox = await place.bus(counted.append), Inbox()
    await bus.consume(queue, inbox)
    for number, body in enumerate(RUBBISH):
        await place.inject(KEY, body)
        await bus.publish(KEY, numbered(number))
    await inbox.until(len(RUBBISH))
    assert inbox.numbers == list(range(len(RUBBISH)))
    assert sorted(await until_dead(place, len(RUBBISH))) == sorted(RUBBISH)
    assert counted == ["q"] * len(RUBBISH)


async def test_five_hundred_pieces_of_rubbish_in_every_queue(place: Place) -> None:
    counted: Counter[str] = Counter()
    bus = await place.bus(lambda queue: counted.update([queue]))
    queues = {
        SCHEDULER_QUEUE: Address(INBOX, "worker.b"),
        ESTIMATOR_QUEUE: Address(HISTORY, "finished"),
        estimator_beat_queue("b"): Address(HISTORY, BEAT),
        gateway_queue("b"): Address(TOKENS, "gateway.b"),
        worker_queue("b"): Address(ASKS, "worker.b"),
    }
    inboxes = [Inbox() for _ in queues]
    for queue, inbox in zip(queues, inboxes, strict=True):
        await bus.consume(queue, inbox)
    for address in queues.values():
        await place.inject(address, RUBBISH[0])
        await asyncio.gather(*(place.inject(address, RUBBISH[n % 6]) for n in range(1, 500)))
    await eventually(lambda: counted.total() == 500 * len(queues))
    for address, inbox in zip(queues.values(), inboxes, strict=True):
        await bus.publish(address, numbered(1))
        await inbox.until(1)
    assert counted == {queue.name: 500 for queue in queues}
    assert len(await until_dead(place, 500 * len(queues))) == 500 * len(queues)


async def test_only_one_consumer_is_active_and_the_other_takes_over(place: Place) -> None:
    sender, first, second = await place.bus(), await place.bus(), await place.bus()
    leading, waiting = Inbox(), Inbox()
    await first.consume(SCHEDULER_QUEUE, leading)
    await second.consume(SCHEDULER_QUEUE, waiting)
    for number in range(50):
        await sender.publish(from_gateway("g"), numbered(number))
    await leading.until(50)
    assert waiting.numbers == []
    leading.gate.clear()
    for number in range(50, 100):
        await sender.publish(from_gateway("g"), numbered(number))
    await eventually(lambda: leading.running == 1)
    closing = asyncio.create_task(first.close())
    await asyncio.sleep(0)
    leading.gate.set()
    await closing
    await waiting.until(100 - len(leading.numbers))
    assert leading.numbers + waiting.numbers == list(range(100))


async def test_two_consumers_share_a_queue(place: Place) -> None:
    buses = [await place.bus(), await place.bus()]
    inboxes = [Inbox(), Inbox()]
    queue = QueueSpec(name="q", kind="durable", bindings=DURABLE.bindings, prefetch=2)
    for bus, inbox in zip(buses, inboxes, strict=True):
        inbox.gate.clear()
        await bus.consume(queue, inbox)
    for number in range(20):
        await buses[0].publish(KEY, numbered(number))
    await eventually(lambda: all(inbox.running for inbox in inboxes))
    for inbox in inboxes:
        inbox.gate.set()
    await eventually(lambda: sum(len(inbox.numbers) for inbox in inboxes) >= 20)
    assert sorted(inboxes[0].numbers + inboxes[1].numbers) == list(range(20))
    assert all(inbox.numbers for inbox in inboxes)


async def test_a_closed_subscription_gives_back_what_it_did_not_handle(place: Place) -> None:
    bus, inbox, later = await place.bus(), Inbox(), Inbox()
    await bus.declare(DURABLE)
    for number in range(10):
        await bus.publish(KEY, numbered(number))
    inbox.gate.clear()
    subscription = await bus.consume(DURABLE, inbox)
    await eventually(lambda: inbox.running == 1)
    closing = asyncio.create_task(subscription.close())
    await asyncio.sleep(0)
    inbox.gate.set()
    await closing
    await bus.consume(DURABLE, later)
    await later.until(9)
    assert inbox.numbers == [0]
    assert later.numbers == list(range(1, 10))
    assert all(delivery.redelivered for delivery in later.deliveries)


async def test_a_handler_may_close_its_own_subscription(place: Place) -> None:
    bus, later = await place.bus(), Inbox()
    subscriptions: list[Subscription] = []
    handled: list[int] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(number_of(delivery))
        await subscriptions[0].close()

    await bus.declare(DURABLE)
    subscriptions.append(await bus.consume(DURABLE, handler))
    for number in range(3):
        await bus.publish(KEY, numbered(number))
    await eventually(lambda: bool(handled))
    await bus.consume(DURABLE, later)
    await later.until(2)
    assert handled == [0]
    assert later.numbers == [1, 2]


async def test_a_handler_may_publish_to_its_own_queue(place: Place) -> None:
    bus = await place.bus()
    seen: list[int] = []

    async def handler(delivery: Delivery) -> None:
        seen.append(number_of(delivery))
        if seen[-1] < 20:
            await bus.publish(KEY, numbered(seen[-1] + 1))

    await bus.consume(EXCLUSIVE, handler)
    await bus.publish(KEY, numbered(0))
    await eventually(lambda: seen == list(range(21)))


async def test_rubbish_in_the_epoch_queue_does_not_matter(rabbit: RabbitPlace) -> None:
    bus = await rabbit.bus()
    assert await bus.raise_epoch() == 1
    for piece in range(30):
        await rabbit.inject(Address("", "tranche.epoch"), RUBBISH[piece % 6])
    assert await bus.raise_epoch() == 2
    assert len(await until_dead(rabbit, 30)) == 30


async def test_orders_and_notices_reach_only_their_receiver(place: Place) -> None:
    bus, one, two = await place.bus(), Inbox(), Inbox()
    await bus.consume(worker_queue("1"), one)
    await bus.consume(worker_queue("2"), two)
    await bus.consume(gateway_queue("1"), two)
    await bus.publish(Address(ORDERS, "worker.1"), numbered(1))
    await bus.publish(Address(NOTICES, "gateway.1"), numbered(2))
    await one.until(1)
    await two.until(1)
    assert (one.numbers, two.numbers) == ([1], [2])
