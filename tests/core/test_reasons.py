"""Why a request waits, where it is placed and why, and the story that a journal tells of it."""

import pytest

from services.scheduler.core import replay
from services.scheduler.core.explain import story
from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Elected,
    Park,
    Reading,
    Rejected,
    RunSlice,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from tests.core.seam import Bench, beat_of, submit

SMALL = Constants(slice_tokens=16, waiting_max=1000)


def leased(policy: str = "past-future", capacity: int = 1000, **changes: object) -> Bench:
    bench = Bench(policy, Constants(slice_tokens=16, waiting_max=1000, **changes))  # type: ignore[arg-type]
    bench.say(beat_of("w1", forms=("leased",), capacity=capacity))
    return bench


def order_of(commands: list[SchedulerCommand]) -> SliceOrder:
    (run,) = [command for command in commands if isinstance(command, RunSlice)]
    return run.orders[0]


def waits_for(bench: Bench, request_id: str) -> str:
    return bench.core.books.requests.open[request_id].waits_for


def test_an_idle_worker_and_certain_memory_are_told_apart() -> None:
    bench = leased()
    first = order_of(bench.say(submit("a")))
    second = order_of(bench.say(submit("b")))
    assert first.why is not None
    assert second.why is not None
    assert (first.why.came, first.why.waited_for) == ("new", "turn")
    assert (first.why.admitted_by, second.why.admitted_by) == ("idle", "sure")
    assert first.why.output_tokens == 40


@pytest.mark.parametrize("policy", ["past-future", "conservative", "tranche"])
def test_a_gate_that_refuses_says_what_it_needs_of_what_there_is(policy: str) -> None:
    bench = leased(policy, capacity=100)
    bench.say(submit("a", max_tokens=80))
    bench.say(submit("b", max_tokens=80))
    bench.say(submit("c", max_tokens=80))
    bench.say(submit("d", max_tokens=80))
    waiting = [r for r in bench.core.books.requests.open.values() if r.waits_for == "memory"]
    assert waiting
    for request in waiting:
        assert 0 < request.room_tokens <= 100
        assert request.needed_tokens >= request.room_tokens


def test_what_keeps_a_head_waiting_is_named() -> None:
    nobody = Bench("past-future", SMALL)
    nobody.say(submit("a"))
    assert waits_for(nobody, "a") == "workers"
    places = leased(running_max=1)
    places.say(submit("a"))
    places.say(submit("b"))
    places.say(submit("c"))
    assert (waits_for(places, "b"), waits_for(places, "c")) == ("places", "turn")
    prefill = leased(bind_backlog_tokens=5)
    prefill.say(submit("a"))
    prefill.say(submit("b"))
    assert waits_for(prefill, "b") == "prefill"
    room = leased(capacity=60)
    room.say(submit("a"))
    room.say(submit("b"))
    room.say(submit("c"))
    assert {waits_for(room, name) for name in "bc"} <= {"memory", "room", "turn"}


def test_a_slow_reader_waits_for_its_client() -> None:
    bench = leased(running_max=1)
    bench.say(submit("a"))
    bench.say(submit("b"))
    bench.say(Reading(gateway="g1", request_id="b", turn=1, paused=True))
    assert waits_for(bench, "b") == "reader"
    bench.say(Reading(gateway="g1", request_id="b", turn=2, paused=False))
    assert waits_for(bench, "b") in ("turn", "places")


class Recorded:
    """A core with a journal, and a worker that does at once what it is told."""

    def __init__(self, capacity: int) -> None:
        self.core = Scheduler(preset_named("aggressive"), SMALL)
        self.journal = replay.to_bytes(replay.started("aggressive", SMALL))
        self.now = 0.0
        self.capacity = capacity
        self.leases: dict[str, tuple[SliceOrder, int]] = {}
        self.made: dict[str, int] = {}
        self.parks: set[str] = set()
        self.say(Elected(epoch=1))
        self.say(beat_of("w1", forms=("leased",), capacity=capacity))

    def say(self, event: SchedulerEvent) -> None:
        commands = self.core.handle(event, self.now)
        step = replay.Step(now=self.now, event=event, commands=tuple(commands))
        self.journal += replay.to_bytes(step)
        for command in commands:
            if isinstance(command, RunSlice):
                for order in command.orders:
                    made = self.made.setdefault(order.spec.request_id, 0)
                    self.leases[order.spec.request_id] = (order, made + order.lease_tokens)
                for renewal in command.renewals:
                    self.leases[renewal.request_id] = (
                        self.leases[renewal.request_id][0],
                        renewal.until,
                    )
            elif isinstance(command, Park):
                self.parks.add(command.request_id)

    def turn(self) -> None:
        """Every lease is used up and reported; who is parked leaves."""
        self.now += 0.05
        results = []
        for name, (order, until) in list(self.leases.items()):
            begin, self.made[name] = self.made[name], max(self.made[name], until)
            parked, ended = name in self.parks, self.made[name] >= order.spec.max_tokens
            results.append(
                SliceResult(
                    request_id=name,
                    attempt=order.attempt,
                    position=begin,
                    tokens=tokens.pack(range(begin, self.made[name])),
                    resident=not (parked or ended),
                    finish_reason="length" if ended else None,
                )
            )
            if parked or ended:
                del self.leases[name]
                self.parks.discard(name)
        self.say(
            SliceDone(
                epoch=1,
                worker="w1",
                batch_id="",
                form="leased",
                results=tuple(results),
                timings=SliceTimings(),
                memory=WorkerMemory(kv_tokens_capacity=self.capacity),
            )
        )


def test_a_journal_tells_the_story_of_a_request_that_was_parked() -> None:
    world = Recorded(capacity=100)
    for name in ("first", "second", "third", "fourth", "fifth"):
        world.say(submit(name, max_tokens=60))
    for _ in range(60):
        world.turn()
    assert world.core.books.evictions >= 1
    assert not world.core.books.requests.open
    evicted = [r for r in world.core.books.requests.done.values() if r.evictions]
    told = story(world.journal, evicted[0].request_id[:5])
    text = "\n".join(told)
    assert told[0] == f"request {evicted[0].request_id}"
    assert "at most 60 output" in told[1]
    for part in (
        "placed on w1 (attempt 1)",
        "first token after",
        "told to park: no blocks are left",
        "back for want of memory",
        "ended (length) after",
        "60 tokens, predicted 60",
        f"evicted {evicted[0].evictions} times",
    ):
        assert part in text, text
    assert story(world.journal, "nobody") == []
    waited = "\n".join(story(world.journal, "fifth"))
    assert "taken in, waits for" in waited


def test_a_journal_tells_why_a_request_was_refused() -> None:
    world = Recorded(capacity=100)
    world.say(submit("long", max_tokens=500))
    told = story(world.journal, "long")
    assert len(told) == 2
    assert "refused (too_long): prompt and output of up to 510 tokens" in told[1]


def test_a_refusal_for_a_deadline_carries_what_was_predicted() -> None:
    bench = leased(running_max=1)
    for number in range(4):
        bench.say(submit(f"q{number}"))
    (answer,) = bench.say(submit("late", deadline_ms=1))
    assert isinstance(answer, Rejected)
    assert 0 < answer.start_s <= answer.finish_s
