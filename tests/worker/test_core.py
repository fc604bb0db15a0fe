"""The worker's core: events in, commands out."""

import random
from collections.abc import Sequence

import pytest
from msgspec.structs import replace as changed

from services.worker.core import outbox, retained, worker
from services.worker.core.events import (
    BatchBegan,
    BatchRefused,
    CancelRequest,
    Command,
    EngineStepped,
    GiveBack,
    Leave,
    Reconnected,
    StartBatch,
    StopWanted,
    TokensNotSent,
    TokensSent,
)
from services.worker.core.worker import Worker
from services.worker.engines.api import EngineInfo, SliceEnd, StepReport, StepTokens
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    FinishReason,
    Resident,
    Sampling,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    SliceResult,
    SliceTimings,
    TokenBatch,
    TokenLogprobs,
    TokenRun,
    WorkerBeat,
    WorkerMemory,
)
from shared.tokens import pack, unpack
from tests.worker.orders import make_batch, make_order, make_spec

ENGINE = EngineInfo(
    engine="padded", forms=("closed",), model="tiny", context_tokens_max=100, vocabulary_size=300
)
MEMORY = WorkerMemory(kv_tokens_capacity=1_000)
TIMINGS = SliceTimings(iterations=3, batch_size=1)


class Bench:
    """A worker under test, and its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.core = Worker("worker-1", "w", ENGINE, MEMORY, self.now)
        assert kinds(self.core.wake(self.now)) == ["WorkerBeat"]

    def do(self, event: object, after_s: float = 0.0) -> list[Command]:
        """Handle an event, `after_s` later."""
        self.now += after_s
        return self.core.handle(event, self.now)  # type: ignore[arg-type]

    def wake(self) -> list[Command]:
        """Go on to the deadline."""
        deadline = self.core.deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.core.wake(self.now)

    def make(
        self,
        request_id: str,
        position: int,
        ids: Sequence[int],
        finish: FinishReason | None = None,
        *,
        attempt: int = 1,
        after_s: float = 0.0,
    ) -> list[Command]:
        """The engine reports tokens."""
        tokens = StepTokens(request_id, attempt, position, tuple(ids), finish)
        return self.do(EngineStepped(StepReport(tokens=(tokens,))), after_s)

    def end(self, batch_id: str, *results: SliceResult) -> list[Command]:
        """The engine reports the end of a batch."""
        return self.do(
            EngineStepped(StepReport(ended=(SliceEnd(batch_id, results, TIMINGS),)), MEMORY)
        )


@pytest.fixture
def bench() -> Bench:
    """A fresh worker that has sent its first beat."""
    return Bench()


def kinds(commands: Sequence[object]) -> list[str]:
    """The commands' names."""
    return [type(command).__name__ for command in commands]


def only(kind: type, commands: Sequence[Command]) -> list:  # type: ignore[type-arg]
    """Those of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def runs_of(commands: Sequence[Command]) -> list[tuple[str, int, list[int], FinishReason | None]]:
    """All token runs among the commands, in short."""
    return [
        (run.request_id, run.position, list(unpack(run.ids)), run.finish_reason)
        for batch in only(TokenBatch, commands)
        for run in batch.runs
    ]


def result(request_id: str, finish: FinishReason | None = None, position: int = 0) -> SliceResult:
    """A slice's result."""
    return SliceResult(request_id=request_id, attempt=1, position=position, finish_reason=finish)


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


# ------------------------------------------------------------------------------- tokens out


def test_tokens_are_joined_while_more_is_running(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), make_order(make_spec("b")), epoch=0))
    assert len(only(TokenBatch, bench.make("a", 0, [1]))) == 1
    bench.do(TokensSent("gateway-1"))
    for position in range(1, 6):
        assert bench.make("a", position, [position + 1]) == []
        assert bench.make("b", position - 1, [50 + position]) == []
    assert bench.core.deadline() == pytest.approx(bench.now + outbox.COALESCE_S)
    commands = bench.wake()
    assert runs_of(commands) == [
        ("a", 1, [2, 3, 4, 5, 6], None),
        ("b", 0, [51, 52, 53, 54, 55], None),
    ]
    assert len(commands) == 1


