"""RabbitMQ only: lines that are cut, brokers that are gone, queues that somebody deletes."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator

import aio_pika
import pytest
from structlog.testing import capture_logs

from shared.bus.api import Address, BusUnavailable, Delivery, QueueSpec, Unroutable
from shared.bus.connect import make_bus
from shared.bus.rabbit_line import connect
from shared.bus.topology import ORDERS, SCHEDULER_QUEUE, from_gateway, worker_queue
from tests.bus.line import Line
from tests.bus.place import Inbox, RabbitPlace, eventually, numbered
from tests.rabbitmq import Management

DURABLE = QueueSpec(name="q", kind="durable", bindings=(("x", "k"),))
KEY = Address("x", "k")
WORKER = Address(ORDERS, "worker.w")


@pytest.fixture
async def line(broker_url: str) -> AsyncIterator[Line]:
    async with Line(broker_url) as made:
        yield made


@pytest.fixture
async def far(line: Line) -> AsyncIterator[RabbitPlace]:
    """A fresh virtual host behind the line."""
    async with RabbitPlace(line.url) as made:
        yield made


async def test_no_broker_is_said_plainly(line: Line) -> None:
    line.refuse()
    bus = make_bus(line.url, service="test")
    with pytest.raises(BusUnavailable, match=r"no connection to amqp://guest:\*+@127") as caught:
        await bus.open(deadline_s=0.5)
    assert "guest:guest" not in str(caught.value)
    assert not bus.connected


async def test_the_bus_waits_for_a_broker_that_comes_later(line: Line) -> None:
    line.refuse()
    bus = make_bus(line.url, service="test")
    opening = asyncio.create_task(bus.open())
    await asyncio.sleep(0.3)
    assert not opening.done()
    line.accept()
    await opening
    assert bus.connected
    await bus.close()


async def test_a_wrong_password_is_said_plainly_and_at_once(broker_url: str) -> None:
    bus = make_bus(broker_url.replace("guest:guest", "guest:wrong"), service="test")
    async with asyncio.timeout(10):
        with pytest.raises(BusUnavailable, match=r"refuses user 'guest'.*ACCESS_REFUSED"):
            await bus.open(deadline_s=60.0)


@pytest.mark.parametrize(
    ("host", "cause"),
    [("127.0.0.1:{port}", "Connect"), ("nobody.invalid:5672", "not known|resolution")],
)
async def test_waiting_for_a_broker_says_why_again_and_again(host: str, cause: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # nobody answers here once it is closed
    url = f"amqp://guest:guest@{host.format(port=port)}/"
    with capture_logs() as logs, pytest.raises(BusUnavailable, match=cause):
        await connect(url, "test", deadline_s=2.0, notice_s=0.2)
    notices = [line for line in logs if line["event"] == "no broker yet"]
    assert len(notices) >= 2
    assert all(re.search(cause, line["cause"]) for line in notices)
    assert "guest:guest" not in str(logs)


async def test_nothing_is_lost_while_the_line_is_cut_again_and_again(
    line: Line, far: RabbitPlace
) -> None:
    sender, receiver = await far.bus(), await far.bus()
    inbox = Inbox()
    await receiver.consume(SCHEDULER_QUEUE, inbox)
    confirmed: list[int] = []

    async def send(first: int) -> None:
        for number in range(first, first + 60):
            await sender.publish(from_gateway("g"), numbered(number))
            confirmed.append(number)

    async with asyncio.TaskGroup() as tasks:
        for first in range(0, 600, 60):
            tasks.create_task(send(first))
        for cut_after in (50, 200, 350):
            await eventually(lambda: len(confirmed) >= cut_after)  # noqa: B023
            line.cut()
    await eventually(lambda: set(inbox.numbers) == set(range(600)))
    assert sorted(confirmed) == list(range(600))


async def test_order_holds_while_the_line_holds(line: Line, far: RabbitPlace) -> None:
    """After a cut a message may come again, but the first arrivals keep the sender's order."""
    sender, receiver = await far.bus(), await far.bus()
    inbox = Inbox()
    await receiver.consume(SCHEDULER_QUEUE, inbox)
    for number in range(100):
        if number == 50:
            line.cut()
        await sender.publish(from_gateway("g"), numbered(number))
    await eventually(lambda: set(inbox.numbers) == set(range(100)))
    assert list(dict.fromkeys(inbox.numbers)) == list(range(100))


