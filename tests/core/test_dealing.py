"""SLS's dispatch: complete batches go to the workers in turn, others wait for an idle one."""

from services.scheduler.core.settings import Constants
from shared.messages import RunSlice, SchedulerCommand
from tests.core.seam import Bench, done, submit

CONSTANTS = Constants(batch_size=3, waiting_max=1000, worker_timeout_s=60.0)


def runs_of(commands: list[SchedulerCommand]) -> list[tuple[str, int]]:
    """(worker, rows) of each batch that is sent."""
    return [(c.worker, len(c.orders)) for c in commands if isinstance(c, RunSlice)]


def busy_bench(constants: Constants) -> tuple[Bench, list[RunSlice]]:
    """Two workers, each with a batch of one that came while nobody had anything to do."""
    bench = Bench("sls", constants)
    bench.join("w1")
    bench.join("w2")
    said = bench.say(submit("a")) + bench.say(submit("b")) + bench.after(0.01)
    first = [command for command in said if isinstance(command, RunSlice)]
    assert {run.worker for run in first} == {"w1", "w2"}
    return bench, first


def told(bench: Bench, count: int) -> list[tuple[str, int]]:
    """What is sent while so many requests come."""
    commands: list[SchedulerCommand] = []
    for number in range(count):
        commands += bench.say(submit(f"r{number}"))
    return runs_of(commands + bench.after(0.3))


def test_complete_batches_are_dealt_to_busy_workers_in_turn() -> None:
    bench, _ = busy_bench(CONSTANTS)
    workers = [worker for worker, rows in told(bench, 12) if rows == 3]
    assert len(workers) == 4
    assert workers[0] == workers[2] != workers[1] == workers[3]


def test_an_incomplete_batch_waits_until_a_worker_has_nothing_to_do() -> None:
    bench, first = busy_bench(CONSTANTS)
    assert told(bench, 2) == []
    said = bench.say(done(first[1], finish="stop", count=3)) + bench.after(0.3)
    assert runs_of(said) == [(first[1].worker, 2)]


def test_without_dealing_only_idle_workers_get_a_batch() -> None:
    bench, first = busy_bench(Constants(batch_size=3, waiting_max=1000, deal_ahead=False))
    assert told(bench, 6) == []
    said = bench.say(done(first[0], finish="stop", count=3)) + bench.after(0.3)
    assert runs_of(said) == [(first[0].worker, 3)]


def test_serving_the_idle_does_not_move_the_turn_of_the_dealt() -> None:
    """Only w1 falls idle, again and again; what is dealt meanwhile goes to everybody in turn."""
    bench = Bench("sls", CONSTANTS)
    for name in ("w1", "w2", "w3"):
        bench.join(name)
    said = [*bench.say(submit("a")), *bench.say(submit("b")), *bench.say(submit("c"))]
    here = [c for c in said + bench.after(0.01) if isinstance(c, RunSlice)]
    dealt: list[str] = []
    for turn in range(6):
        mine = [run for run in here if run.worker == "w1"]
        here = [run for run in here if run.worker != "w1"]
        for run in mine:
            bench.say(done(run, finish="stop", count=3))
        said = bench.say(submit(f"s{turn}")) + bench.after(0.3)
        here += [c for c in said if isinstance(c, RunSlice)]
        said = [c for number in range(3) for c in bench.say(submit(f"d{turn}-{number}"))]
        said += bench.after(0.01)
        here += [c for c in said if isinstance(c, RunSlice)]
        dealt += [worker for worker, rows in runs_of(said) if rows == 3]
    assert dealt == ["w1", "w2", "w3"] * 2
