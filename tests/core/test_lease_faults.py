"""Leases and what may go wrong with them: takeovers, refusals, lost messages, lost workers."""

import msgspec
import pytest

from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Cancel,
    Drop,
    Park,
    Renewal,
    Resident,
    Resume,
    RunSlice,
    SchedulerCommand,
    SliceDone,
    SliceResult,
    SliceTimings,
    WorkerBeat,
    WorkerMemory,
)
from tests.core.seam import LIVE, Bench, beat_of, spec_of, submit

CAPACITY = 1000
EARLY = ("vllm", "tgi", "sal+larry", "ils")


def bench_of(policy: str, constants: Constants = LIVE, epoch: int = 1) -> Bench:
    return Bench(policy, constants, epoch)


def join(bench: Bench, name: str = "w1", **changes: object) -> list[SchedulerCommand]:
    values = {"forms": ("leased",), "capacity": CAPACITY, **changes}
    return bench.say(beat_of(name, **values))


def listing(*residents: Resident, name: str = "w1") -> WorkerBeat:
    beat = beat_of(name, forms=("leased",), capacity=CAPACITY)
    return msgspec.structs.replace(beat, residents=residents, residents_listed=True)


def told(
    *results: SliceResult, batch_id: str = "", refused: str = "", capacity: int = CAPACITY
) -> SliceDone:
    return SliceDone(
        epoch=1,
        worker="w1",
        batch_id=batch_id,
        form="leased",
        results=results,
        timings=SliceTimings(),
        memory=WorkerMemory(kv_tokens_capacity=capacity),
        refused=refused,
    )


def made(attempt: int, begin: int, end: int, **changes: object) -> SliceResult:
    return SliceResult(
        request_id="r1",
        attempt=attempt,
        position=begin,
        tokens=tokens.pack(range(begin, end)),
        **{"resident": True, **changes},  # type: ignore[arg-type]
    )


def placed(said: list[SchedulerCommand], name: str = "w1") -> list[RunSlice]:
    return [c for c in said if isinstance(c, RunSlice) and c.worker == name and c.orders]


def renewals(said: list[SchedulerCommand]) -> list[Renewal]:
    return [r for c in said if isinstance(c, RunSlice) for r in c.renewals]


def test_a_new_leader_takes_leases_over_as_long_as_they_are() -> None:
    bench = bench_of("vllm", epoch=2)
    spec = spec_of(max_tokens=400)
    resident = Resident(request_id="r1", attempt=7, position=30, until=250)
    join(bench)
    bench.say(listing(resident))
    bench.say(Resume(spec=spec, attempt=0, tokens=tokens.pack(range(30))))
    said = bench.after(1.5)
    assert renewals(said) == [Renewal(request_id="r1", attempt=7, until=250)]
    credit = bench.core.books.workers.active["w1"].credit
    assert credit.blocks == 10 + 250 - 1
    goes_on = bench.say(told(made(7, 0, 247)))
    assert [r.until > 250 for r in renewals(goes_on)] == [True]


def test_a_report_from_beyond_the_lease_that_we_know_of_raises_it() -> None:
    bench = bench_of("vllm", epoch=2)
    join(bench)
    bench.say(listing(Resident(request_id="r1", attempt=7, position=10)))
    bench.say(Resume(spec=spec_of(max_tokens=400), attempt=0, tokens=tokens.pack(range(10))))
    bench.after(1.5)
    said = bench.say(told(made(7, 0, 120)))
    assert [r.until > 120 for r in renewals(said)] == [True]


@pytest.mark.parametrize("policy", [*EARLY, "past-future"])
def test_a_refused_request_is_tried_again_after_the_rest(policy: str) -> None:
    bench = bench_of(policy)
    join(bench)
    said = bench.say(submit(max_tokens=100)) + bench.after(0.01)
    (run,) = placed(said)
    assert not placed(bench.say(told(batch_id=run.batch_id, refused="out of memory: x")))
    said = bench.say(beat_of("w1", forms=("leased",), capacity=CAPACITY)) + bench.after(1.0)
    assert len(placed(said)) == 1


