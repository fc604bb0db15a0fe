"""The ledger: events in, messages and news out, compared as values."""

from dataclasses import dataclass, field

from hypothesis import given, strategies as st

from services.gateway.core.ledger import Ended, Expired, Ledger, Output, Patience, Refused
from services.gateway.core.record import PARKED_RUNS_MAX, Arrived
from shared.messages import (
    Cancel,
    FinishAck,
    Recall,
    Rejected,
    RequestSpec,
    Resume,
    SchedulerBeat,
    Stopped,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenRun,
    TokensWanted,
)
from shared.tokens import pack, unpack

GATEWAY = "gateway-1"
WORKER = "worker-1"
R = "request-1"
SPEC = RequestSpec(
    request_id=R,
    parent_id="call",
    gateway=GATEWAY,
    model="m",
    prompt=pack([1, 2, 3]),
    max_tokens=100,
)
ACK = FinishAck(gateway=GATEWAY, worker=WORKER, request_ids=(R,))
PATIENCE = Patience(gap_s=1.0, silence_s=5.0, first_silence_s=30.0)


def opened(*, expires_at: float = 1000.0) -> Ledger:
    ledger = Ledger(GATEWAY, PATIENCE)
    assert ledger.handle(SchedulerBeat(epoch=1), 0.0) == []
    assert ledger.open(SPEC, 0.0, expires_at) == Submit(spec=SPEC)
    return ledger


def run(position: int, *ids: int, attempt: int = 1, ends: bool = False) -> TokenRun:
    return TokenRun(
        request_id=R,
        attempt=attempt,
        position=position,
        ids=pack(ids),
        finish_reason="length" if ends else None,
    )


def batch(*runs: TokenRun, worker: str = WORKER) -> TokenBatch:
    return TokenBatch(gateway=GATEWAY, worker=worker, epoch=1, runs=runs)


def arrived(position: int, *ids: int) -> Arrived:
    return Arrived(request_id=R, position=position, ids=ids)


# ---------------------------------------------------------------------------------- plain life


def test_tokens_in_order_and_the_end() -> None:
    ledger = opened()
    assert ledger.handle(batch(run(0, 5, 6)), 1.0) == [arrived(0, 5, 6)]
    assert ledger.handle(batch(run(2, 7, ends=True)), 2.0) == [
        arrived(2, 7),
        Ended(R, "length"),
        ACK,
    ]
    assert R not in ledger


def test_a_finish_without_tokens_of_its_own() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 1.0)
    assert ledger.handle(batch(run(1, ends=True)), 2.0) == [Ended(R, "length"), ACK]


def test_a_finish_is_acknowledged_each_time_and_told_once() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5, ends=True)), 1.0)
    again = ledger.handle(batch(run(0, 5, ends=True), worker="worker-2"), 2.0)
    assert again == [FinishAck(gateway=GATEWAY, worker="worker-2", request_ids=(R,))]


def test_late_tokens_of_a_forgotten_request_are_no_news() -> None:
    ledger = opened()
    assert ledger.cancel(R) == [Cancel(gateway=GATEWAY, request_id=R)]
    assert ledger.cancel(R) == []
    assert ledger.handle(batch(run(0, 5)), 1.0) == []


def test_a_cancelled_request_tells_how_far_it_came() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5, 6)), 1.0)
    assert ledger.cancel(R) == [Cancel(gateway=GATEWAY, request_id=R, output_tokens=2)]


def test_a_stop_is_told_even_if_the_output_is_complete() -> None:
    stopped = [Stopped(gateway=GATEWAY, request_id=R, output_tokens=1)]
    ledger = opened()
    assert ledger.stop(R, 1) == stopped
    assert ledger.handle(batch(run(0, 5, 6)), 1.0) == []
    ledger = opened()
    ledger.handle(batch(run(0, 5, 6, ends=True)), 1.0)
    assert ledger.stop(R, 1) == stopped


def test_an_error_comes_with_its_reason() -> None:
    ledger = opened()
    broken = TokenRun(
        request_id=R, attempt=1, position=0, ids=b"", finish_reason="error", detail="no memory"
    )
    assert ledger.handle(batch(broken), 1.0) == [Ended(R, "error", "no memory"), ACK]


