"""A round that takes several calls: the same decisions, and none that events have overtaken."""

from dataclasses import replace
from random import Random

import pytest

from services.scheduler.core.presets import PRESETS
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import Cancel, RunSlice, SchedulerBeat, SchedulerCommand, SchedulerEvent
from tests.core.seam import Bench, beat_of, done, submit
from tests.core.test_world import LIVE, make_trouble, make_world
from tests.core.world import STORM

CLOSED = [name for name, row in PRESETS.items() if row.form == "closed"]
WHOLE = Constants(
    slice_tokens=16,
    waiting_max=1000,
    interval_s=0.1,
    interval_floor_s=0.05,
    interval_share=0.01,
    round_work_max=10**9,
)
STEPS = replace(WHOLE, round_work_max=1)


def finish_round(bench: Bench) -> tuple[list[SchedulerCommand], int]:
    """What the core says if it is woken until it wants no more now, and in how many calls."""
    said: list[SchedulerCommand] = []
    calls = 0
    while (deadline := bench.core.deadline()) is not None and deadline <= bench.now:
        said += bench.core.wake(bench.now)
        calls += 1
        assert calls < 10_000
    return [command for command in said if not isinstance(command, SchedulerBeat)], calls


def history(policy: str, constants: Constants) -> tuple[list[SchedulerCommand], int]:
    """Two hundred requests on workers of three sizes, round after round; and how often the core
    wanted to be woken again at once."""
    bench = Bench(policy, constants)
    capacities = {"a": 2000, "b": 600, "c": 2000, "d": 1500}
    said: list[SchedulerCommand] = []
    calls = 0

    def tell(event: SchedulerEvent) -> list[SchedulerCommand]:
        nonlocal calls
        first = bench.say(event)
        rest, woken = finish_round(bench)
        calls += woken
        said.extend(first + rest)
        return first + rest

    for number in range(200):
        prompt = tokens.pack(range(3 + 37 * number % 400))
        tell(submit(f"r{number}", prompt=prompt, priority=number % 3))
    open_runs: list[RunSlice] = []
    for _ in range(30):
        bench.now += 0.06
        for name, capacity in capacities.items():
            fresh = tell(beat_of(name, capacity=capacity, batch_size_max=5))
            open_runs += [command for command in fresh if isinstance(command, RunSlice)]
        for run in open_runs[:3]:
            fresh = tell(done(run, capacity=capacities[run.worker]))
            open_runs += [command for command in fresh if isinstance(command, RunSlice)]
        del open_runs[:3]
    return said, calls


@pytest.mark.parametrize("policy", CLOSED)
def test_a_round_in_steps_decides_as_one_in_whole(policy: str) -> None:
    whole, few = history(policy, WHOLE)
    steps, many = history(policy, STEPS)
    runs = [command for command in whole if isinstance(command, RunSlice)]
    assert len(runs) > 20
    assert few < 20 < many
    assert steps == whole


def in_the_middle(policy: str) -> tuple[Bench, list[SchedulerCommand]]:
    """A round of which the first batch has gone out and the others are planned."""
    bench = Bench(policy, replace(STEPS, gather_s=0.01))
    for name in ("w1", "w2", "w3"):
        bench.say(beat_of(name, batch_size_max=4))
    for number in range(30):
        bench.say(submit(f"r{number}"))
    bench.now += 0.2
    said: list[SchedulerCommand] = []
    while not [command for command in said if isinstance(command, RunSlice)]:
        said += bench.core.wake(bench.now)
    assert bench.core.deadline() == bench.now
    return bench, said


def placed(said: list[SchedulerCommand]) -> list[str]:
    runs = [command for command in said if isinstance(command, RunSlice)]
    return [order.spec.request_id for run in runs for order in run.orders]


@pytest.mark.parametrize("policy", ["pm", "ab", "scls"])
def test_who_left_in_the_middle_of_a_round_is_not_placed(policy: str) -> None:
    bench, said = in_the_middle(policy)
    gone = [name for name in (f"r{n}" for n in range(30)) if name not in placed(said)][::2]
    for request_id in gone:
        said += bench.say(Cancel(gateway="g1", request_id=request_id))
    said += finish_round(bench)[0]
    names = placed(said)
    assert len(names) == len(set(names))
    waiting = set(bench.core.books.requests.pool)
    assert not waiting & set(gone)
    assert set(names) | waiting | set(gone) == {f"r{n}" for n in range(30)}


@pytest.mark.parametrize("policy", ["pm", "ab", "scls"])
@pytest.mark.parametrize("how", ["draining", "leaving", "smaller"])
def test_a_worker_that_changes_in_the_middle_of_a_round(policy: str, how: str) -> None:
    """What was meant for it waits for the next round, and then goes elsewhere."""
    bench, said = in_the_middle(policy)
    changed = {"draining": {"draining": True}, "leaving": {"leaving": True}}.get(
        how, {"capacity": 5}
    )
    before = len(said)
    for name in ("w2", "w3"):
        said += bench.say(beat_of(name, batch_size_max=4, **changed))
    meanwhile = len(said)
    said += finish_round(bench)[0]
    runs = [command for command in said[meanwhile:] if isinstance(command, RunSlice)]
    assert before <= meanwhile
    assert {run.worker for run in runs} <= {"w1"}
    left = set(bench.core.books.requests.pool)
    assert left, "somebody was meant for the others"
    for _ in range(20):
        bench.now += 0.3
        bench.say(beat_of("w1", batch_size_max=4))
        bench.core.books.gateways["g1"] = bench.now
        said += finish_round(bench)[0]
    again = set(placed(said[meanwhile:]))
    assert left <= again


@pytest.mark.parametrize("policy", CLOSED)
@pytest.mark.parametrize("seed", range(2))
def test_storm_with_rounds_in_steps(policy: str, seed: int) -> None:
    world = make_world(policy, seed, constants=replace(LIVE, round_work_max=1))
    world.add_gateway()
    rng = Random(seed)
    world.net.faults = STORM
    for number in range(10):
        gateway = rng.choice(list(world.gateways.values()))
        for part in range(4):
            length = 1 + int(rng.expovariate(1 / 40))
            gateway.submit(f"{number}-{part}", rng.randint(1, 200), length, 120)
        world.run(rng.uniform(0.1, 1.5))
        make_trouble(world, rng)
    world.add_worker()
    world.run_until_done(400)
    world.check_drained()
