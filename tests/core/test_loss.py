"""The core at its seam: lost workers, lost tokens, lost leaders."""

from typing import Any

import pytest

from services.scheduler.core.presets import preset_named
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Drop,
    GatewayBeat,
    OrderReturned,
    Recall,
    Rejected,
    Resident,
    Resume,
    RunSlice,
    SchedulerCommand,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    TokensWanted,
    WorkerMemory,
)
from tests.core.seam import PROMPT, Bench, done, finished, new, spec_of, submit


def test_a_lost_worker_s_requests_are_recalled_and_run_elsewhere() -> None:
    bench = Bench()
    bench.join("w1")
    run = bench.run_one()
    bench.join("w2")
    recall = Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)
    assert bench.say(OrderReturned(worker="w1")) == [recall]
    assert bench.say(OrderReturned(worker="w1")) == []
    assert bench.say(done(run)) == []
    bench.join("w2")
    assert bench.after(1.3) == [recall]
    bench.join("w2")
    assert bench.say(Resume(spec=spec_of(), attempt=0)) == []
    (again,) = bench.say(Resume(spec=spec_of(), attempt=1, tokens=new(run.orders[0], 3)))
    assert isinstance(again, RunSlice)
    order = again.orders[0]
    assert (again.worker, order.attempt, order.lease_tokens) == ("w2", 2, 16)
    assert order.tokens == tokens.pack(range(3))


def test_a_silent_worker_is_lost_within_two_seconds() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    assert bench.after(1.4) == []
    (recall,) = bench.after(0.5)
    assert recall == Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)


def test_a_worker_that_speaks_but_hears_nothing_is_lost_while_others_hear() -> None:
    bench = Bench()
    bench.join("w1")
    run = bench.run_one()
    bench.join("w2", heard_s=0.4, epoch=1)
    assert bench.join("w1", heard_s=2.0, epoch=1) == []
    (recall,) = bench.join("w1", heard_s=2.1, epoch=1)
    assert recall == Recall(epoch=1, gateway="g1", request_id="r1", attempt=run.orders[0].attempt)
    assert bench.join("w1", heard_s=2.6, epoch=1) == [], "it may not come back deaf"
    assert [type(said) for said in bench.join("w1", heard_s=0.1, epoch=1)] == [Drop]


@pytest.mark.parametrize(
    ("epoch", "others_heard_s"),
    [(1, 1.9), (1, 0.0), (0, 0.4)],
    ids=["nobody hears: we were stopped, or it is our line", "nobody says", "of an old leader"],
)
def test_a_worker_is_not_lost_for_hearing_as_little_as_all(
    epoch: int, others_heard_s: float
) -> None:
    bench = Bench()
    bench.join("w1")
    bench.run_one()
    bench.join("w2", heard_s=others_heard_s, epoch=1)
    assert bench.join("w1", heard_s=2.4, epoch=epoch) == []


def test_a_worker_that_comes_back_is_told_what_to_drop() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    bench.say(OrderReturned(worker="w1"))
    assert bench.join() == [Drop(epoch=1, worker="w1", request_id="r1", attempt=1)]
    assert bench.join() == []


def test_our_own_stall_is_nobody_s_silence() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    bench.now += 60.0
    assert bench._shown(bench.core.wake(bench.now)) == []
    assert "w1" in bench.core.books.workers.active


def test_a_draining_worker_gets_no_more() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    bench.join(draining=True)
    assert bench.say(done(run)) == []
    assert bench.join(leaving=True) == []
    (again,) = bench.join("w2")
    assert isinstance(again, RunSlice)
    assert again.worker == "w2"


def test_a_refused_batch_waits_again_and_the_worker_rests() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    assert bench.say(done(run, refused="out of memory")) == []
    assert bench.after(0.4) == []
    bench.join()
    (again,) = bench.after(0.2)
    assert isinstance(again, RunSlice)
    assert again.orders[0].attempt == 2


def test_what_is_refused_forever_is_given_up() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    for _ in range(8):
        bench.say(done(run, refused="out of memory"))
        bench.join()
        bench.say(GatewayBeat(gateway="g1"))
        (again,) = bench.after(0.6)
        assert isinstance(again, RunSlice)
        run = again
    _, rejected, ended = bench.say(done(run, refused="out of memory"))
    assert isinstance(rejected, Rejected)
    assert "out of memory" in rejected.detail
    assert ended == finished("error", 0)


def test_a_slice_that_does_not_meet_our_copy_is_recalled() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    order = run.orders[0]
    for position, words in ((3, new(order)), (-1, new(order)), (0, b"abc")):
        result = SliceResult(request_id="r1", attempt=1, position=position, tokens=words)
        fresh = Bench()
        fresh.join()
        fresh.run_one()
        event = done(run)
        said = fresh.say(
            SliceDone(
                epoch=1,
                worker="w1",
                batch_id=event.batch_id,
                form="closed",
                results=(result,),
                timings=event.timings,
                memory=event.memory,
            )
        )
        drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=1)
        assert said == [drop, Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)]


