"""The outbox and the journal: order for each receiver, bounds, and what happens to errors."""

import asyncio
from pathlib import Path

import pytest

from services.scheduler import journal as journals
from services.scheduler.core.replay import (
    BadJournal,
    Started,
    Step,
    records,
    replay,
    started,
    to_bytes,
)
from services.scheduler.core.settings import Constants
from services.scheduler.journal import Journal
from services.scheduler.outbox import IN_FLIGHT_MAX, WAITING_MAX, Outbox
from shared.bus.api import Address, BusError, Unroutable
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.messages import Drop, Message, SchedulerBeat, SchedulerCommand

TIMEOUT_S = 5.0


class SlowBus(MemoryBus):
    """Confirms only when the test lets it; remembers what went out."""

    def __init__(self) -> None:
        super().__init__(MemoryBroker())
        self.sent: list[Message] = []
        self.in_flight = self.in_flight_max = 0
        self.confirm = asyncio.Event()
        self.gone: set[str] = set()

    async def publish(self, address: Address, message: Message, *_: object, **__: object) -> None:
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        await self.confirm.wait()
        self.in_flight -= 1
        if address.routing_key in self.gone:
            raise Unroutable(address.routing_key)
        self.sent.append(message)


def drop(worker: str, number: int) -> Drop:
    return Drop(epoch=1, worker=worker, request_id="r", attempt=number)


async def test_each_receiver_s_messages_stay_in_order_and_few_are_under_way() -> None:
    bus = SlowBus()
    errors: list[SchedulerCommand] = []
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        outbox = Outbox(bus, tasks, lambda command, error: errors.append(command))
        for number in range(5):
            for worker in range(2 * IN_FLIGHT_MAX):
                outbox.put(drop(f"w{worker}", number))
        bus.gone = {"worker.w3"}
        await asyncio.sleep(0)
        bus.confirm.set()
        await outbox.drained()
    assert bus.in_flight_max == IN_FLIGHT_MAX
    assert outbox.waiting == 0
    for worker in range(2 * IN_FLIGHT_MAX):
        told = [m.attempt for m in bus.sent if isinstance(m, Drop) and m.worker == f"w{worker}"]
        assert told == ([] if worker == 3 else [0, 1, 2, 3, 4])
    assert [command.attempt for command in errors if isinstance(command, Drop)] == [0, 1, 2, 3, 4]


async def test_a_full_outbox_makes_the_inbox_wait() -> None:
    bus = SlowBus()

    def fail(command: SchedulerCommand, error: BusError) -> None:
        raise AssertionError(command) from error

    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        outbox = Outbox(bus, tasks, fail)
        for number in range(WAITING_MAX + 1):
            outbox.put(drop("w1", number))
        assert outbox.full
        waiting = tasks.create_task(outbox.wait_for_room())
        await asyncio.sleep(0)
        assert not waiting.done()
        bus.confirm.set()
        await waiting
        outbox.clear()
        await outbox.drained()


async def test_a_beat_that_has_not_gone_out_is_replaced() -> None:
    bus = SlowBus()
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        outbox = Outbox(bus, tasks, lambda command, error: None)
        for epoch in range(1, 100):
            outbox.put(SchedulerBeat(epoch=epoch))
        assert outbox.waiting == 3
        bus.confirm.set()
        await outbox.drained()
    assert bus.sent == [SchedulerBeat(epoch=99)] * 3


def test_a_journal_ends_at_its_greatest_size(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, bytes_max=4000)
    journal.record(started("scls", Constants()))
    for number in range(100):
        journal.record(Step(now=float(number), event=None, commands=()))
    assert journal.error == "it reached its greatest size"
    journal.close()
    kept = list(records(path.read_bytes()))
    assert path.stat().st_size <= 4000
    assert isinstance(kept[0], Started)
    assert len(kept) > 5
    assert replay(path.read_bytes()[:-3])[1] is None


def test_a_journal_can_be_read_while_its_scheduler_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat is enough for that, soon after."""
    monkeypatch.setattr(journals, "FLUSHED_S", 0.0)
    path = tmp_path / "journal"
    journal = Journal(path, bytes_max=10_000)
    journal.record(started("scls", Constants()))
    journal.record(Step(now=1.0, event=None, commands=()))
    assert len(list(records(path.read_bytes()))) == 2
    journal.close()


def test_a_damaged_journal_says_where() -> None:
    whole = to_bytes(started("scls", Constants()))
    broken = to_bytes(Step(now=1.0, event=None, commands=())).replace(b"now", b"\xd8ow")
    with pytest.raises(BadJournal, match=f"damaged.* at byte {len(whole)}"):
        list(records(whole + broken))


@pytest.mark.parametrize("data", [b"\xff" * 8, b"\x00\x00\x00\x02ok", b"\x00\x00\x00\x01\xc0"])
def test_what_is_no_journal_is_refused(data: bytes) -> None:
    with pytest.raises(BadJournal, match="no journal"):
        replay(data)
