"""The worker's core: orders, epochs, attempts, beats and draining."""

import pytest
from msgspec.structs import replace as changed

from services.worker.core import worker
from services.worker.core.events import (
    BatchBegan,
    BatchRefused,
    CancelRequest,
    GiveBack,
    Leave,
    Reconnected,
    StartBatch,
    StopWanted,
    TokensSent,
)
from shared.messages import (
    DrainWorker,
    Drop,
    Resident,
    Sampling,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    TokenBatch,
    WorkerBeat,
)
from tests.worker.core_bench import MEMORY, TIMINGS, Bench, kinds, only, result, runs_of
from tests.worker.orders import make_batch, make_order, make_spec


def test_a_batch_from_order_to_result(bench: Bench) -> None:
    order = make_batch(make_order(make_spec("a")), epoch=0)
    assert bench.do(order) == [StartBatch(order)]
    busy = changed(MEMORY, kv_tokens_used=19)
    assert bench.do(BatchBegan("b1", busy)) == []
    assert runs_of(bench.make("a", 0, [7])) == [("a", 0, [7], None)]
    bench.do(TokensSent("gateway-1"))
    assert bench.make("a", 1, [8], after_s=0.001) == [], "held back to be joined"
    assert bench.make("a", 2, [9], "stop", after_s=0.001) == []
    commands = bench.end("b1", result("a", "stop"))
    assert kinds(commands) == ["TokenBatch", "SliceDone"], "tokens go before the result"
    assert runs_of(commands) == [("a", 1, [8, 9], "stop")]
    (done,) = only(SliceDone, commands)
    assert (done.batch_id, done.results, done.timings) == ("b1", (result("a", "stop"),), TIMINGS)
    assert (done.worker, done.refused, done.memory) == ("worker-1", "", MEMORY)


def test_a_repeated_batch_is_ignored_while_it_runs_and_after_it(bench: Bench) -> None:
    order = make_batch(make_order(make_spec("a")))
    assert len(only(StartBatch, bench.do(order))) == 1
    assert bench.do(order) == []
    bench.end("b1", result("a"))
    assert bench.do(order) == []


def test_orders_of_a_deposed_scheduler_are_dropped(bench: Bench) -> None:
    commands = bench.do(SchedulerBeat(epoch=5))
    assert only(WorkerBeat, commands)[0].residents_listed
    old = {"epoch": 4, "worker": "worker-1"}
    for message in (
        make_batch(make_order(make_spec("a")), epoch=4),
        Drop(request_id="a", attempt=9, **old),
        SendTokens(request_id="a", attempt=1, position=0, **old),
        DrainWorker(**old),
        SchedulerBeat(epoch=4),
    ):
        assert bench.do(message) == []
    assert kinds(bench.do(make_batch(make_order(make_spec("a")), epoch=5))) == ["StartBatch"]


def test_a_new_epoch_is_told_all_residents(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), make_order(make_spec("b"), output=[1, 2])))
    bench.make("a", 0, [5])
    (beat,) = only(WorkerBeat, bench.do(SchedulerBeat(epoch=2)))
    assert beat.epoch == 2
    assert beat.residents_listed
    assert beat.residents == (
        Resident(request_id="a", attempt=1, position=1),
        Resident(request_id="b", attempt=1, position=2),
    )
    (later,) = only(WorkerBeat, bench.wake())
    assert (later.residents_listed, later.residents) == (False, ())
    assert only(WorkerBeat, bench.do(Reconnected()))[0].residents == beat.residents


def test_beats_say_how_long_ago_the_leader_was_heard(bench: Bench) -> None:
    assert only(WorkerBeat, bench.wake())[0].heard_s == 0, "nobody was heard yet"
    bench.do(SchedulerBeat(epoch=1))
    heard_at = bench.now
    for _ in range(3):
        (beat,) = only(WorkerBeat, bench.wake())
        assert beat.heard_s == pytest.approx(bench.now - heard_at)
    bench.do(SchedulerBeat(epoch=0))
    (beat,) = only(WorkerBeat, bench.wake())
    assert beat.heard_s == pytest.approx(bench.now - heard_at), "an old leader does not count"
    assert only(WorkerBeat, bench.do(Reconnected()))[0].heard_s == 0, "another line"


def test_beats_come_twice_a_second(bench: Bench) -> None:
    times = []
    for _ in range(4):
        bench.wake()
        times.append(bench.now)
    assert times == pytest.approx([100.5, 101.0, 101.5, 102.0])