def test_an_overdue_batch_is_recalled() -> None:
    constants = Constants(slice_tokens=16, interval_floor_s=0.003, gather_s=0.003, overdue_s=5.0)
    bench = Bench(constants=constants)
    bench.join()
    run = bench.run_one()
    said: list[SchedulerCommand] = []
    for _ in range(40):
        bench.join()
        bench.say(GatewayBeat(gateway="g1"))
        said += bench.after(0.5)
        if said:
            break
    assert bench.now > 5.0 + run.expected_s
    drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=1)
    assert said == [drop, Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)]


@pytest.mark.parametrize(("output", "recalled_after_s"), [(40, 5 + 12), (4000, 5 + 1200)])
def test_silence_about_a_lease_to_the_end_is_suspicious_when_it_should_be_over(
    output: int, recalled_after_s: float
) -> None:
    """Ten times 0.03 s a token, the pace before anything was seen, and `overdue_s`."""
    constants = preset_named("tgi").with_constants(gather_s=0.003, overdue_s=5.0)
    bench = Bench("tgi", constants)
    worker: dict[str, Any] = {"forms": ("leased",), "context_tokens_max": 5000, "capacity": 5000}
    bench.join(**worker)
    assert bench.say(submit("r1", max_tokens=output))
    said: list[SchedulerCommand] = []
    while not said and bench.now < 2 * recalled_after_s:
        bench.join(**worker)
        bench.say(GatewayBeat(gateway="g1"))
        said += bench.after(1.0)
    assert bench.now == pytest.approx(recalled_after_s, abs=2.0)
    assert isinstance(said[-1], Recall)


def test_wanted_tokens_are_asked_of_the_worker_that_made_them() -> None:
    bench = Bench()
    bench.join("w1")
    first = bench.run_one()
    bench.join("w2")
    bench.join("w1", draining=True)
    (second,) = bench.say(done(first))
    assert isinstance(second, RunSlice)
    assert second.worker == "w2"

    def wanted(position: int) -> list[SchedulerCommand]:
        event = TokensWanted(gateway="g1", request_id="r1", attempt=2, position=position)
        return bench.say(event)

    assert wanted(5) == [SendTokens(epoch=1, worker="w1", request_id="r1", attempt=1, position=5)]
    assert wanted(16) == [SendTokens(epoch=1, worker="w2", request_id="r1", attempt=2, position=16)]
    bench.say(done(second, finish="stop"))
    assert wanted(20) == [SendTokens(epoch=1, worker="w2", request_id="r1", attempt=2, position=20)]
    recall = Recall(epoch=1, gateway="g1", request_id="r1", attempt=2)
    assert bench.say(OrderReturned(worker="w2")) == [recall], "its answer will not come"
    assert wanted(20) == []
    bench.join("w3")
    (again,) = bench.say(Resume(spec=spec_of(), attempt=2, tokens=tokens.pack(range(20))))
    assert isinstance(again, RunSlice)
    assert again.orders[0].attempt == 3
    assert bench.say(done(again, finish="stop", count=4)) == []


def test_a_worker_that_never_answers_is_asked_three_times() -> None:
    bench = Bench()
    bench.join()
    bench.say(done(bench.run_one()))
    event = TokensWanted(gateway="g1", request_id="r1", attempt=1, position=0)
    kinds = [type(command).__name__ for _ in range(4) for command in bench.say(event)]
    assert kinds == ["SendTokens"] * 3 + ["Drop", "Recall"]


def test_tokens_that_a_lost_worker_made_are_recalled_when_they_are_missed() -> None:
    bench = Bench()
    bench.join("w1")
    bench.say(done(bench.run_one(), finish="stop"))
    assert bench.say(OrderReturned(worker="w1")) == [], "they may have arrived"
    wanted = TokensWanted(gateway="g1", request_id="r1", attempt=1, position=3)
    recall = Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)
    assert bench.say(wanted) == [recall]


def no_tokens(worker: str, attempt: int, position: int) -> SliceDone:
    """A worker's answer to SendTokens when it has none."""
    return SliceDone(
        epoch=1,
        worker=worker,
        batch_id="",
        form="closed",
        results=(SliceResult(request_id="r1", attempt=attempt, position=position),),
        timings=SliceTimings(),
        memory=WorkerMemory(kv_tokens_capacity=2000),
        refused="unknown request",
    )


@pytest.mark.parametrize("ended", [False, True])
def test_tokens_that_nobody_has_any_more_are_recalled(ended: bool) -> None:
    bench = Bench()
    bench.join()
    bench.say(done(bench.run_one(), finish="stop" if ended else None))
    assert bench.say(no_tokens("w1", 9, 5)) == []
    said = bench.say(no_tokens("w1", 1, 5))
    assert said[-1] == Recall(epoch=1, gateway="g1", request_id="r1", attempt=1 if ended else 2)
    assert bench.say(no_tokens("w1", 1, 5)) == []