# ---------------------------------------------------------------- repeats, overlaps and gaps


def test_repeats_and_overlaps_are_trimmed() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5, 6, 7)), 1.0)
    assert ledger.handle(batch(run(0, 5, 6, 7)), 1.0) == []
    assert ledger.handle(batch(run(1, 6, 7)), 1.0) == []
    assert ledger.handle(batch(run(2, 7, 8)), 1.0) == [arrived(3, 8)]
    assert ledger.counts["repeated"] == 2


def test_logprobs_are_trimmed_with_the_ids() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 1.0)
    scores = tuple(TokenLogprobs(chosen=-float(n)) for n in range(3))
    scored = TokenRun(request_id=R, attempt=1, position=0, ids=pack([5, 6, 7]), logprobs=scores)
    (news,) = ledger.handle(batch(scored), 1.0)
    assert isinstance(news, Arrived)
    assert news.logprobs == scores[1:]


def test_prompt_logprobs_come_once() -> None:
    ledger = opened()
    scores = (TokenLogprobs(chosen=None), TokenLogprobs(chosen=-1.0), TokenLogprobs(chosen=-2.0))
    first = TokenRun(request_id=R, attempt=1, position=0, ids=pack([5]), prompt_logprobs=scores)
    again = TokenRun(request_id=R, attempt=1, position=0, ids=pack([5, 6]), prompt_logprobs=scores)
    (news,) = ledger.handle(batch(first), 1.0)
    assert isinstance(news, Arrived)
    assert news.prompt_logprobs == scores
    assert ledger.handle(batch(again), 1.0) == [arrived(1, 6)]


def test_a_gap_waits_and_is_asked_for() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 1.0)
    assert ledger.handle(batch(run(2, 7)), 2.0) == []
    assert ledger.deadline() == 3.0
    assert ledger.wake(2.9) == []
    wanted = TokensWanted(gateway=GATEWAY, request_id=R, attempt=1, position=1)
    assert ledger.wake(3.0) == [wanted]
    assert ledger.wake(4.9) == []
    assert ledger.wake(5.0) == [wanted]
    assert ledger.handle(batch(run(1, 6)), 5.5) == [arrived(1, 6), arrived(2, 7)]


def test_a_finish_behind_a_gap_waits_too() -> None:
    ledger = opened()
    assert ledger.handle(batch(run(1, 6, ends=True)), 1.0) == []
    assert ledger.handle(batch(run(0, 5)), 1.5) == [
        arrived(0, 5),
        arrived(1, 6),
        Ended(R, "length"),
        ACK,
    ]


def test_what_waits_behind_a_gap_is_bounded() -> None:
    ledger = opened()
    for position in range(1, PARKED_RUNS_MAX + 11):
        assert ledger.handle(batch(run(position, position)), 1.0) == []
    assert ledger.counts["dropped"] == 10
    outputs = ledger.handle(batch(run(0, 99)), 2.0)
    assert len(outputs) == PARKED_RUNS_MAX + 1


def test_silence_is_asked_about_ever_more_rarely() -> None:
    ledger = opened(expires_at=10_000.0)
    ledger.handle(batch(run(0, 5)), 0.0)
    asked_at: list[float] = []
    while len(asked_at) < 8:
        now = ledger.deadline()
        assert now is not None
        if ledger.wake(now):
            asked_at.append(now)
    assert asked_at == [5, 15, 35, 75, 155, 315, 475, 635]


def test_before_the_first_token_patience_is_longer() -> None:
    ledger = opened()
    assert ledger.deadline() == 30.0
    assert ledger.wake(30.0) == [TokensWanted(gateway=GATEWAY, request_id=R, attempt=0, position=0)]


def test_after_a_reconnect_all_open_requests_are_asked_after() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 1.0)
    wanted = TokensWanted(gateway=GATEWAY, request_id=R, attempt=1, position=1)
    assert ledger.reconnected(2.0) == [wanted]
    assert ledger.handle(batch(run(1, 6, ends=True)), 2.1)[0] == arrived(1, 6)
    assert ledger.reconnected(3.0) == []