async def test_after_a_cut_the_exclusive_queue_is_there_again(line: Line, far: RabbitPlace) -> None:
    sender, receiver = await far.bus(), await far.bus()
    inbox, told = Inbox(), asyncio.Event()
    receiver.on_reconnect(told.set)
    await receiver.consume(worker_queue("w"), inbox)
    await sender.publish(WORKER, numbered(1))
    await inbox.until(1)
    assert not told.is_set()
    line.cut()
    await asyncio.wait_for(told.wait(), 20)
    await sender.publish(WORKER, numbered(2))
    await inbox.until(2)
    assert inbox.numbers == [1, 2]
    assert receiver.connected


async def test_connections_closed_by_the_broker(
    rabbit: RabbitPlace, management: Management
) -> None:
    sender, receiver = await rabbit.bus(), await rabbit.bus()
    inbox, told = Inbox(), asyncio.Event()
    receiver.on_reconnect(told.set)
    await receiver.consume(worker_queue("w"), inbox)
    vhost = rabbit.url.rpartition("/")[2]
    names: list[str] = []
    async with asyncio.timeout(20):
        while len(names) < 4:  # the interface shows new connections with some delay
            names = await asyncio.to_thread(management.connections, vhost)
            await asyncio.sleep(0.05)
    for name in names:
        await asyncio.to_thread(management.close_connection, name)
    await asyncio.wait_for(told.wait(), 20)
    await sender.publish(WORKER, numbered(1))
    await inbox.until(1)
    assert await sender.raise_epoch() == 1


async def test_publishing_gives_up_at_its_deadline(line: Line, far: RabbitPlace) -> None:
    bus = await far.bus()
    await bus.declare(DURABLE)
    await bus.publish(KEY, numbered(0))
    line.stall()
    with pytest.raises(BusUnavailable, match=r"k at x: not confirmed within 0\.2 s"):
        await bus.publish(KEY, numbered(1), deadline_s=0.2)
    line.flow()
    await bus.publish(KEY, numbered(2))
    line.refuse()
    with pytest.raises(BusUnavailable):
        await bus.publish(KEY, numbered(3), deadline_s=0.2)
    await eventually(lambda: not bus.connected)
    line.accept()
    await bus.publish(KEY, numbered(4))
    inbox = Inbox()
    await bus.consume(DURABLE, inbox)
    await eventually(lambda: {0, 2, 4} <= set(inbox.numbers))


async def test_a_cancelled_publisher_stays_cancelled(line: Line, far: RabbitPlace) -> None:
    bus = await far.bus()
    await bus.declare(DURABLE)
    line.stall()
    publishing = asyncio.create_task(bus.publish(KEY, numbered(1)))
    await asyncio.sleep(0.05)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    line.flow()
    await bus.publish(KEY, numbered(2))


async def test_closing_without_a_broker_ends_and_tells_who_still_publishes(
    line: Line, far: RabbitPlace
) -> None:
    bus = await far.bus()
    await bus.consume(DURABLE, Inbox())
    await bus.publish(KEY, numbered(1))
    line.stall()
    publishing = asyncio.create_task(bus.publish(KEY, numbered(2)))
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        await bus.close()
        with pytest.raises(BusUnavailable):
            await publishing
    line.flow()


