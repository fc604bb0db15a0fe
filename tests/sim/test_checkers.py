"""Each checker catches the bug that it is there for, planted into a run that was right."""

from collections.abc import Callable, Sequence

import msgspec
import pytest

from shared.messages import (
    Cancel,
    Drop,
    Finished,
    Message,
    Renewal,
    RunSlice,
    SliceDone,
    TokenBatch,
    WorkerBeat,
)
from shared.tokens import TOKEN_BYTES, pack
from sim.checker import Facts
from sim.checkers import judge
from sim.network import Seen
from sim.run import Outcome, run
from tests.sim.worlds import SEEN, items, lengths, setup

ITEMS = items(20)
Plant = Callable[[Message], Sequence[Message]]
"""What stands in the transcript instead of a message."""
replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def leased() -> Outcome:
    return run(setup("past-future", ITEMS, constants={"slice_tokens": 16}), keep=SEEN)


@pytest.fixture(scope="module")
def closed() -> Outcome:
    return run(setup("scls", ITEMS), keep=SEEN)


def rules(outcome: Outcome, kind: type, plant: Plant, **facts: float) -> set[str]:
    """The rules that are broken when the first message that `plant` changes is changed."""
    lines: list[Seen] = []
    planted: dict[int, Sequence[Message]] = {}
    for line in outcome.messages:
        message = line.message
        if isinstance(message, kind) and id(message) not in planted and len(planted) < 1:
            instead = plant(message)
            if list(instead) != [message]:
                planted[id(message)] = instead
        written = planted.get(id(message), (message,))
        lines.extend(Seen(line.at, line.moment, each) for each in written)
    assert planted, "nothing was planted"
    truth = lengths(outcome, ITEMS)
    assert judge(outcome.messages, Facts(truth)) == []
    found = judge(lines, Facts(truth, **facts))  # type: ignore[arg-type]
    return {violation.rule for violation in found}


def test_a_lost_finish(leased: Outcome) -> None:
    def lose(message: Message) -> Sequence[Message]:
        assert isinstance(message, TokenBatch)
        return [] if any(run.finish_reason for run in message.runs) else [message]

    assert rules(leased, TokenBatch, lose) == {"text"}


def test_a_token_that_came_twice(leased: Outcome) -> None:
    assert rules(leased, TokenBatch, lambda batch: [batch, batch]) == {"text"}


def test_a_foreign_token(leased: Outcome) -> None:
    def spoil(message: Message) -> Sequence[Message]:
        assert isinstance(message, TokenBatch)
        run = message.runs[0]
        ids = pack([7]) + run.ids[TOKEN_BYTES:]
        return [replace(message, runs=(replace(run, ids=ids), *message.runs[1:]))]

    assert rules(leased, TokenBatch, spoil) == {"text"}


def test_an_output_that_ends_too_early(leased: Outcome) -> None:
    def cut(message: Message) -> Sequence[Message]:
        assert isinstance(message, TokenBatch)
        run = message.runs[0]
        if run.finish_reason is None or len(run.ids) < 8:
            return [message]
        short = replace(run, ids=run.ids[:-TOKEN_BYTES])
        return [replace(message, runs=(short, *message.runs[1:]))]

    assert rules(leased, TokenBatch, cut) == {"text"}


def test_an_end_published_twice(leased: Outcome) -> None:
    assert rules(leased, Finished, lambda said: [said, said]) == {"text"}


def test_memory_promised_twice(leased: Outcome) -> None:
    def promise(message: Message) -> Sequence[Message]:
        assert isinstance(message, RunSlice)
        if not message.orders:
            return [message]
        order = replace(message.orders[0], lease_tokens=100_000)
        return [replace(message, orders=(order, *message.orders[1:]))]

    assert rules(leased, RunSlice, promise) == {"memory"}


def test_a_renewal_beyond_the_memory(leased: Outcome) -> None:
    def promise(message: Message) -> Sequence[Message]:
        assert isinstance(message, RunSlice)
        if not message.renewals:
            return [message]
        first = message.renewals[0]
        far = Renewal(request_id=first.request_id, attempt=first.attempt, until=100_000)
        return [replace(message, renewals=(far, *message.renewals[1:]))]

    assert rules(leased, RunSlice, promise) == {"memory"}