def test_progress_ends_the_asking() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 0.0)
    assert len(ledger.wake(5.0)) == 1
    ledger.handle(batch(run(1, 6)), 6.0)
    assert ledger.wake(10.9) == []
    assert len(ledger.wake(11.0)) == 1


def test_a_request_expires() -> None:
    ledger = opened(expires_at=12.0)
    outputs = [output for now in (5.0, 12.0) for output in ledger.wake(now)]
    assert outputs == [Cancel(gateway=GATEWAY, request_id=R), Expired(R)]
    assert len(ledger) == 0


def test_a_contradiction_does_not_replace_what_is_there() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5, 6)), 1.0)
    assert ledger.handle(batch(run(1, 9, 9)), 1.0) == []
    assert ledger.counts["conflict"] == 1
    assert ledger.handle(batch(run(2, 7)), 1.0) == [arrived(2, 7)]


def test_malformed_runs_are_counted_only() -> None:
    ledger = opened()
    odd = TokenRun(request_id=R, attempt=1, position=0, ids=b"abc")
    scores = (TokenLogprobs(chosen=-1.0),) * 2
    unequal = TokenRun(request_id=R, attempt=1, position=0, ids=pack([5]), logprobs=scores)
    assert ledger.handle(batch(odd, unequal), 1.0) == []
    assert ledger.counts["malformed"] == 2


# -------------------------------------------------------------------- recalls, epochs, refusals


def test_a_recall_closes_attempts_and_answers_with_the_truth() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5, 6), run(4, 9)), 1.0)
    recall = Recall(epoch=1, gateway=GATEWAY, request_id=R, attempt=1)
    resume = Resume(spec=SPEC, attempt=1, tokens=pack([5, 6]))
    assert ledger.handle(recall, 2.0) == [resume]
    assert ledger.handle(batch(run(2, 7, 8)), 3.0) == []
    assert ledger.counts["closed"] == 1
    assert ledger.handle(batch(run(2, 70, attempt=2)), 4.0) == [arrived(2, 70)]
    assert ledger.handle(batch(run(3, 71, 9, attempt=2)), 4.0) == [arrived(3, 71, 9)]


def test_an_unknown_request_is_cancelled_at_its_recall() -> None:
    ledger = Ledger(GATEWAY)
    recall = Recall(epoch=1, gateway=GATEWAY, request_id="other", attempt=3)
    assert ledger.handle(recall, 1.0) == [Cancel(gateway=GATEWAY, request_id="other")]


def test_two_attempts_of_consecutive_slices_may_cross() -> None:
    """Attempt 2 goes on where attempt 1 ended; its tokens may overtake."""
    ledger = opened()
    assert ledger.handle(batch(run(2, 7, attempt=2)), 1.0) == []
    assert ledger.handle(batch(run(0, 5, 6)), 1.1) == [arrived(0, 5, 6), arrived(2, 7)]


def test_a_new_epoch_hears_of_all_open_requests() -> None:
    ledger = opened()
    ledger.handle(batch(run(0, 5)), 1.0)
    resume = Resume(spec=SPEC, attempt=0, tokens=pack([5]))
    assert ledger.handle(SchedulerBeat(epoch=2), 2.0) == [resume]
    assert ledger.handle(SchedulerBeat(epoch=2), 3.0) == []
    assert ledger.handle(batch(run(1, 6)), 3.0) == [arrived(1, 6)], "its lease goes on"


def test_a_smaller_epoch_is_ignored() -> None:
    ledger = opened()
    ledger.handle(SchedulerBeat(epoch=5, waiting=3), 1.0)
    old: list[SchedulerBeat | Recall | Rejected] = [
        SchedulerBeat(epoch=4, waiting=9),
        Recall(epoch=4, gateway=GATEWAY, request_id=R, attempt=1),
        Rejected(epoch=4, gateway=GATEWAY, request_id=R, reason="queue_full"),
    ]
    assert [ledger.handle(message, 2.0) for message in old] == [[], [], []]
    assert ledger.beat == SchedulerBeat(epoch=5, waiting=3)
    assert ledger.beat_at == 1.0
    assert R in ledger


