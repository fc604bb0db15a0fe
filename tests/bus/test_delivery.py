"""Conformance of every bus: what arrives, where, in which order, and with what beside it."""

import asyncio
import time

import pytest

from shared.bus.api import Address, Bus, BusFull, BusUnavailable, QueueSpec, Unroutable
from shared.bus.connect import make_bus
from shared.bus.topology import (
    BEAT,
    NOTICES,
    ORDERS,
    SCHEDULER_QUEUE,
    from_gateway,
    from_worker,
    gateway_queue,
    worker_queue,
)
from shared.messages import RequestSpec, SchedulerBeat, Submit
from tests.bus.place import Inbox, Place, eventually, numbered

QUEUE = QueueSpec(name="q", kind="durable", bindings=(("x", "a.*"),))
TO_QUEUE = Address("x", "a.b")


async def publish_until_full(bus: Bus) -> list[int]:
    """The numbers that were accepted. A limit of 10 may be noticed late, but not very late, and
    a consumer may hold its prefetch of 100 in addition."""
    accepted: list[int] = []
    for number in range(300):
        try:
            await bus.publish(TO_QUEUE, numbered(number))
        except BusFull:
            return accepted
        accepted.append(number)
    pytest.fail("300 messages fitted into a queue for 10")


async def test_messages_arrive_in_order_one_call_at_a_time(place: Place) -> None:
    sender, receiver = await place.bus(), await place.bus()
    inbox = Inbox()
    await receiver.consume(SCHEDULER_QUEUE, inbox)
    for number in range(300):
        await sender.publish(from_gateway("g"), numbered(number))
    await inbox.until(300)
    assert inbox.numbers == list(range(300))
    assert inbox.running_max == 1