async def test_a_deleted_queue_is_made_again(rabbit: RabbitPlace) -> None:
    sender, receiver = await rabbit.bus(), await rabbit.bus()
    inbox, told = Inbox(), asyncio.Event()
    receiver.on_reconnect(told.set)
    await receiver.consume(DURABLE, inbox)
    channel = await rabbit.channel()
    await channel.queue_delete("q", if_unused=False, if_empty=False)
    await asyncio.wait_for(told.wait(), 20)
    await sender.publish(KEY, numbered(1))
    await inbox.until(1)


async def test_a_queue_with_other_arguments_is_an_error_with_advice(rabbit: RabbitPlace) -> None:
    bus = await rabbit.bus()
    channel = await rabbit.channel()
    await channel.declare_queue("q", durable=True)
    for attempt in (bus.declare(DURABLE), bus.consume(DURABLE, Inbox())):
        with pytest.raises(BusUnavailable, match="exists with other arguments"):
            await attempt
    other = QueueSpec(name="other", kind="durable", bindings=DURABLE.bindings)
    await bus.declare(other)
    await bus.publish(KEY, numbered(1))


async def test_odd_properties_do_not_stop_a_consumer(rabbit: RabbitPlace) -> None:
    bus, inbox = await rabbit.bus(), Inbox()
    await bus.consume(DURABLE, inbox)
    exchange = await (await rabbit.channel()).get_exchange("x", ensure=False)
    for headers in (
        {"traceparent": 5, "sent_at_us": "soon"},
        {"x": {"deep": [1, None, 2.5]}, "sent_at_us": -1},
        {"sent_at_us": 2**62},
        {},
    ):
        await exchange.publish(aio_pika.Message(b"rubbish", headers=headers), "k")  # type: ignore[arg-type]
    await bus.publish(KEY, numbered(1), {"traceparent": "t"})
    await inbox.until(1)
    assert inbox.deliveries[0].headers == {"traceparent": "t"}


async def test_the_number_of_unhandled_deliveries_is_bounded(line: Line, far: RabbitPlace) -> None:
    """A line that breaks while messages lie in the prefetch does not make them dead letters."""
    bus, sender = await far.bus(), await far.bus()
    inbox = Inbox()
    inbox.gate.clear()
    await bus.consume(DURABLE, inbox)
    for number in range(20):
        await sender.publish(KEY, numbered(number))
    told = asyncio.Event()
    bus.on_reconnect(told.set)
    for _ in range(6):
        told.clear()
        line.cut()
        await asyncio.wait_for(told.wait(), 20)
    inbox.gate.set()
    await eventually(lambda: set(inbox.numbers) == set(range(20)))
    assert await far.dead_letters() == []


async def test_a_stale_delivery_is_not_handled(line: Line, far: RabbitPlace) -> None:
    """What a lost channel delivered is left alone; the broker sends it again."""
    bus, sender = await far.bus(), await far.bus()
    handled: list[Delivery] = []
    gate = asyncio.Event()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery)
        await gate.wait()

    await bus.consume(DURABLE, handler)
    for number in range(10):
        await sender.publish(KEY, numbered(number))
    await eventually(lambda: len(handled) == 1)
    line.cut()
    await eventually(lambda: not bus.connected)
    gate.set()
    await eventually(lambda: len(handled) >= 11)
    assert [delivery.redelivered for delivery in handled] == [False] + [True] * 10


async def test_unroutable_after_the_receiver_was_cut_off_for_good(
    line: Line, far: RabbitPlace, broker_url: str
) -> None:
    receiver = await far.bus()
    await receiver.consume(worker_queue("w"), Inbox())
    sender = make_bus(broker_url, service="test")
    await sender.open()
    line.refuse()

    async def until_unroutable() -> None:
        while True:
            await sender.publish(WORKER, numbered(1))
            await asyncio.sleep(0.02)

    with pytest.raises(Unroutable):
        await asyncio.wait_for(until_unroutable(), 20)
    await sender.close()
    line.accept()
