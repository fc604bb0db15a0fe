"""The core at its seam, seen from a gateway: a request's life, its ends, refusals."""

import pytest

from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from shared import tokens
from shared.messages import (
    Cancel,
    Drop,
    Elected,
    GatewayBeat,
    LengthForecast,
    OrderReturned,
    Recall,
    Rejected,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SliceOrder,
    Stopped,
    TokensWanted,
)
from tests.core.seam import LIVE, Bench, done, finished, new, spec_of, submit


def test_a_request_runs_slice_by_slice_with_all_it_has() -> None:
    bench = Bench()
    bench.join()
    first = bench.run_one()
    assert first.orders[0] == SliceOrder(
        spec=spec_of(), attempt=1, lease_tokens=16, pool_wait_s=0.003, why=first.orders[0].why
    )
    assert (first.form, first.iterations, first.worker) == ("closed", 16, "w1")
    (second,) = bench.say(done(first))
    assert isinstance(second, RunSlice)
    (third,) = bench.say(done(second))
    assert isinstance(third, RunSlice)
    orders = [run.orders[0] for run in (first, second, third)]
    assert [order.attempt for order in orders] == [1, 2, 3]
    assert [order.lease_tokens for order in orders] == [16, 16, 8]
    assert third.orders[0].tokens == tokens.pack(range(32))
    assert bench.say(done(third)) == [finished("length", 40)]
    assert bench.core.books.workers.active["w1"].load_s == 0.0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 39, 40])
def test_a_request_is_dispatched_ceil_of_length_over_slice_times(length: int) -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    dispatched = 1
    while True:
        left = length - tokens.count(run.orders[0].tokens)
        ends = left <= run.orders[0].lease_tokens
        said = bench.say(done(run, finish="stop" if ends else None, count=min(left, 16)))
        if ends:
            assert said == [finished("stop", length)]
            break
        assert isinstance(said[0], RunSlice)
        run = said[0]
        dispatched += 1
    assert dispatched == -(-length // 16)


def test_repeats_change_nothing() -> None:
    bench = Bench()
    bench.join()
    first = bench.run_one()
    assert bench.say(submit()) == []
    (second,) = bench.say(done(first))
    assert isinstance(second, RunSlice)
    assert bench.say(done(first)) == []
    assert bench.say(done(second, finish="stop")) == [finished("stop", 32)]
    assert bench.say(done(second, finish="stop")) == []
    assert bench.say(submit()) == []
    assert bench.say(Cancel(gateway="g1", request_id="r1")) == []
    assert bench.after(0.5) == []


@pytest.mark.parametrize(
    "event",
    [
        Cancel(gateway="g1", request_id="nobody"),
        Stopped(gateway="g1", request_id="nobody", output_tokens=1),
        OrderReturned(worker="nobody"),
        LengthForecast(version=1, classes=()),
        GatewayBeat(gateway="g9", leaving=True),
        done(RunSlice(epoch=1, worker="w9", batch_id="b", form="closed", orders=())),
        Elected(epoch=1),
    ],
)
def test_unknown_and_late_events_answer_nothing(event: SchedulerEvent) -> None:
    assert Bench().say(event) == []


def test_nothing_is_answered_before_the_election() -> None:
    core = Scheduler(preset_named("scls"), LIVE)
    assert core.handle(submit(), 0.0) == []
    assert core.deadline() is None
    (beat,) = core.handle(Elected(epoch=3), 1.0)
    assert beat == SchedulerBeat(epoch=3, predicted_wait_s=10.0)


def test_cancel_and_stop_in_the_pool() -> None:
    bench = Bench()
    bench.say(submit("r1"))
    bench.say(submit("r2"))
    assert bench.say(Cancel(gateway="g1", request_id="r1")) == [finished("cancelled", 0)]
    stopped = Stopped(gateway="g1", request_id="r2", output_tokens=7)
    assert bench.say(stopped) == [finished("stop", 7, "r2")]


def test_cancel_on_a_worker_drops_it_there() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=1)
    answer = bench.say(Cancel(gateway="g1", request_id="r1"))
    assert answer == [drop, finished("cancelled", 0)]
    assert bench.core.books.workers.active["w1"].load_s > 0
    assert bench.say(done(run, finish="cancelled")) == []
    assert bench.core.books.workers.active["w1"].load_s == 0.0


