"""Draining from outside, on a bus in memory: who is meant, who is told, and how the wait ends."""

import asyncio

import pytest

from services.cli import main
from services.drain import Ending, Progress, Roll, UnknownWorker, drain
from shared.bus.api import Delivery
from shared.bus.identity import new_id
from shared.bus.memory import MemoryBus
from shared.bus.topology import (
    addresses_of,
    from_worker,
    onlooker_queue,
    worker_queue,
)
from shared.messages import DrainWorker, SchedulerBeat, WorkerBeat, WorkerBeats
from tests.core.seam import beat_of

LIMIT_S = 10.0
EPOCH = 7


def heard(roll: Roll, *beats: WorkerBeat, key: str = "") -> None:
    """As if each had come from its worker, or all under this key."""
    for beat in beats:
        name = key or from_worker(beat.info.worker).routing_key
        delivery = Delivery(message=beat, routing_key=name, sent_at=0.0, received_at=0.0)
        asyncio.run(roll.on_delivery(delivery))


def test_a_worker_is_found_by_its_name_or_the_beginning_of_its_id() -> None:
    roll, one, ten = Roll(), new_id("w1"), new_id("w10")
    heard(roll, beat_of(one), beat_of(ten))
    assert roll.find(one[:8]) == roll.find(one) == one
    assert roll.find("w10") == ten
    for wanted, text in (("w", "several"), ("x", "no worker 'x'"), ("", "no worker")):
        with pytest.raises(UnknownWorker, match=text) as error:
            roll.find(wanted)
        assert one[:11] in str(error.value)
        assert one not in str(error.value), "the secret part of an id is shown to nobody"


def test_an_exact_name_is_meant_though_others_begin_so() -> None:
    roll = Roll()
    heard(roll, beat_of("w1"), beat_of("w10"), beat_of("w11", leaving=True))
    assert roll.find("w1") == "w1"
    with pytest.raises(UnknownWorker):
        roll.find("w11")


def test_a_beat_in_another_s_name_is_not_believed() -> None:
    roll = Roll()
    heard(roll, beat_of("w1"), key="worker.w2")
    assert roll.beats == {}
    with pytest.raises(UnknownWorker, match="none has spoken"):
        roll.find("w1")


async def test_workers_that_share_a_process_are_heard() -> None:
    roll = Roll()
    beats = tuple(beat_of(f"host.{n}") for n in range(3))
    said = WorkerBeats(host="host", beats=beats)
    await roll.on_delivery(Delivery(said, "worker.host", sent_at=0.0, received_at=0.0))
    assert roll.find("host.2") == "host.2"


def test_whose_requests_cannot_move_is_told() -> None:
    roll = Roll()
    heard(roll, beat_of("w1"), beat_of("w2", draining=True))
    assert len(roll.warnings("w1")) == 2
    heard(roll, beat_of("w3"))
    assert ["no scheduler" in text for text in roll.warnings("w1")] == [True]


class Worker:
    """Beats when it is told, and keeps what it is ordered."""

    def __init__(self, bus: MemoryBus, name: str) -> None:
        self.name = name
        self.orders: list[DrainWorker] = []
        self._bus = bus

    async def obey(self, delivery: Delivery) -> None:
        """Drains at the first order, leaves at its next beat."""
        if isinstance(delivery.message, DrainWorker):
            self.orders.append(delivery.message)
            await self.beat(draining=True)
            await self.beat(draining=True, leaving=True)

    async def beat(self, **changes: object) -> None:
        await self._bus.publish(
            from_worker(self.name), beat_of(self.name, epoch=EPOCH, **changes), mandatory=False
        )


async def started(bus: MemoryBus, name: str) -> tuple[Roll, Worker]:
    """An onlooker that has heard the worker once."""
    roll, worker = Roll(), Worker(bus, name)
    await bus.consume(onlooker_queue(new_id("drain")), roll.on_delivery)
    await worker.beat()
    leader = SchedulerBeat(epoch=EPOCH, workers=1)
    await bus.publish(addresses_of(leader)[0], leader)
    await roll.called(least_s=0.0, most_s=LIMIT_S)
    return roll, worker


async def test_the_order_has_the_worker_s_epoch_and_its_goodbye_ends_the_wait(
    memory_bus: MemoryBus,
) -> None:
    roll, worker = await started(memory_bus, "w1")
    await memory_bus.consume(worker_queue("w1"), worker.obey)
    told: list[Progress] = []
    assert await drain(memory_bus, roll, "w1", LIMIT_S, told.append) is Ending.LEFT
    assert worker.orders == [DrainWorker(epoch=EPOCH, worker="w1")]
    assert told[0].draining is False
    assert told[-1].draining is True


async def test_who_does_not_obey_is_told_again_and_stays(memory_bus: MemoryBus) -> None:
    roll, worker = await started(memory_bus, "w1")
    received: list[Delivery] = []

    async def deaf(delivery: Delivery) -> None:
        received.append(delivery)
        if len(received) < 3:
            await worker.beat()

    await memory_bus.consume(worker_queue("w1"), deaf)
    ending = await drain(memory_bus, roll, "w1", 0.3, lambda _: None)
    assert ending is Ending.STAYS
    assert len(received) == 3


async def test_who_is_gone_without_a_word_has_vanished(
    memory_bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.drain.SILENCE_S", 0.05)
    roll, _ = await started(memory_bus, "w1")
    ending = await drain(memory_bus, roll, "w1", LIMIT_S, lambda _: None)
    assert ending is Ending.VANISHED


def test_a_mesh_in_one_process_is_told_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANCHE_DRAIN_BUS", raising=False)
    for arguments in ([], ["--bus", "memory://"]):
        with pytest.raises(SystemExit) as ending:
            main(["drain", "worker-1", *arguments])
        shown = capsys.readouterr()
        assert ending.value.code == 1
        assert all(word in shown.err for word in ("make serve", "--bus", "TRANCHE_DRAIN_BUS"))
        assert len(shown.err.splitlines()) == 1
