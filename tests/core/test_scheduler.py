"""The core at its seam: one event in, these commands out."""

from collections.abc import Sequence

import pytest

from services.scheduler.core.presets import PRESETS, preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import TRANSITIONS, State, drawn
from shared import tokens
from shared.messages import (
    Cancel,
    Drop,
    Elected,
    Finished,
    FinishReason,
    GatewayBeat,
    LengthForecast,
    OrderReturned,
    Recall,
    Rejected,
    RequestSpec,
    Resident,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    Stopped,
    Submit,
    TokensWanted,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)

LIVE = Constants(
    slice_tokens=16,
    interval_floor_s=0.003,
    gather_s=0.003,
    spread_batches=True,
    round_on_idle=True,
    waiting_max=5,
)
PROMPT = tokens.pack(range(10))


class Bench:
    """A scheduler with a clock that only the test moves. Beats are left out of the answers."""

    def __init__(self, policy: str = "scls", constants: Constants = LIVE, epoch: int = 1) -> None:
        self.core = Scheduler(preset_named(policy), constants)
        self.now = 0.0
        self.say(Elected(epoch=epoch))

    def say(self, event: SchedulerEvent) -> list[SchedulerCommand]:
        return self._shown(self.core.handle(event, self.now))

    def after(self, seconds: float) -> list[SchedulerCommand]:
        """Let time pass, waking the core whenever it wants."""
        end = self.now + seconds
        said: list[SchedulerCommand] = []
        while True:
            deadline = self.core.deadline()
            assert deadline is not None
            if deadline > end:
                break
            self.now = max(self.now, deadline)
            said += self._shown(self.core.wake(self.now))
        self.now = end
        return said

    def _shown(self, commands: Sequence[SchedulerCommand]) -> list[SchedulerCommand]:
        return [command for command in commands if not isinstance(command, SchedulerBeat)]

    def join(self, name: str = "w1", **changes: object) -> list[SchedulerCommand]:
        return self.say(beat_of(name, **changes))

    def run_one(self, request_id: str = "r1", **changes: object) -> RunSlice:
        """Submit and be placed."""
        assert self.say(submit(request_id, **changes)) == []
        (run,) = self.after(0.004)
        assert isinstance(run, RunSlice)
        return run


def beat_of(name: str, **changes: object) -> WorkerBeat:
    info: dict[str, object] = {
        "worker": name,
        "name": name,
        "engine": "padded",
        "forms": ("closed",),
        "model": "m",
        "context_tokens_max": 1000,
        "batch_size_max": changes.pop("batch_size_max", 0),
    }
    capacity = changes.pop("capacity", 2000)
    for field in ("forms", "context_tokens_max"):
        if field in changes:
            info[field] = changes.pop(field)
    memory = WorkerMemory(kv_tokens_capacity=capacity)  # type: ignore[arg-type]
    return WorkerBeat(info=WorkerInfo(**info), memory=memory, **changes)  # type: ignore[arg-type]


def spec_of(request_id: str = "r1", **changes: object) -> RequestSpec:
    values: dict[str, object] = {
        "request_id": request_id,
        "parent_id": "p",
        "gateway": "g1",
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": 40,
    }
    return RequestSpec(**{**values, **changes})  # type: ignore[arg-type]


def submit(request_id: str = "r1", **changes: object) -> Submit:
    return Submit(spec=spec_of(request_id, **changes))


def new(order: SliceOrder, count: int | None = None) -> bytes:
    """Tokens for an order; their values say where they stand."""
    start = tokens.count(order.tokens)
    return tokens.pack(range(start, start + (order.lease_tokens if count is None else count)))


def done(
    run: RunSlice,
    finish: FinishReason | None = None,
    count: int | None = None,
    refused: str = "",
    capacity: int = 2000,
) -> SliceDone:
    results = tuple(
        SliceResult(
            request_id=order.spec.request_id,
            attempt=order.attempt,
            position=tokens.count(order.tokens),
            tokens=new(order, count),
            finish_reason=finish,
        )
        for order in run.orders
    )
    return SliceDone(
        epoch=run.epoch,
        worker=run.worker,
        batch_id=run.batch_id,
        form="closed",
        results=() if refused else results,
        timings=SliceTimings(
            prefill_s=0.01, decode_s=0.2, iterations=16, input_tokens_max=10, batch_size=1
        ),
        memory=WorkerMemory(kv_tokens_capacity=capacity),
        refused=refused,
    )


def finished(reason: FinishReason, output: int, request_id: str = "r1") -> Finished:
    return Finished(
        epoch=1,
        request_id=request_id,
        model="m",
        prompt_tokens=10,
        output_tokens=output,
        max_tokens=40,
        reason=reason,
    )


# ------------------------------------------------------------------------------ a request's life


def test_a_request_runs_slice_by_slice_with_all_it_has() -> None:
    bench = Bench()
    bench.join()
    first = bench.run_one()
    assert first.orders[0] == SliceOrder(
        spec=spec_of(), attempt=1, lease_tokens=16, pool_wait_s=first.orders[0].pool_wait_s
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


# --------------------------------------------------------------------------- ends from outside


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


# ----------------------------------------------------------------------------------- refusals


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


# ------------------------------------------------------------------------------ workers and loss


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


def test_a_silent_worker_is_lost_after_two_seconds() -> None:
    bench = Bench()
    bench.join()
    bench.run_one()
    assert bench.after(1.9) == []
    (recall,) = bench.after(0.5)
    assert recall == Recall(epoch=1, gateway="g1", request_id="r1", attempt=1)


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


# ------------------------------------------------------------------------------- tokens wanted


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
    bench.say(OrderReturned(worker="w2"))
    assert wanted(20) == [Recall(epoch=1, gateway="g1", request_id="r1", attempt=2)]
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


# ------------------------------------------------------------------------------------ takeover


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


# -------------------------------------------------------------------------------- rounds, memory


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


@pytest.mark.parametrize("policy", PRESETS)
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