def test_a_cancel_that_overtakes_its_submit_wins() -> None:
    bench = Bench()
    bench.join()
    assert bench.say(Cancel(gateway="g1", request_id="r1")) == []
    assert bench.say(submit()) == []
    assert bench.after(0.5) == []


def test_another_gateway_cannot_cancel() -> None:
    bench = Bench()
    bench.say(submit())
    assert bench.say(Cancel(gateway="g2", request_id="r1")) == []
    assert "r1" in bench.core.books.requests.pool


def test_a_silent_gateway_loses_its_requests_and_gets_them_back() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    said: list[SchedulerCommand] = []
    for _ in range(7):
        bench.join()
        said += bench.after(0.5)
    drop = Drop(epoch=1, worker="w1", request_id="r1", attempt=1)
    assert said == [drop, finished("cancelled", 0)]
    recall = Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)
    assert bench.say(GatewayBeat(gateway="g1")) == [recall]
    (again,) = bench.say(Resume(spec=spec_of(), attempt=1, tokens=new(run.orders[0], 5)))
    assert isinstance(again, RunSlice)
    assert (again.orders[0].attempt, tokens.count(again.orders[0].tokens)) == (2, 5)
    assert bench.say(done(again, finish="stop")) == []


def test_a_leaving_gateway_takes_its_requests_along() -> None:
    bench = Bench()
    bench.say(submit("r1"))
    bench.say(submit("r2", gateway="g2"))
    leaving = GatewayBeat(gateway="g1", leaving=True)
    assert bench.say(leaving) == [finished("cancelled", 0)]
    assert list(bench.core.books.requests.open) == ["r2"]


def test_what_never_fits_is_refused() -> None:
    bench = Bench()
    bench.join(capacity=100, context_tokens_max=1000)
    (answer,) = bench.say(submit(max_tokens=81))
    assert isinstance(answer, Rejected)
    assert (answer.reason, answer.retry_after_s) == ("too_long", None)
    assert "91 tokens, but workers hold 90" in answer.detail
    assert bench.say(submit("r2", max_tokens=80)) == []
    (zero,) = bench.say(submit("r3", max_tokens=0))
    assert isinstance(zero, Rejected)


def test_a_full_pool_refuses_with_a_retry_time() -> None:
    bench = Bench()
    for number in range(5):
        assert bench.say(submit(f"r{number}")) == []
    (answer,) = bench.say(submit("r5"))
    assert isinstance(answer, Rejected)
    assert answer.reason == "queue_full"
    assert answer.retry_after_s is not None
    assert 1.0 <= answer.retry_after_s <= 60.0
    assert bench.say(submit("r5")) == []
    wanted = TokensWanted(gateway="g1", request_id="r5", attempt=0, position=0)
    assert bench.say(wanted) == [answer]


def test_running_requests_do_not_fill_the_pool() -> None:
    bench = Bench()
    for number in range(5):
        bench.say(submit(f"r{number}"))
    bench.join()
    assert isinstance(bench.after(0.01)[0], RunSlice)
    assert bench.say(submit("r5")) == []


def test_a_worker_of_another_form_is_not_used() -> None:
    bench = Bench()
    bench.join(forms=("leased",))
    (answer,) = bench.say(submit())
    assert isinstance(answer, Rejected)
    assert answer.reason == "no_worker"
    assert "policy 'scls' runs closed slices" in answer.detail
    assert bench.core.advice == answer.detail
    bench.join("w2")
    assert bench.core.advice == ""
    assert bench.run_one("r2").worker == "w2"
