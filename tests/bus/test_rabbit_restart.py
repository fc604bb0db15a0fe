"""RabbitMQ only: a broker of our own runs out of memory, is killed with -9 and comes up again."""

import asyncio
from collections.abc import Iterator

import pytest

from shared.bus.api import Address, BusUnavailable, QueueSpec
from shared.bus.topology import ORDERS, SCHEDULER_QUEUE, from_gateway, worker_queue
from tests.bus.place import Inbox, RabbitPlace, eventually, numbered
from tests.rabbitmq import BOOT_TIMEOUT_S, Broker, make_broker

QUEUE = QueueSpec(name="q", kind="durable", bindings=(("x", "k"),))
KEY = Address("x", "k")
WORKER = Address(ORDERS, "worker.w")


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    made = make_broker()
    made.start()
    yield made
    made.close()


async def test_a_broker_out_of_memory_blocks_publishers_only(broker: Broker) -> None:
    async with RabbitPlace(broker.url) as place:
        bus, inbox = await place.bus(), Inbox()
        await bus.declare(QUEUE)
        await bus.publish(KEY, numbered(1))
        await asyncio.to_thread(broker.control, "set_vm_memory_high_watermark", "0")
        for number in (2, 3):
            with pytest.raises(BusUnavailable):
                await bus.publish(KEY, numbered(number), deadline_s=0.3)
        await bus.consume(QUEUE, inbox)
        await inbox.until(1)
        assert bus.connected
        await asyncio.to_thread(broker.control, "set_vm_memory_high_watermark", "0.4")
        await bus.publish(KEY, numbered(4))
        await eventually(lambda: 4 in inbox.numbers)
        assert await bus.raise_epoch() == 1


async def test_a_killed_broker_comes_back_and_nothing_is_lost(broker: Broker) -> None:
    async with RabbitPlace(broker.url) as place:
        sender, receiver = await place.bus(), await place.bus()
        work, orders, told = Inbox(), Inbox(), asyncio.Event()
        receiver.on_reconnect(told.set)
        await receiver.consume(SCHEDULER_QUEUE, work)
        await receiver.consume(worker_queue("w"), orders)
        epoch = await sender.raise_epoch()
        await asyncio.to_thread(broker.wait_until_written)
        confirmed: list[int] = []

        async def send(first: int) -> None:
            for number in range(first, first + 100):
                await sender.publish(
                    from_gateway("g"), numbered(number), deadline_s=BOOT_TIMEOUT_S + 30
                )
                confirmed.append(number)

        async with asyncio.TaskGroup() as tasks:
            for first in range(0, 1000, 100):
                tasks.create_task(send(first))
            await eventually(lambda: len(confirmed) >= 300)
            await asyncio.to_thread(broker.kill)
            await eventually(lambda: not sender.connected and not receiver.connected)
            assert len(confirmed) < 1000
            await asyncio.to_thread(broker.start)
        await eventually(lambda: set(work.numbers) == set(range(1000)))
        await asyncio.wait_for(told.wait(), 20)
        await sender.publish(WORKER, numbered(1))
        await orders.until(1)
        assert await sender.raise_epoch() == epoch + 1
