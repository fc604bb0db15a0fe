"""How much is served before a newcomer, in an order that is not that of arrival; and what is told
while little is known."""

import pytest

from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import Accepted, LengthClass, LengthForecast, Submit
from tests.core.seam import Bench, beat_of, spec_of, submit

FULL = Constants(slice_tokens=16, running_max=1, volume_boost_s=10.0)
WAITING = 8


def crowded(tenants: int = 1) -> Bench:
    """One worker that runs one request; behind it wait eight with prompts of 400 tokens, of which
    a hundred a second are taken."""
    bench = Bench("tranche", FULL)
    bench.say(beat_of("w1", forms=("leased",), capacity=10_000))
    bench.say(submit("running", max_tokens=200))
    for number in range(WAITING):
        prompt = tokens.pack([1] * 400)
        bench.say(submit(f"q{number}", prompt=prompt, tenant=f"t{number % tenants}"))
    served = bench.core.books.waits.served
    served.work, served.events, served.since = 100.0 * 60, 60.0, 60.0
    return bench


def told(bench: Bench, name: str, prompt_tokens: int, tenant: str = "t0") -> Accepted:
    prompt = tokens.pack([1] * prompt_tokens)
    (answer,) = bench.say(Submit(spec=spec_of(name, prompt=prompt, tenant=tenant), told=True))
    assert isinstance(answer, Accepted)
    return answer


def test_a_small_request_is_told_its_own_turn_and_a_large_one_that_of_the_last() -> None:
    bench = crowded()
    small, large = told(bench, "small", 4), told(bench, "large", 800)
    assert small.start_s < 2.0
    assert large.start_s == pytest.approx((WAITING * 400 + 4 + 800) / 100, rel=0.1)


def test_of_other_tenants_as_much_is_before_one_as_its_own_tenant_has() -> None:
    bench = crowded(tenants=2)
    newcomer = told(bench, "x", 800, tenant="new")
    known = told(bench, "y", 800, tenant="t0")
    assert newcomer.start_s < known.start_s, "nothing of its own waits"
    assert known.start_s == pytest.approx((WAITING * 400 + 2 * 800) / 100, rel=0.1)


def test_without_any_history_an_output_is_thought_to_be_of_usual_length() -> None:
    bench = Bench("tranche", Constants())
    bench.say(beat_of("w1", forms=("leased",), capacity=100_000, context_tokens_max=100_000))
    spec = spec_of("first", max_tokens=10_000)
    (first, *_) = bench.say(Submit(spec=spec, told=True))
    assert isinstance(first, Accepted)
    assert first.finish_s == pytest.approx(199 * 0.03, rel=0.05), "not as long as it may become"


def test_a_new_leader_tells_what_the_estimator_remembers() -> None:
    bench = Bench("tranche", Constants())
    bench.say(beat_of("w1", forms=("leased",), capacity=100_000, context_tokens_max=100_000))
    history = LengthClass(
        model="m",
        lengths=tokens.pack([20, 900] * 50),
        prompts=tokens.pack([10, 2_000] * 50),
        finished=100,
    )
    bench.say(LengthForecast(version=1, classes=(history,)))
    short = bench.say(Submit(spec=spec_of("a", max_tokens=2_000), told=True))[0]
    prompt = tokens.pack([1] * 2_000)
    long = bench.say(Submit(spec=spec_of("b", prompt=prompt, max_tokens=2_000), told=True))[0]
    assert isinstance(short, Accepted)
    assert isinstance(long, Accepted)
    assert (short.output_tokens, long.output_tokens) == (20, 900)
