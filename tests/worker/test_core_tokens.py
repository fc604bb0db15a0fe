"""The worker's core: tokens on their way to gateways, and tokens kept for them."""

import pytest
from msgspec.structs import replace as changed

from services.worker.core import outbox, retained
from services.worker.core.events import (
    TokensNotSent,
    TokensSent,
)
from shared.messages import (
    FinishAck,
    SendTokens,
    SliceDone,
    TokenBatch,
    TokenLogprobs,
    TokenRun,
)
from shared.tokens import pack
from tests.worker.core_bench import Bench, only, result, runs_of
from tests.worker.orders import make_batch, make_order, make_spec


def test_tokens_are_joined_while_more_is_running(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), make_order(make_spec("b")), epoch=0))
    for name in ("a", "b"):
        assert len(only(TokenBatch, bench.make(name, 0, [1]))) == 1, "somebody waits for a first"
        bench.do(TokensSent("gateway-1"))
    for position in range(1, 6):
        assert bench.make("a", position, [position + 1]) == []
        assert bench.make("b", position, [50 + position]) == []
    assert bench.core.deadline() == pytest.approx(bench.now + outbox.COALESCE_S)
    commands = bench.wake()
    assert runs_of(commands) == [
        ("a", 1, [2, 3, 4, 5, 6], None),
        ("b", 1, [51, 52, 53, 54, 55], None),
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


def test_tokens_after_the_last_slice_are_unknown_once_nobody_makes_them(bench: Bench) -> None:
    bench.do(make_batch(make_order(make_spec("a")), epoch=0))
    bench.make("a", 0, [1])
    assert bench.do(wish_for(1)) == [], "its slice still runs"
    bench.end("b1", result("a", position=0))
    bench.do(TokensSent("gateway-1"))
    (answer,) = only(SliceDone, bench.do(wish_for(1)))
    assert answer.refused == "unknown request"
    assert [(r.request_id, r.position) for r in answer.results] == [("a", 1)]