def test_orders_for_another_worker_are_ignored(bench: Bench) -> None:
    assert bench.do(make_batch(make_order(make_spec()), epoch=0, worker="worker-2")) == []


def test_a_dropped_request_says_nothing_more(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), make_order(make_spec("b")), epoch=0))
    bench.make("a", 0, [5])
    bench.make("a", 1, [6])  # waits to be joined
    drop = Drop(epoch=0, worker="worker-1", request_id="a", attempt=1)
    assert bench.do(drop) == [CancelRequest("a", 1)]
    bench.do(TokensSent("gateway-1"))
    assert runs_of(bench.make("a", 2, [7], after_s=1.0)) == []
    assert runs_of(bench.wake()) == []
    assert bench.do(drop) == []
    wish = SendTokens(epoch=0, worker="worker-1", request_id="a", attempt=1, position=0)
    assert only(SliceDone, bench.do(wish))[0].refused == "unknown request"


def test_an_order_that_comes_after_its_own_drop_is_not_begun(bench: Bench) -> None:
    """Said again on a new line, behind what was said since: found by a storm, seed 9681."""
    assert bench.do(Drop(epoch=0, worker="worker-1", request_id="a", attempt=1)) == []
    said = bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    (done,) = only(SliceDone, said)
    assert kinds(said) == ["SliceDone"]
    assert [r.finish_reason for r in done.results] == ["cancelled"]
    newer = make_batch(make_order(make_spec("a"), attempt=2), epoch=0, batch_id="b2")
    assert kinds(bench.do(newer)) == ["StartBatch"]


def test_a_drop_of_an_older_attempt_changes_nothing(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a"), attempt=3), epoch=0))
    assert bench.do(Drop(epoch=0, worker="worker-1", request_id="a", attempt=2)) == []
    assert runs_of(bench.make("a", 0, [5], attempt=3)) == [("a", 0, [5], None)]


def test_a_newer_attempt_replaces_the_older_one(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    second = make_batch(make_order(make_spec("a"), attempt=2), epoch=0, batch_id="b2")
    assert bench.do(second) == [CancelRequest("a", 1), StartBatch(second)]
    assert bench.make("a", 0, [5]) == [], "tokens of the older attempt"
    assert runs_of(bench.make("a", 0, [6], attempt=2)) == [("a", 0, [6], None)]
    bench.end("b1", result("a", "cancelled"))
    (beat,) = only(WorkerBeat, bench.do(Reconnected()))
    assert beat.residents == (Resident(request_id="a", attempt=2, position=1),)


def test_an_older_attempt_than_the_one_here_is_not_run(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a"), attempt=2), epoch=0))
    late = make_batch(make_order(make_spec("a"), attempt=1), epoch=0, batch_id="b2")
    (done,) = bench.do(late)
    assert isinstance(done, SliceDone)
    assert [r.finish_reason for r in done.results] == ["cancelled"]


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        (make_spec("bad", prompt=[300]), "prompt has token ids outside of 0 to 299"),
        (make_spec("bad", prompt=[]), "prompt is empty"),
        (make_spec("bad", max_tokens=98), "101 tokens exceed the context of 100"),
        (make_spec("bad", max_tokens=-1), "negative"),
        (make_spec("bad", sampling=Sampling(temperature=float("nan"))), "temperature"),
        (make_spec("bad", sampling=Sampling(logit_bias={300: 1.0})), "logit_bias"),
        (make_spec("bad", sampling=Sampling(logit_bias={3: float("inf")})), "logit_bias"),
        (make_spec("bad", sampling=Sampling(stop_token_ids=(-1,))), "stop_token_ids"),
        (make_spec("bad", sampling=Sampling(allowed_token_ids=(999,))), "allowed_token_ids"),
        (make_spec("bad", sampling=Sampling(top_p=0, min_p=2)), "top_p, min_p"),
        (make_spec("bad", sampling=Sampling(repetition_penalty=0)), "repetition_penalty"),
        (make_spec("bad", sampling=Sampling(logprobs=1_000)), "logprobs"),
        (changed(make_spec("bad"), prompt=b"123"), "cut off"),
    ],
)
def test_an_impossible_request_fails_alone(bench: Bench, spoilt: object, complaint: str) -> None:
    good = make_order(make_spec("good"))
    order = make_batch(make_order(spoilt), good, epoch=0)  # type: ignore[arg-type]
    commands = bench.do(order)
    assert only(StartBatch, commands) == [StartBatch(changed(order, orders=(good,)))]
    bench.do(TokensSent("gateway-1"))
    sent = [run for batch in only(TokenBatch, commands) for run in batch.runs]
    if not sent:
        sent = [run for batch in only(TokenBatch, bench.wake()) for run in batch.runs]
    assert [(run.request_id, run.finish_reason) for run in sent] == [("bad", "error")]
    assert complaint in sent[0].detail
    (done,) = only(SliceDone, bench.end("b1", result("good", "stop")))
    assert [(r.request_id, r.finish_reason) for r in done.results] == [
        ("good", "stop"),
        ("bad", "error"),
    ]


def test_a_batch_of_impossible_requests_is_answered_at_once(bench: Bench) -> None:
    order = make_batch(make_order(make_spec("bad", prompt=[])), epoch=0)
    commands = bench.do(order)
    assert kinds(commands) == ["TokenBatch", "SliceDone"]
    assert only(SliceDone, commands)[0].results[0].finish_reason == "error"


def test_what_the_engine_refuses_goes_back(bench: Bench) -> None:
    order = make_batch(make_order(make_spec("a")), epoch=0)
    bench.do(order)
    (done,) = bench.do(BatchRefused(order, "out of memory: too much", MEMORY))
    assert (done.batch_id, done.refused, done.results) == ("b1", "out of memory: too much", ())
    assert only(WorkerBeat, bench.do(Reconnected()))[0].residents == ()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (make_batch(make_order(make_spec()), epoch=0, form="leased"), "form leased"),
        (make_batch(epoch=0), "empty"),
        (
            make_batch(
                changed(make_order(changed(make_spec(), prompt=b"")), resident=True), epoch=0
            ),
            "unknown request",
        ),
    ],
)
def test_batches_that_cannot_run_are_refused(bench: Bench, order: object, reason: str) -> None:
    (done,) = bench.do(order)
    assert isinstance(done, SliceDone)
    assert reason in done.refused