def test_a_closed_batch_beyond_the_memory(closed: Outcome) -> None:
    assert "memory" in rules(closed, RunSlice, lambda run: [replace(run, iterations=60_000)])


def test_more_memory_used_than_there_is(leased: Outcome) -> None:
    def boast(message: Message) -> Sequence[Message]:
        assert isinstance(message, SliceDone)
        memory = replace(message.memory, kv_tokens_used=message.memory.kv_tokens_capacity + 1)
        return [replace(message, memory=memory)]

    assert rules(leased, SliceDone, boast) == {"memory"}


@pytest.mark.parametrize("form", ["leased", "closed"])
def test_two_places_at_once(form: str, request: pytest.FixtureRequest) -> None:
    def double(message: Message) -> Sequence[Message]:
        assert isinstance(message, RunSlice)
        if not message.orders:
            return [message]
        other = "worker-2" if message.worker == "worker-1" else "worker-1"
        return [message, replace(message, worker=other)]

    assert "place" in rules(request.getfixturevalue(form), RunSlice, double)


@pytest.mark.parametrize("form", ["leased", "closed"])
def test_a_token_without_a_lease(form: str, request: pytest.FixtureRequest) -> None:
    def shorten(message: Message) -> Sequence[Message]:
        assert isinstance(message, RunSlice)
        orders = tuple(replace(order, lease_tokens=0) for order in message.orders)
        return [replace(message, orders=orders)] if orders else [message]

    assert "lease" in rules(request.getfixturevalue(form), RunSlice, shorten)


def test_a_lost_renewal_is_no_lease(leased: Outcome) -> None:
    def lose(message: Message) -> Sequence[Message]:
        assert isinstance(message, RunSlice)
        return [message] if message.orders else []

    assert "lease" in rules(leased, RunSlice, lose)


def test_a_wait_that_is_too_long(closed: Outcome) -> None:
    facts = Facts(lengths(closed, ITEMS), waiting_max_s=0.05)
    assert {violation.rule for violation in judge(closed.messages, facts)} == {"starvation"}


def test_a_lease_that_nobody_ends(leased: Outcome) -> None:
    def keep(message: Message) -> Sequence[Message]:
        assert isinstance(message, SliceDone)
        results = tuple(replace(r, resident=True, finish_reason=None) for r in message.results)
        ends = any(not r.resident for r in message.results)
        return [replace(message, results=results)] if ends else [message]

    assert "end" in rules(leased, SliceDone, keep)


def test_memory_that_nobody_freed(leased: Outcome) -> None:
    last = [s for s in leased.messages if isinstance(s.message, WorkerBeat)][-1]
    used = replace(last.message, memory=replace(last.message.memory, kv_tokens_used=16))  # type: ignore[attr-defined]
    lines = [*leased.messages, Seen(last.at + 0.1, "sent", used)]
    found = judge(lines, Facts(lengths(leased, ITEMS)))
    assert [violation.rule for violation in found] == ["end"]


def test_what_clients_take_back_is_not_lost(leased: Outcome) -> None:
    """A request that was cancelled need not end."""
    ends = [
        run.request_id
        for seen in leased.messages
        if isinstance(seen.message, TokenBatch) and seen.moment == "sent"
        for run in seen.message.runs
        if run.finish_reason
    ]
    lines = [
        seen
        for seen in leased.messages
        if not (
            isinstance(seen.message, TokenBatch)
            and any(run.request_id == ends[0] and run.finish_reason for run in seen.message.runs)
        )
    ]
    truth = Facts(lengths(leased, ITEMS))
    assert "text" in {violation.rule for violation in judge(lines, truth)}
    cancel = Cancel(gateway="gateway-1", request_id=ends[0])
    drop = Drop(epoch=1, worker="worker-1", request_id=ends[0], attempt=9)
    lines += [Seen(lines[-1].at, "sent", cancel), Seen(lines[-1].at, "got", drop)]
    assert judge(lines, truth) == []