@pytest.mark.parametrize("policy", EARLY)
def test_nobody_is_bound_to_a_worker_that_cannot_hold_him(policy: str) -> None:
    bench = bench_of(policy)
    join(bench, "w1", context_tokens_max=50)
    join(bench, "w2", context_tokens_max=1000)
    for number in range(4):
        said = bench.say(submit(f"r{number}", max_tokens=100)) + bench.after(0.01)
        assert not placed(said, "w1")
        assert placed(said, "w2")


def test_who_was_to_be_parked_on_a_lost_worker_is_not_parked_on_the_next() -> None:
    bench = bench_of("aggressive")
    join(bench, capacity=60)
    for number in (1, 2):
        bench.say(submit(f"r{number}", max_tokens=40))
    bench.after(0.01)
    parked: list[str] = []
    for request_id in ("r1", "r2") * 6:
        request = bench.core.books.requests.open[request_id]
        if not parked:
            report = made(request.attempt, request.output_tokens, request.until)
            report = msgspec.structs.replace(report, request_id=request_id)
            said = bench.say(told(report, capacity=60))
            parked = [c.request_id for c in said if isinstance(c, Park)]
    assert len(parked) == 1
    bench.say(msgspec.structs.replace(beat_of("w1", forms=("leased",)), leaving=True))
    assert not bench.core.books.parking


def test_a_lost_renewal_is_said_again_at_the_next_listing() -> None:
    bench = bench_of("past-future")
    join(bench)
    (run,) = placed(bench.say(submit(max_tokens=100)) + bench.after(0.01))
    attempt = run.orders[0].attempt
    (renewal,) = renewals(bench.say(told(made(attempt, 0, 14))))
    lost = Resident(request_id="r1", attempt=attempt, position=16, until=16)
    assert renewals(bench.say(listing(lost))) == [renewal]


def test_a_lost_report_of_a_paused_lease_is_noticed_at_the_next_listing() -> None:
    bench = bench_of("past-future")
    join(bench)
    (run,) = placed(bench.say(submit(max_tokens=100)) + bench.after(0.01))
    attempt = run.orders[0].attempt
    paused = Resident(request_id="r1", attempt=attempt, position=16, until=16)
    (renewal,) = renewals(bench.say(listing(paused)))
    assert renewal.until > 16
    said = bench.say(told(made(attempt, 16, 20)))
    assert [c for c in said if isinstance(c, Drop)], "its first tokens are not known: recalled"


def test_a_new_leader_renews_what_has_paused_meanwhile() -> None:
    bench = bench_of("past-future", epoch=2)
    join(bench)
    bench.say(listing(Resident(request_id="r1", attempt=7, position=32, until=32)))
    bench.say(Resume(spec=spec_of(max_tokens=100), attempt=0, tokens=tokens.pack(range(30))))
    said = bench.after(1.5)
    assert max(r.until for r in renewals(said)) > 32
    assert not [c for c in said if isinstance(c, Drop)]


def test_engine_evictions_are_no_refusals() -> None:
    bench = bench_of("past-future")
    join(bench)
    said = bench.say(submit(max_tokens=100)) + bench.after(0.01)
    for _ in range(20):
        (run,) = placed(said)
        gone = made(run.orders[0].attempt, 0, 0, resident=False, evicted=True)
        said = bench.say(told(gone)) + bench.after(0.01)
    assert "r1" in bench.core.books.requests.open
    bench.say(Cancel(gateway="g1", request_id="r1"))
    assert not bench.core.books.requests.open


def test_a_lease_to_the_end_wants_no_other_and_keeps_nobody_out() -> None:
    bench = bench_of("tgi")
    join(bench)
    (run,) = placed(bench.say(submit(max_tokens=40)) + bench.after(0.01))
    assert not renewals(bench.say(told(made(run.orders[0].attempt, 0, 39))))
    assert placed(bench.say(submit("r2", max_tokens=40)) + bench.after(0.01))