def test_an_order_that_its_worker_does_not_know_was_lost() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    _drop, recall = bench.say(no_tokens("w1", 1, 0))
    assert recall == Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)
    assert bench.core.books.workers.active["w1"].load_s == 0.0


def test_silence_in_the_queue_is_no_reason_to_recall() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    event = TokensWanted(gateway="g1", request_id="r1", attempt=0, position=0)
    kinds = {type(command) for _ in range(20) for command in bench.say(event)}
    assert kinds == {SendTokens}
    bench.say(submit("r2"))
    wanted = TokensWanted(gateway="g1", request_id="r2", attempt=0, position=0)
    assert bench.say(wanted) == []


def test_tokens_of_an_unknown_request_are_recalled() -> None:
    bench = Bench()
    event = TokensWanted(gateway="g1", request_id="old", attempt=4, position=9)
    assert bench.say(event) == [Recall(epoch=1, gateway="g1", request_id="old", attempt=4)]


def resident(request_id: str, attempt: int, position: int) -> Resident:
    return Resident(request_id=request_id, attempt=attempt, position=position)


def test_takeover_leaves_the_running_alone_and_recalls_the_rest() -> None:
    bench = Bench(epoch=2)
    bench.join(
        residents=(resident("runs", 3, 20), resident("closed", 1, 5), resident("ghost", 1, 0)),
        residents_listed=True,
    )
    for request_id, attempt in (("runs", 2), ("closed", 1), ("free", 0)):
        said = bench.say(Resume(spec=spec_of(request_id), attempt=attempt, tokens=PROMPT))
        assert said == []
    assert bench.after(0.9) == []
    bench.join()
    said = bench.after(0.2)
    base = 1_000_000
    assert said == [
        Recall(epoch=2, gateway="g1", request_id="closed", attempt=base),
        Recall(epoch=2, gateway="g1", request_id="free", attempt=base),
        Drop(epoch=2, worker="w1", request_id="closed", attempt=1),
        Drop(epoch=2, worker="w1", request_id="ghost", attempt=1),
    ]
    old = RunSlice(
        epoch=1,
        worker="w1",
        batch_id="1-9",
        form="closed",
        orders=(SliceOrder(spec=spec_of("runs"), attempt=3, tokens=PROMPT, lease_tokens=16),),
    )
    (again,) = bench.say(done(old))
    assert isinstance(again, RunSlice)
    order = again.orders[0]
    assert (order.spec.request_id, order.attempt) == ("runs", base + 1)
    assert tokens.count(order.tokens) == 26


def test_a_submit_while_collecting_may_be_a_repeat() -> None:
    """The old leader may have placed it before it died: only a recall makes sure."""
    bench = Bench(epoch=2)
    bench.join()
    assert bench.say(submit()) == []
    (recall,) = bench.after(1.1)
    assert recall == Recall(epoch=2, gateway="g1", request_id="r1", attempt=1_000_000)
    (run,) = bench.say(Resume(spec=spec_of(), attempt=1_000_000))
    assert isinstance(run, RunSlice)
    assert run.orders[0].attempt == 1_000_001


def test_a_late_reporter_gets_drop() -> None:
    bench = Bench(epoch=2)
    bench.after(1.1)
    said = bench.join(residents=(resident("ghost", 7, 3),), residents_listed=True)
    assert said == [Drop(epoch=2, worker="w1", request_id="ghost", attempt=7)]


def test_an_order_that_a_worker_does_not_list_was_lost() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    assert bench.join(residents_listed=True) == []
    for _ in range(5):
        bench.join()
        bench.after(0.45)
    assert bench.join(residents=(resident("r1", 1, 0),), residents_listed=True) == []
    said = bench.join(residents_listed=True)
    drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=1)
    assert said == [drop, Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)]
    assert bench.core.books.workers.active["w1"].load_s == 0.0


def test_a_slice_that_ends_while_collecting_is_no_claim_any_more() -> None:
    bench = Bench(epoch=2)
    bench.join(residents=(resident("r1", 3, 4),), residents_listed=True)
    assert bench.say(Resume(spec=spec_of("r1"), attempt=2, tokens=PROMPT)) == []
    ended = RunSlice(
        epoch=1,
        worker="w1",
        batch_id="1-9",
        form="closed",
        orders=(SliceOrder(spec=spec_of("r1"), attempt=3, tokens=PROMPT, lease_tokens=16),),
    )
    assert bench.say(done(ended)) == []
    assert Recall(epoch=2, gateway="g1", request_id="r1", attempt=1_000_000) in bench.after(1.1)