def test_one_message_per_gateway_is_under_way(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    bench.make("a", 0, [1])
    assert only(TokenBatch, bench.make("a", 1, [2], after_s=1.0)) == []
    assert only(TokenBatch, bench.make("a", 2, [3], after_s=1.0)) == []
    assert runs_of(bench.do(TokensSent("gateway-1"))) == [("a", 1, [2, 3], None)]


def test_gateways_do_not_wait_for_each_other(bench: Bench) -> None:
    orders = [make_order(make_spec(f"r{n}", gateway=f"g{n}")) for n in (1, 2)]
    bench.do(make_batch(*orders, epoch=0))
    assert [b.gateway for b in only(TokenBatch, bench.make("r1", 0, [1]))] == ["g1"]
    assert [b.gateway for b in only(TokenBatch, bench.make("r2", 0, [1]))] == ["g2"]


def test_a_failed_message_is_sent_again_with_what_came_since(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    (batch,) = only(TokenBatch, bench.make("a", 0, [1]))
    bench.make("a", 1, [2])
    assert bench.do(TokensNotSent(batch)) == []
    assert bench.core.deadline() == pytest.approx(bench.now + outbox.RETRY_S)
    assert runs_of(bench.wake()) == [("a", 0, [1, 2], None)]


def test_retries_wait_even_if_nothing_runs(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    (batch,) = only(TokenBatch, bench.make("a", 0, [1], "stop"))
    bench.end("b1", result("a", "stop"))
    assert bench.do(TokensNotSent(batch, unroutable=True)) == []
    assert runs_of(bench.wake()) == [("a", 0, [1], "stop")]


def test_a_gateway_without_a_queue_is_given_up_after_a_while(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    (batch,) = only(TokenBatch, bench.make("a", 0, [1]))
    began, tries = bench.now, 0
    while batch is not None:
        assert only(TokenBatch, bench.do(TokensNotSent(batch, unroutable=True))) == []
        tries += 1
        batch = None
        while bench.now < began + 10 and batch is None:
            batch = next(iter(only(TokenBatch, bench.wake())), None)
    assert tries == pytest.approx(outbox.GATEWAY_GONE_S / outbox.RETRY_S + 1, abs=1)
    # What was dropped can still be asked for, should the gateway come back.
    wish = SendTokens(epoch=0, worker="worker-1", request_id="a", attempt=1, position=0)
    assert runs_of(bench.do(wish)) == [("a", 0, [1], None)]


def test_runs_with_logprobs_are_joined_in_order() -> None:
    one, two = TokenLogprobs(chosen=-0.1), TokenLogprobs(chosen=-0.2)
    first = TokenRun(
        request_id="a",
        attempt=1,
        position=0,
        ids=pack([1]),
        logprobs=(one,),
        prompt_logprobs=(TokenLogprobs(chosen=None),),
    )
    second = TokenRun(
        request_id="a", attempt=1, position=1, ids=pack([2]), logprobs=(two,), ending_token=True
    )
    joined = outbox.join_runs(first, second)
    assert joined is not None
    assert joined.logprobs == (one, two)
    assert len(joined.prompt_logprobs) == 1
    assert joined.ending_token
    assert outbox.join_runs(second, first) is None
    assert outbox.join_runs(first, changed(second, attempt=2)) is None
    assert outbox.join_runs(changed(first, finish_reason="stop"), second) is None


# ------------------------------------------------------------------------------ kept tokens


def wish_for(position: int, attempt: int = 1) -> SendTokens:
    """A wish for the tokens of request a."""
    return SendTokens(
        epoch=0, worker="worker-1", request_id="a", attempt=attempt, position=position
    )


def finished(bench: Bench) -> None:
    """Request a made 5 tokens from position 10 on, over two slices, and was sent."""
    spec = make_spec("a", max_tokens=50)
    bench.do(make_batch(make_order(spec, output=[0] * 10), epoch=0))
    bench.make("a", 10, [1])
    bench.make("a", 11, [2])
    bench.end("b1", result("a", position=10))
    second = make_batch(make_order(spec, output=[0] * 12), epoch=0, batch_id="b2")
    bench.do(second)
    bench.make("a", 12, [3])
    bench.make("a", 13, [4])
    bench.make("a", 14, [5], "stop")
    bench.end("b2", result("a", "stop", position=12))
    bench.do(TokensSent("gateway-1"))
    bench.do(TokensSent("gateway-1"))


@pytest.mark.parametrize(("position", "ids"), [(10, [1, 2, 3, 4, 5]), (13, [4, 5]), (15, [])])
def test_kept_tokens_are_sent_again(bench: Bench, position: int, ids: list[int]) -> None:
    finished(bench)
    assert runs_of(bench.do(wish_for(position))) == [("a", position, ids, "stop")]


@pytest.mark.parametrize("wish", [wish_for(9), wish_for(16), wish_for(10, attempt=2)])
def test_tokens_that_are_not_here_are_unknown(bench: Bench, wish: SendTokens) -> None:
    finished(bench)
    (done,) = bench.do(wish)
    assert (done.batch_id, done.refused) == ("", "unknown request")
    assert [(r.request_id, r.attempt, r.position) for r in done.results] == [
        ("a", wish.attempt, wish.position)
    ]


def test_a_confirmed_end_is_forgotten(bench: Bench) -> None:
    finished(bench)
    ack = FinishAck(gateway="gateway-1", worker="worker-1", request_ids=("a", "b"))
    assert bench.do(ack) == []
    assert only(SliceDone, bench.do(wish_for(10)))[0].refused == "unknown request"


def test_kept_tokens_have_limits_in_time_and_number() -> None:
    kept = retained.Retained()

    def keep(request_id: str, now: float) -> None:
        run = TokenRun(request_id=request_id, attempt=1, position=0, ids=pack([1]))
        kept.add(run, "g", now)

    keep("old", 0.0)
    keep("new", retained.KEPT_S - 1)
    assert kept.run_from("old", 1, 0) is not None
    keep("newer", retained.KEPT_S)
    assert kept.run_from("old", 1, 0) is None
    assert kept.run_from("new", 1, 0) is not None
    for number in range(retained.REQUESTS_MAX):
        keep(f"r{number}", retained.KEPT_S)
    assert kept.run_from("newer", 1, 0) is None
    assert kept.run_from("r0", 1, 0) is not None


def test_a_wish_for_tokens_that_are_still_to_come_is_no_error(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a"), output=[1, 2]), epoch=0))
    assert bench.do(wish_for(2)) == []
    bench.make("a", 2, [3])
    assert bench.do(wish_for(3)) == []
    assert only(SliceDone, bench.do(wish_for(1)))[0].refused == "unknown request"


# --------------------------------------------------------------------------------- draining


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


@pytest.mark.parametrize("seed", range(30))
def test_the_core_survives_any_order_of_events(seed: int) -> None:
    """Every batch is answered exactly once, whatever comes when; tokens never leave a gap."""
    rng = random.Random(seed)
    bench = Bench()
    started: dict[str, list[object]] = {}
    orders: dict[str, object] = {}
    answered: list[str] = []
    sent: dict[tuple[str, int], int] = {}
    attempts = {f"r{n}": 0 for n in range(6)}

    def note(commands: list[Command]) -> None:
        for command in commands:
            match command:
                case StartBatch():
                    started[command.order.batch_id] = [
                        [o.spec.request_id, o.attempt, 0] for o in command.order.orders
                    ]
                    orders[command.order.batch_id] = command.order
                case SliceDone():
                    answered.append(command.batch_id)
                case TokenBatch():
                    for run in command.runs:
                        key = (run.request_id, run.attempt)
                        assert run.position <= sent.get(key, 0), "a gap"
                        end = run.position + len(unpack(run.ids))
                        sent[key] = max(end, sent.get(key, 0))
                    if rng.random() < 0.8:
                        note(bench.do(TokensSent(command.gateway)))
                    else:
                        sent_back = TokensNotSent(command)
                        for run in command.runs:
                            key = (run.request_id, run.attempt)
                            sent[key] = min(sent[key], run.position)
                        note(bench.do(sent_back))

    given = 0
    for step in range(300):
        bench.now += rng.choice([0.0, 0.001, 0.01])
        action = rng.random()
        if action < 0.2:
            chosen = rng.sample(sorted(attempts), rng.randrange(1, 4))
            for name in chosen:
                attempts[name] += 1
            given += 1
            shares = [make_order(make_spec(n), attempt=attempts[n]) for n in chosen]
            note(bench.do(make_batch(*shares, epoch=0, batch_id=f"b{given}")))
        elif action < 0.7 and started:
            batch_id = next(iter(started))
            tokens = []
            for row in started[batch_id]:
                name, attempt, position = row  # type: ignore[misc]
                tokens.append(StepTokens(name, attempt, position, (step,)))
                row[2] += 1  # type: ignore[index]
            ended: tuple[SliceEnd, ...] = ()
            if rng.random() < 0.3:
                rows = started.pop(batch_id)
                results = tuple(
                    SliceResult(request_id=r[0], attempt=r[1], position=0)  # type: ignore[index]
                    for r in rows
                )
                ended = (SliceEnd(batch_id, results, TIMINGS),)
            note(bench.do(EngineStepped(StepReport(tokens=tuple(tokens), ended=ended))))
        elif action < 0.75 and started:
            batch_id = rng.choice(sorted(started))
            del started[batch_id]
            note(bench.do(BatchRefused(orders[batch_id], "no")))  # type: ignore[arg-type]
        elif action < 0.8:
            name = rng.choice(sorted(attempts))
            attempt = rng.randrange(attempts[name] + 1)
            note(bench.do(Drop(epoch=0, worker="worker-1", request_id=name, attempt=attempt)))
        elif action < 0.85:
            name = rng.choice(sorted(attempts))
            note(
                bench.do(
                    SendTokens(epoch=0, worker="worker-1", request_id=name, attempt=1, position=0)
                )
            )
        else:
            note(bench.wake())
    for batch_id in sorted(started):
        note(bench.do(BatchRefused(orders[batch_id], "end")))  # type: ignore[arg-type]
    batches = [batch_id for batch_id in answered if batch_id]
    assert sorted(batches) == sorted(f"b{n + 1}" for n in range(given))