def test_a_recall_of_a_new_leader_is_a_new_epoch() -> None:
    ledger = opened()
    recall = Recall(epoch=2, gateway=GATEWAY, request_id=R, attempt=4)
    assert ledger.handle(recall, 1.0) == [Resume(spec=SPEC, attempt=4)]
    assert ledger.handle(SchedulerBeat(epoch=2), 1.0) == []


def test_a_refusal_ends_the_request() -> None:
    ledger = opened()
    refusal = Rejected(epoch=1, gateway=GATEWAY, request_id=R, reason="queue_full")
    assert ledger.handle(refusal, 1.0) == [Refused(R, refusal)]
    assert ledger.handle(refusal, 1.0) == []


def test_messages_to_others_are_no_news() -> None:
    assert opened().handle(ACK, 1.0) == []


# ------------------------------------------------------------------------------------- storms


@dataclass
class Reader:
    """What a client would have seen."""

    ids: list[int] = field(default_factory=list)
    ends: int = 0
    acknowledged: int = 0

    def see(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Arrived():
                    assert output.position == len(self.ids), "a token was lost or doubled"
                    assert not self.ends, "tokens after the end"
                    self.ids += output.ids
                case Ended():
                    self.ends += 1
                case FinishAck():
                    self.acknowledged += 1


@given(st.data())
def test_storms_of_repeats_reordering_and_moves(data: st.DataObject) -> None:
    """Two attempts tell the same output in any pieces, repeated, reordered, some lost, with
    recalls and takeovers between; at the end all is sent once more. Nothing is lost or doubled."""
    output = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=30), label="output")
    ledger, reader = opened(expires_at=1e9), Reader()
    pieces = st.tuples(st.integers(0, len(output)), st.integers(0, 8), st.integers(1, 4))
    closed, epoch, now = 0, 1, 0.0
    for start, length, attempt in data.draw(st.lists(pieces, max_size=40), label="pieces"):
        now += data.draw(st.sampled_from([0.0, 0.1, 2.0, 40.0]), label="pause")
        part = output[start : start + length]
        ends = start + length >= len(output)
        reader.see(ledger.handle(batch(run(start, *part, attempt=attempt, ends=ends)), now))
        reader.see(ledger.wake(now))
        match data.draw(st.sampled_from(["", "", "recall", "epoch"]), label="event"):
            case "recall":
                closed = max(closed, attempt)
                recall = Recall(epoch=epoch, gateway=GATEWAY, request_id=R, attempt=attempt)
                answers = ledger.handle(recall, now)
                told = [a for a in answers if isinstance(a, Resume)]
                assert reader.ends or list(unpack(told[0].tokens)) == reader.ids
            case "epoch":
                epoch += 1
                answers = ledger.handle(SchedulerBeat(epoch=epoch), now)
                assert len(answers) == len(ledger)
    final = run(0, *output, attempt=closed + 5, ends=True)
    reader.see(ledger.handle(batch(final), now))
    assert reader.ids == output
    assert reader.ends == 1
    assert reader.acknowledged >= 1
    assert ledger.wake(now + 1e6) == []
    assert ledger.deadline() is None


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 3)), max_size=40))
def test_deadlines_never_stall_and_never_spin(steps: list[tuple[float, int]]) -> None:
    """Whoever wakes the ledger at its deadlines sees every question, and each wake moves on."""
    ledger = opened(expires_at=500.0)
    now, position = 0.0, 0
    for pause, kind in steps:
        now += pause
        while (deadline := ledger.deadline()) is not None and deadline <= now:
            ledger.wake(deadline)
            later = ledger.deadline()
            assert later is None or later > deadline
        if kind == 1:
            ledger.handle(batch(run(position, 1)), now)
            position += 1
        elif kind == 2:
            ledger.handle(batch(run(position + 2, 1)), now)
        deadline = ledger.deadline()
        assert R not in ledger or (deadline is not None and deadline <= 500.0)
