"""What storms (`python -m sim.storm`) have found in the cores, each by itself."""

from msgspec.structs import replace

from services.gateway.core.ledger import Ledger, Promised
from shared import tokens
from shared.messages import (
    Accepted,
    Cancel,
    Drop,
    Recall,
    Renewal,
    Resident,
    Resume,
    RunSlice,
    SchedulerBeat,
    SliceResult,
)
from tests.core.seam import Bench, spec_of, submit
from tests.core.test_lease_faults import bench_of, join, listing, made, placed, told


def test_a_lease_that_is_used_up_while_a_new_leader_collects_goes_on_when_that_is_over() -> None:
    """Seed 61: it paused until the worker's next listing, ten seconds later."""
    bench = bench_of("vllm", epoch=2)
    join(bench)
    bench.say(listing(Resident(request_id="r1", attempt=7, position=0, until=9)))
    bench.say(Resume(spec=spec_of(max_tokens=34), attempt=0))
    bench.say(told(made(7, 0, 9)))
    said = bench.after(1.5)
    assert not [command for command in said if isinstance(command, Drop)]
    assert max(r.until for r in _renewals(said)) > 9


def test_a_lease_that_ends_while_a_new_leader_collects_is_not_taken_over() -> None:
    bench = bench_of("vllm", epoch=2)
    join(bench)
    bench.say(listing(Resident(request_id="r1", attempt=7, position=0, until=9)))
    bench.say(Resume(spec=spec_of(max_tokens=34), attempt=0, tokens=tokens.pack(range(4))))
    bench.say(told(made(7, 0, 9, resident=False)))
    assert not _renewals(bench.after(1.5))


def test_a_deposed_leader_drops_nothing_that_its_successor_placed() -> None:
    """Seed 5138: one that was stopped for seconds read on, dropped what it had just placed there,
    and still counted it."""
    bench = bench_of("past-future")
    join(bench)
    (run,) = placed(bench.say(submit(max_tokens=100)) + bench.after(0.01))
    assert run.epoch == 1
    of_successor = replace(told(made(2_000_001, 0, 9)), epoch=2)
    assert bench.say(of_successor) == []
    assert bench.core.books.requests.open["r1"].worker == "w1"


def test_a_drop_that_was_lost_is_said_again_for_a_request_that_was_cancelled() -> None:
    """Seed 1055: its lease was held until nobody had renewed it for thirty seconds."""
    bench = bench_of("past-future")
    join(bench)
    (run,) = placed(bench.say(submit(max_tokens=100)) + bench.after(0.01))
    attempt = run.orders[0].attempt
    drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=attempt)
    assert drop in bench.say(Cancel(gateway="g1", request_id="r1"))
    still = Resident(request_id="r1", attempt=attempt, position=3, until=16)
    assert bench.say(listing(still)) == [drop]


def test_a_closed_batch_that_was_taken_over_is_over_although_its_request_was_cancelled() -> None:
    """Seed 2333: it counted as load of its worker until it was overdue, two minutes later."""
    bench = Bench("sls", epoch=2)
    bench.join(residents=(Resident(request_id="r1", attempt=7, position=0),), residents_listed=True)
    bench.say(Resume(spec=spec_of("r1"), attempt=0))
    bench.after(1.1)
    worker = bench.core.books.workers.active["w1"]
    assert worker.load_s > 0
    bench.say(Cancel(gateway="g1", request_id="r1"))
    cancelled = SliceResult(request_id="r1", attempt=7, position=0, finish_reason="cancelled")
    done = told(cancelled, batch_id="1-3")
    bench.say(replace(done, form="closed"))
    assert worker.load_s == 0.0


def test_a_promise_of_a_new_leader_is_a_new_epoch() -> None:
    """Seed 2030: a promise came before the new leader's first beat, and a recall of the old one
    was obeyed after it."""
    ledger = Ledger("g1", told=True)
    ledger.handle(SchedulerBeat(epoch=1), 0.0)
    ledger.open(spec_of("r1"), 0.0, 100.0)
    accepted = Accepted(epoch=2, gateway="g1", request_id="r1", start_s=1.0, finish_s=2.0)
    resumed = Resume(spec=spec_of("r1"), attempt=0)
    assert ledger.handle(accepted, 1.0) == [resumed, Promised("r1", 1.0, 2.0)]
    assert ledger.handle(Recall(epoch=1, gateway="g1", request_id="r1", attempt=1), 1.1) == []


def _renewals(said: list[object]) -> list[Renewal]:
    return [r for command in said if isinstance(command, RunSlice) for r in command.renewals]