async def test_many_tasks_publish_at_once(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    await bus.consume(SCHEDULER_QUEUE, inbox)
    async with asyncio.TaskGroup() as tasks:
        for number in range(1000):
            tasks.create_task(bus.publish(from_gateway("g"), numbered(number)))
    await inbox.until(1000)
    assert sorted(inbox.numbers) == list(range(1000))


@pytest.mark.parametrize(
    ("pattern", "reached"),
    [
        ("a.b", {"a.b"}),
        ("*.b", {"a.b"}),
        ("a.*", {"a.b"}),
        ("*", {"a"}),
        ("a.#", {"a", "a.b", "a.b.c"}),
        ("#.c", {"a.b.c"}),
        ("a.#.c", {"a.b.c"}),
        ("#", {"a", "a.b", "a.b.c"}),
        ("a.*.*", {"a.b.c"}),
        ("b", set()),
    ],
)
async def test_topic_patterns(place: Place, pattern: str, reached: set[str]) -> None:
    bus, inbox = await place.bus(), Inbox()
    await bus.consume(QueueSpec(name="q", kind="exclusive", bindings=(("x", pattern),)), inbox)
    for key in ("a", "a.b", "a.b.c"):
        await bus.publish(Address("x", key), numbered(0), mandatory=False)
    await inbox.until(len(reached))
    assert {delivery.routing_key for delivery in inbox.deliveries} == reached
    assert len(inbox.deliveries) == len(reached)


async def test_a_beat_reaches_everybody_once(place: Place) -> None:
    bus, inboxes = await place.bus(), [Inbox() for _ in range(4)]
    for inbox, queue in zip(
        inboxes,
        (gateway_queue("1"), gateway_queue("2"), worker_queue("1"), worker_queue("2")),
        strict=True,
    ):
        await bus.consume(queue, inbox)
    for exchange in (NOTICES, ORDERS):
        await bus.publish(Address(exchange, BEAT), SchedulerBeat(epoch=7), persistent=False)
    for inbox in inboxes:
        await inbox.until(1)
        assert [delivery.message for delivery in inbox.deliveries] == [SchedulerBeat(epoch=7)]


async def test_headers_and_times_come_along(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    await bus.consume(SCHEDULER_QUEUE, inbox)
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    before = time.time()
    await bus.publish(from_worker("w"), numbered(1), {**headers, "tracestate": "a=b"})
    await inbox.until(1)
    delivery = inbox.deliveries[0]
    assert delivery.headers == {**headers, "tracestate": "a=b"}
    assert delivery.routing_key == "worker.w"
    assert not delivery.redelivered
    assert before - 0.001 <= delivery.sent_at <= delivery.received_at <= time.time()
    assert 0.0 <= delivery.queue_wait_s < 20.0


async def test_a_megabyte(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    await bus.consume(SCHEDULER_QUEUE, inbox)
    prompt = bytes(range(256)) * 4096
    submit = Submit(
        spec=RequestSpec(
            request_id="r", parent_id="r", gateway="g", model="m", prompt=prompt, max_tokens=1
        )
    )
    await bus.publish(from_gateway("g"), submit)
    await inbox.until(1)
    assert inbox.deliveries[0].message == submit


async def test_nobody_there_is_unroutable(place: Place) -> None:
    bus = await place.bus()
    with pytest.raises(Unroutable, match=r"worker\.gone"):
        await bus.publish(Address(ORDERS, "worker.gone"), numbered(1))
    await bus.publish(Address(ORDERS, "worker.gone"), numbered(1), mandatory=False)
    with pytest.raises(Unroutable):
        await bus.publish(Address("an.exchange.never.seen", "k"), numbered(1))


async def test_an_exclusive_queue_goes_with_its_bus(place: Place) -> None:
    sender, receiver = await place.bus(), await place.bus()
    inbox = Inbox()
    await receiver.consume(worker_queue("w"), inbox)
    await sender.publish(Address(ORDERS, "worker.w"), numbered(1))
    await inbox.until(1)
    await receiver.close()
    with pytest.raises(Unroutable):
        await sender.publish(Address(ORDERS, "worker.w"), numbered(2))


async def test_a_declared_queue_keeps_messages_for_later(place: Place) -> None:
    sender = await place.bus()
    await sender.declare(QUEUE)
    for number in range(3):
        await sender.publish(TO_QUEUE, numbered(number))
    await sender.close()
    receiver, inbox = await place.bus(), Inbox()
    await receiver.consume(QUEUE, inbox)
    await inbox.until(3)
    assert inbox.numbers == [0, 1, 2]


async def test_a_full_queue_refuses_and_recovers(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    small = QueueSpec(name="q", kind="exclusive", bindings=QUEUE.bindings, length_max=10)
    inbox.gate.clear()
    await bus.consume(small, inbox)
    accepted = await publish_until_full(bus)
    assert len(accepted) >= small.length_max
    inbox.gate.set()
    await inbox.until(len(accepted))
    await bus.publish(TO_QUEUE, numbered(-1))
    await inbox.until(len(accepted) + 1)
    assert inbox.numbers == [*accepted, -1]


async def test_a_full_durable_queue_refuses(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    small = QueueSpec(name="q", kind="durable", bindings=QUEUE.bindings, length_max=10)
    await bus.declare(small)
    accepted = await publish_until_full(bus)
    await bus.consume(small, inbox)
    await inbox.until(len(accepted))
    assert inbox.numbers == accepted


async def test_copies_for_an_onlooker_hold_nobody_up(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    copies = QueueSpec(
        name="q",
        kind="exclusive",
        bindings=QUEUE.bindings,
        prefetch=5,
        length_max=10,
        overhears=True,
    )
    inbox.gate.clear()
    await bus.consume(copies, inbox)
    for number in range(100):
        await bus.publish(TO_QUEUE, numbered(number))
    await place.inject(TO_QUEUE, b"no message")
    inbox.gate.set()
    await eventually(lambda: bool(inbox.numbers) and inbox.numbers[-1] == 99)
    assert inbox.numbers[0] == 0, "the oldest in hand, and then the newest"
    assert len(inbox.numbers) < 50
    assert await place.dead_letters() == []


async def test_a_slow_consumer_leaves_the_backlog_in_the_broker(place: Place) -> None:
    sender, receiver = await place.bus(), await place.bus()
    inbox = Inbox()
    inbox.gate.clear()
    queue = QueueSpec(name="q", kind="durable", bindings=QUEUE.bindings, prefetch=5)
    await receiver.consume(queue, inbox)
    for number in range(100):
        await sender.publish(TO_QUEUE, numbered(number))
    assert await place.depth("q") == 95
    inbox.gate.set()
    await inbox.until(100)
    assert inbox.numbers == list(range(100))


async def test_old_messages_expire(place: Place) -> None:
    bus, inbox = await place.bus(), Inbox()
    queue = QueueSpec(name="q", kind="durable", bindings=QUEUE.bindings, message_ttl_s=0.05)
    await bus.declare(queue)
    await bus.publish(TO_QUEUE, numbered(1))
    async with asyncio.timeout(10):
        while await place.depth("q"):
            await asyncio.sleep(0.02)
    await bus.consume(queue, inbox)
    await bus.publish(TO_QUEUE, numbered(2))
    await inbox.until(1)
    assert inbox.numbers == [2]


async def test_closing_waits_for_what_is_being_published(place: Place) -> None:
    sender, receiver = await place.bus(), await place.bus()
    await sender.declare(QUEUE)
    publishing = [
        asyncio.create_task(sender.publish(TO_QUEUE, numbered(number))) for number in range(100)
    ]
    await asyncio.sleep(0)  # all have begun
    await sender.close()
    await asyncio.gather(*publishing)
    inbox = Inbox()
    await receiver.consume(QUEUE, inbox)
    await inbox.until(100)
    assert sorted(inbox.numbers) == list(range(100))


async def test_handled_messages_are_settled_when_the_bus_closes(place: Place) -> None:
    first, second = await place.bus(), await place.bus()
    inbox = Inbox()
    await first.consume(QUEUE, inbox)
    for number in range(50):
        await second.publish(TO_QUEUE, numbered(number))
    await inbox.until(50)
    await first.close()
    assert await place.depth("q") == 0


async def test_a_bus_that_is_not_open_says_so(any_bus_url: str) -> None:
    bus = make_bus(any_bus_url, service="test")
    assert not bus.connected
    with pytest.raises(BusUnavailable, match="not open"):
        await bus.publish(TO_QUEUE, numbered(1))
    await bus.open()
    assert bus.connected
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable, match="not open"):
        await bus.consume(QUEUE, Inbox())
    await bus.close()


async def test_every_epoch_is_given_once(place: Place) -> None:
    buses = [await place.bus() for _ in range(3)]
    raced = await asyncio.gather(*(bus.raise_epoch() for bus in buses for _ in range(3)))
    assert sorted(raced) == list(range(1, 10))
    assert await buses[1].raise_epoch() == 10


async def test_depth_falls_to_zero_while_the_consumer_idles(place: Place) -> None:
    """Acknowledgements are batched but not forgotten: nothing comes again to the next consumer."""
    first, second = await place.bus(), await place.bus()
    inbox, later = Inbox(), Inbox()
    subscription = await first.consume(QUEUE, inbox)
    await second.publish(TO_QUEUE, numbered(1))
    await inbox.until(1)
    await subscription.close()
    await second.publish(TO_QUEUE, numbered(2))
    await second.consume(QUEUE, later)
    await later.until(1)
    await eventually(lambda: later.numbers == [2])
