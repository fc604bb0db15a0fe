"""What storms (`python -m sim.storm`) have found in the cores, each by itself."""

from msgspec.structs import replace

from services.gateway.core.ledger import Ledger, Patience, Promised
from shared import tokens
from shared.messages import (
    Accepted,
    Cancel,
    Drop,
    Finished,
    GatewayBeat,
    OrderReturned,
    Recall,
    Renewal,
    Resident,
    Resume,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceResult,
    TokensWanted,
)
from tests.core.seam import Bench, done, spec_of, submit
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


def test_a_closed_batch_whose_order_was_lost_is_over_although_its_request_was_cancelled() -> None:
    """Seeds 355, 1511 and 6172: nobody was left in it to be missed, so it counted as load until it
    was overdue, two minutes later."""
    bench = Bench("sls")
    bench.join()
    bench.run_one()
    worker = bench.core.books.workers.active["w1"]
    bench.say(Cancel(gateway="g1", request_id="r1"))
    bench.after(1.0)
    bench.join(residents_listed=True)
    assert worker.load_s > 0, "the order may still be on its way"
    bench.after(1.1)
    here = Resident(request_id="r1", attempt=1, position=0)
    bench.join(residents=(here,), residents_listed=True)
    assert worker.load_s > 0, "it runs: the drop was lost"
    bench.join(residents_listed=True)
    assert worker.load_s == 0.0


def test_what_a_gateway_has_closed_stays_closed_when_an_older_word_comes_late() -> None:
    """Seed 911: a new leader heard that attempts up to 1,000,000 are closed, then an older word
    again. It took over a lease whose tokens the gateway dropped, and its tail was asked for every
    minute or two."""
    bench = bench_of("vllm", epoch=3)
    join(bench)
    bench.say(listing(Resident(request_id="r1", attempt=7, position=9, until=9)))
    bench.say(Resume(spec=spec_of(max_tokens=34), attempt=1_000_000))
    bench.say(Resume(spec=spec_of(max_tokens=34), attempt=0))
    said = bench.after(1.5)
    assert Drop(epoch=3, worker="w1", request_id="r1", attempt=7) in said
    assert [command.attempt for command in said if isinstance(command, Recall)] == [2_000_000]


def test_nobody_is_asked_for_the_truth_when_its_gateway_is_gone() -> None:
    """Seed 292: a worker's word that it has no such tokens came after the gateway that missed them
    had died; its request was opened again, and recalled for half a minute."""
    bench = Bench()
    bench.join()
    bench.say(done(bench.run_one(), finish="stop"))
    wanted = TokensWanted(gateway="g1", request_id="r1", attempt=0, position=0)
    assert isinstance(bench.say(wanted)[0], SendTokens)
    for _ in range(4):
        bench.after(1.0)
        bench.join()
    assert bench.core.books.gateways == {}
    none = SliceResult(request_id="r1", attempt=1, position=0)
    gone = told(none, refused="unknown request")
    assert bench.say(replace(gone, form="closed")) == []
    bench.say(OrderReturned(worker="w1"))
    assert bench.core.books.requests.open == {}


def test_who_is_asked_for_tokens_and_dies_does_not_keep_a_gateway_waiting() -> None:
    """Seed 6176: a worker was dead, but not missed yet, when the tail of an output that had ended
    was asked of it. The gateway asked again after two minutes; by then the end was forgotten, and
    published a second time."""
    bench = Bench()
    bench.join()
    bench.say(done(bench.run_one(), finish="stop"))
    wanted = TokensWanted(gateway="g1", request_id="r1", attempt=0, position=0)
    assert isinstance(bench.say(wanted)[0], SendTokens)
    for _ in range(2):
        bench.after(1.0)
        bench.say(GatewayBeat(gateway="g1"))
    assert bench.core.books.workers.active == {}
    assert "r1" in bench.core.books.requests.recalling
    bench.join("w2")
    (run,) = bench.say(Resume(spec=spec_of("r1"), attempt=1)) + bench.after(0.01)
    ends = [c for c in bench.say(done(run, finish="stop")) if isinstance(c, Finished)]
    assert (run.worker, ends) == ("w2", []), "its end is told once"


def test_patience_begins_anew_with_a_new_line() -> None:
    """Seed 6176: questions after two lost lines counted as two questions about one silence."""
    ledger = Ledger("g1")
    ledger.open(spec_of("r1"), 0.0, 1000.0)
    for at in (1.0, 3.0, 5.0):
        assert len(ledger.reconnected(at)) == 1
    assert ledger.wake(30.0) == []
    assert ledger.deadline() == 5.0 + 2 * Patience().first_silence_s


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
