"""A prefill that is under way counts as queued only as far as it should not be done by now."""

import pytest

from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import RunSlice, SchedulerCommand
from tests.core.seam import Bench, beat_of, submit

CAP = 100
PROMPT = tokens.pack(range(150))


def bench_of(*, estimated: bool) -> Bench:
    constants = Constants(
        slice_tokens=16, bind_backlog_tokens=CAP, bind_backlog_estimated=estimated
    )
    bench = Bench("past-future", constants)
    bench.say(beat_of("w1", forms=("leased",), capacity=10_000))
    bench.say(submit("a", prompt=PROMPT))
    return bench


def placed(commands: list[SchedulerCommand]) -> list[str]:
    runs = [command for command in commands if isinstance(command, RunSlice)]
    return [order.spec.request_id for run in runs for order in run.orders]


@pytest.mark.parametrize("estimated", [False, True])
def test_a_newcomer_joins_when_little_of_the_prefill_should_be_left(estimated: bool) -> None:
    bench = bench_of(estimated=estimated)
    per_token_s = bench.core.books.pace.prefill_token_s
    assert placed(bench.say(submit("b", prompt=PROMPT))) == []
    assert placed(bench.after(0.9 * (150 - CAP) * per_token_s)) == []
    assert placed(bench.after(0.3 * (150 - CAP) * per_token_s)) == (["b"] if estimated else [])


def test_what_is_queued_behind_it_does_not_shrink() -> None:
    bench = bench_of(estimated=True)
    per_token_s = bench.core.books.pace.prefill_token_s
    bench.say(submit("b", prompt=PROMPT))
    assert placed(bench.after(60 * per_token_s)) == ["b"]
    bench.say(submit("c", prompt=PROMPT))
    assert placed(bench.after(1000 * per_token_s)) == []


def test_a_limit_beyond_all_reason_breaks_no_estimate() -> None:
    bench = Bench("tranche", Constants(slice_tokens=16))
    bench.say(submit("a", max_tokens=2**63))
    assert "a" in bench.core.books.requests.open