def test_the_queue_of_batches_is_bounded(bench: Bench) -> None:
    for number in range(worker.BATCHES_MAX):
        order = make_batch(make_order(make_spec(f"r{number}")), epoch=0, batch_id=f"b{number}")
        assert kinds(bench.do(order)) == ["StartBatch"]
    one_more = make_batch(make_order(make_spec("x")), epoch=0, batch_id="one more")
    assert [done.refused for done in bench.do(one_more)] == ["queue full"]
    bench.end("b0", result("r0"))
    again = make_batch(make_order(make_spec("x")), epoch=0, batch_id="again")
    assert kinds(bench.do(again)) == ["StartBatch"]


@pytest.mark.parametrize("trigger", [StopWanted(), DrainWorker(epoch=0, worker="worker-1")])
def test_draining_ends_what_runs_and_gives_back_the_rest(bench: Bench, trigger: object) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    waiting = make_batch(make_order(make_spec("b")), epoch=0, batch_id="b2")
    bench.do(waiting)
    commands = bench.do(trigger)
    assert commands[0] == GiveBack("draining")
    (beat,) = only(WorkerBeat, commands)
    assert (beat.draining, beat.leaving) == (True, False)
    assert only(SliceDone, bench.do(BatchRefused(waiting, "draining")))[0].refused == "draining"
    late = make_batch(make_order(make_spec("c")), epoch=0, batch_id="b3")
    assert only(SliceDone, bench.do(late))[0].refused == "draining"
    assert bench.do(trigger) == []
    (batch,) = only(TokenBatch, bench.make("a", 0, [1], "stop"))
    assert kinds(bench.end("b1", result("a", "stop"))) == ["SliceDone"]
    commands = bench.do(TokensSent(batch.gateway))
    assert kinds(commands) == ["WorkerBeat", "Leave"]
    assert only(WorkerBeat, commands)[0].leaving
    assert bench.core.deadline() is None
    assert bench.do(late) == []


def test_an_idle_worker_leaves_at_once(bench: Bench) -> None:
    commands = bench.do(StopWanted())
    assert isinstance(commands[-1], Leave)
    assert only(WorkerBeat, commands)[-1].leaving


def test_leaving_does_not_wait_for_a_broker_for_ever(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    bench.make("a", 0, [1], "stop")
    bench.end("b1", result("a", "stop"))
    bench.do(StopWanted())
    began = bench.now
    while bench.core.deadline() is not None:
        bench.wake()
    assert bench.now - began == pytest.approx(worker.LEAVE_S, abs=worker.BEAT_S)
