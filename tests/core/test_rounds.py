"""The core at its seam: when rounds are made, and that batches fit their workers."""

import pytest

from services.scheduler.core.presets import PRESETS
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import TRANSITIONS, State, drawn
from shared import tokens
from shared.messages import (
    Finished,
    GatewayBeat,
    Rejected,
    RunSlice,
    SchedulerCommand,
)
from tests.core.seam import LIVE, Bench, done, submit


def test_an_idle_mesh_answers_within_the_gather_time() -> None:
    bench = Bench()
    bench.join()
    bench.after(0.1)
    bench.say(submit())
    deadline = bench.core.deadline()
    assert deadline is not None
    assert deadline - bench.now == pytest.approx(LIVE.gather_s)


def test_busy_rounds_are_an_interval_apart() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    bench.say(submit("r2"))
    deadline = bench.core.books.rounds.last_at + 0.5 * run.expected_s
    assert bench.after(deadline - bench.now - 0.001) == []
    (second,) = bench.after(0.002)
    assert isinstance(second, RunSlice)


def test_few_requests_are_spread_over_idle_workers() -> None:
    bench = Bench()
    for name in ("w1", "w2", "w3"):
        bench.join(name)
    for number in range(3):
        bench.say(submit(f"r{number}"))
    runs = [command for command in bench.after(0.01) if isinstance(command, RunSlice)]
    assert {run.worker for run in runs} == {"w1", "w2", "w3"}


@pytest.mark.parametrize("policy", [name for name, row in PRESETS.items() if row.form == "closed"])
def test_no_batch_needs_more_than_its_worker_has(policy: str) -> None:
    """Workers of three sizes; requests that fit all, some, or only the largest."""
    constants = Constants(slice_tokens=16, waiting_max=1000, interval_floor_s=0.003, interval_s=0.1)
    bench = Bench(policy, constants)
    rooms = {"small": (120, 0), "narrow": (2000, 2), "large": (1500, 0)}
    for name, (capacity, rows) in rooms.items():
        bench.join(name, capacity=capacity, batch_size_max=rows)
    said: list[SchedulerCommand] = []
    for number in range(60):
        prompt = tokens.pack(range(5 + 17 * number % 900))
        said += bench.say(submit(f"r{number}", prompt=prompt))
    placed: set[str] = set()
    for _ in range(400):
        runs = [command for command in said if isinstance(command, RunSlice)]
        said = []
        for run in runs:
            capacity, rows = rooms[run.worker]
            longest = max(tokens.count(o.spec.prompt + o.tokens) for o in run.orders)
            assert len(run.orders) * (longest + run.iterations) <= 0.9 * capacity
            assert not rows or len(run.orders) <= rows
            placed |= {order.spec.request_id for order in run.orders}
            said += bench.say(done(run, finish="stop", count=3, capacity=capacity))
        for name, (capacity, rows) in rooms.items():
            bench.join(name, capacity=capacity, batch_size_max=rows)
        bench.say(GatewayBeat(gateway="g1"))
        said += bench.after(0.2)
    assert len(placed) == 60


def test_the_table_is_drawn() -> None:
    picture = drawn()
    assert picture.startswith("stateDiagram-v2\n    new --> collecting: collect\n")
    assert picture.count("-->") == len(TRANSITIONS)
    assert {source for source, _ in TRANSITIONS} == set(State)


def test_a_worker_is_never_given_more_batches_than_it_takes() -> None:
    constants = Constants(
        slice_tokens=16, waiting_max=1000, interval_floor_s=0.003, gather_s=0.003, batches_max=3
    )
    bench = Bench("scls", constants)
    bench.join(batch_size_max=2)
    for number in range(20):
        assert bench.say(submit(f"r{number}")) == []
    runs = [command for command in bench.after(0.5) if isinstance(command, RunSlice)]
    assert [len(run.orders) for run in runs] == [2, 2, 2]
    assert len(bench.core.books.requests.pool) == 14
    said = bench.say(done(runs[0])) + bench.after(0.2)
    assert [type(command) for command in said] == [RunSlice]


def test_a_draining_worker_s_refusals_are_not_the_request_s_fault() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    for _ in range(20):
        assert bench.say(done(run, refused="queue full")) == []
        bench.join()
        bench.say(GatewayBeat(gateway="g1"))
        (again,) = bench.after(0.6)
        assert isinstance(again, RunSlice)
        run = again


def test_what_no_worker_can_hold_any_more_is_refused() -> None:
    bench = Bench()
    bench.join("large")
    bench.join("large", draining=True)
    assert bench.say(submit(max_tokens=900)) == []
    said: list[SchedulerCommand] = []
    for _ in range(80):
        bench.join("small", context_tokens_max=200)
        bench.say(GatewayBeat(gateway="g1"))
        said += bench.after(0.5)
    rejected, ended = said
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.retry_after_s) == ("too_long", None)
    assert isinstance(ended, Finished)
    assert ended.reason == "error"
