"""What is predicted for a new request, and which refusals follow."""

import pytest

from services.scheduler.core.outputs import Outputs, middle, quantile
from services.scheduler.core.promises import Promises
from services.scheduler.core.rate import BusyRate, FirstTokens
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request
from services.scheduler.core.waits import Waits
from shared import tokens
from shared.messages import Accepted, Cancel, GatewayBeat, Rejected, RunSlice, Submit
from tests.core.seam import Bench, beat_of, spec_of, submit

DOOR = Constants(slice_tokens=16, waiting_max=1000, wait_max_s=5.0, running_max=1)


def waiting(number: int, input_tokens: int = 10, priority: int = 0, since: float = 0.0) -> Request:
    prompt = tokens.pack(range(input_tokens))
    spec = spec_of(f"r{number}", prompt=prompt, priority=priority)
    return Request(spec=spec, number=number, prompt_tokens=input_tokens, since=since)


def test_a_busy_rate_is_what_can_be_done_and_idle_time_does_not_count() -> None:
    rate = BusyRate()
    rate.turn(0.0, busy=True)
    for second in range(1, 61):
        rate.add(float(second), 50.0)
    assert rate.per_s(60.0, guess=1.0) == pytest.approx(50, rel=0.05)
    rate.turn(60.0, busy=False)
    assert rate.per_s(10_000.0, guess=1.0) == pytest.approx(50, rel=0.05)


def test_without_observation_the_rate_is_the_guess() -> None:
    assert BusyRate().per_s(5.0, guess=7.0) == 7.0


def test_first_tokens_are_told_by_own_input_and_by_what_is_queued_before() -> None:
    firsts = FirstTokens()
    for number in range(300):
        own, before = 100 + number * 37 % 4_000, number * 53 % 3_000
        firsts.saw(own, before, 0, 0.05 + own * 2e-4 + before * 5e-5)
    assert firsts.after_s(1_000, 2_000, 0) == pytest.approx(0.35, rel=0.05)
    assert firsts.token_s == pytest.approx(2e-4, rel=0.05)


def test_alike_first_tokens_tell_no_more_than_they_do() -> None:
    firsts = FirstTokens()
    for _ in range(300):
        firsts.saw(500, 0, 0, 0.2)
    assert firsts.after_s(500, 0, 0) == pytest.approx(0.2, rel=0.05)
    assert 0.0 < firsts.after_s(1_000, 0, 0) < 0.4


def test_work_ahead_is_counted_by_priority_and_goes_with_who_leaves() -> None:
    waits = Waits()
    urgent, usual = waiting(1, 30, priority=-1), waiting(2, 10)
    for request in (urgent, usual):
        waits.joined(request, 0.0, workers=1)
    assert (waits.ahead_tokens(-1), waits.ahead_tokens(0), len(waits)) == (30, 40, 2)
    waits.left(urgent, 1.0, placed=True, workers=1)
    waits.left(urgent, 1.0, placed=True, workers=1)
    assert (waits.ahead_tokens(0), waits.tokens, len(waits)) == (10, 10, 1)


def test_outputs_are_told_by_like_prompts() -> None:
    outputs = Outputs()
    assert outputs.like(100) == ()
    for number in range(40):
        outputs.saw(100, 10 + number % 3)
        outputs.saw(5_000, 500)
    assert middle(outputs.like(101)) == 11
    assert outputs.like(5_100)[0] == 500
    assert [quantile(outputs.like(100), level) for level in (0.2, 0.5, 0.9)] == [10, 11, 12]


def test_an_output_that_was_cut_would_have_been_longer() -> None:
    outputs = Outputs()
    for number in range(40):
        outputs.saw(100, 1, cut=True)
        if number % 4 == 0:
            outputs.saw(100, 50 + number)
    assert outputs.like(100)[0] == 50, "how long the others became speaks for them"
    assert len(outputs.like(100)) == 50
    assert outputs.like(100)[-1] == 86


def test_those_that_were_cut_put_nobody_out() -> None:
    outputs = Outputs()
    for _ in range(20):
        outputs.saw(100, 800)
    for number in range(200):
        outputs.saw(100, 1, cut=True)
        outputs.saw(100 if number % 50 == 0 else 9_000, 150, cut=True)
    assert set(outputs.like(100)) == {800}
    assert outputs.guess() == 800
    for _ in range(65):
        outputs.saw(100, 30)
    assert set(outputs.like(100)) == {30}, "all that came before the latest full ones is forgotten"


def test_where_all_were_cut_no_output_is_known_to_be_longer() -> None:
    outputs, learnt = Outputs(), Outputs()
    for number in range(20):
        outputs.saw(100, 90 + number % 3, cut=True)
    assert set(outputs.like(100)) == {92}
    learnt.learn([100] * 20, [90 + number % 3 for number in range(20)], b"\1" * 20)
    assert learnt.like(100) == outputs.like(100)


def test_the_margin_follows_how_often_starts_were_late() -> None:
    promises, calm = Promises(), Promises()
    for number in range(400):
        request = waiting(number)
        promises.made(request, 2.0, 3.0)
        promises.began(request, 5.0 if number % 5 == 0 else 1.9)
        calm.made(request, 2.0, 3.0)
        calm.began(request, 1.9)
    assert 2.0 < promises.late <= 4.0, "a fifth of the starts took 2.5 times as long"
    assert calm.late == pytest.approx(1.0)
    assert promises.misses[-1].kind == "start"
    assert promises.misses[-1].error == pytest.approx(0.1 / 1.9)


def busy_bench(constants: Constants = DOOR, queued: int = 0, policy: str = "past-future") -> Bench:
    """One worker that runs one request; the others wait, ten tokens a second go to the worker."""
    bench = Bench(policy, constants)
    bench.say(beat_of("w1", forms=("leased",), capacity=1000))
    bench.say(submit("running", max_tokens=200))
    for number in range(queued):
        bench.say(submit(f"q{number}"))
    served = bench.core.books.waits.served
    served.work, served.events, served.since = 10.0 * 60, 60.0, 60.0
    return bench


@pytest.mark.parametrize("seconds", [0.1, 5.0, 60.0])
def test_who_waits_for_much_room_is_in_nobody_s_way(seconds: float) -> None:
    """A large prompt finds no room, for long; small ones do all the time, limits or not."""
    bench = Bench("tranche", Constants(slice_tokens=16))
    for _ in range(int(seconds * 10)):
        bench.say(beat_of("w1", forms=("leased",), capacity=4_000, context_tokens_max=4_000))
        bench.say(GatewayBeat(gateway="g1"))
        if not bench.core.books.requests.open:
            for number in range(6):
                bench.say(submit(f"runs{number}", prompt=tokens.pack(range(80)), max_tokens=40))
            bench.say(submit("giant", prompt=tokens.pack(range(3_700)), max_tokens=200))
            assert bench.core.books.requests.open["giant"].waits_for == "room"
        bench.after(0.1)
    urgent = spec_of("small", prompt=tokens.pack(range(20)), ttft_deadline_ms=2_000, priority=-1)
    said = bench.say(Submit(spec=urgent, told=True))
    (told,) = [c for c in said if isinstance(c, Accepted)]
    assert told.start_s < 1.0
    assert any(isinstance(c, RunSlice) for c in said), "and it begins at once"


def test_an_accepted_request_is_told_what_is_predicted_if_its_gateway_asks() -> None:
    bench = busy_bench(queued=2)
    (told,) = bench.say(Submit(spec=spec_of("new"), told=True))
    assert isinstance(told, Accepted)
    assert told.start_s == pytest.approx(4.0, rel=0.05), "two, itself, and one placing more"
    assert told.finish_s > told.start_s
    assert bench.say(submit("other")) == []


def test_a_long_wait_closes_the_door_until_half_the_queue_has_gone() -> None:
    bench = busy_bench(queued=5)
    (answer,) = bench.say(submit("late"))
    assert isinstance(answer, Rejected)
    assert answer.reason == "queue_full"
    assert answer.retry_after_s == pytest.approx(2.5, rel=0.05)
    bench.say(Cancel(gateway="g1", request_id="q0"))
    (again,) = bench.say(submit("early"))
    assert isinstance(again, Rejected), "the wait is short enough, but the door is closed"
    assert again.retry_after_s == pytest.approx(1.5, rel=0.05)
    bench.say(Cancel(gateway="g1", request_id="q1"))
    bench.say(Cancel(gateway="g1", request_id="q2"))
    assert bench.say(submit("in time")) == []


def test_who_has_a_better_priority_passes_a_closed_door() -> None:
    bench = busy_bench(queued=5)
    assert isinstance(bench.say(submit("late"))[0], Rejected)
    assert bench.say(submit("urgent", priority=-1)) == []


@pytest.mark.parametrize(
    ("changes", "retry_after_s"),
    [
        ({"ttft_deadline_ms": 1_000}, 4.0),
        ({"deadline_ms": 1_000}, 4.0),
        ({"ttft_deadline_ms": 1}, None),
        ({"ttft_deadline_ms": 60_000, "deadline_ms": 600_000}, 0.0),
    ],
)
def test_deadlines_that_would_be_missed_are_refused(
    changes: dict[str, int], retry_after_s: float | None
) -> None:
    """With the wait there is now; None: without any queue it would be missed too. 0: taken in."""
    bench = busy_bench(queued=2)
    said = [c for c in bench.say(submit("new", **changes)) if not isinstance(c, RunSlice)]
    if retry_after_s == 0.0:
        assert said == []
        return
    (answer,) = said
    assert isinstance(answer, Rejected)
    assert answer.reason == "deadline"
    expected = None if retry_after_s is None else pytest.approx(retry_after_s, rel=0.05)
    assert answer.retry_after_s == expected


def test_who_is_refused_for_a_deadline_hears_the_wait_of_one_in_no_hurry() -> None:
    bench = busy_bench(queued=5, policy="tranche", constants=Constants(running_max=1))
    (answer,) = bench.say(submit("new", ttft_deadline_ms=100))
    assert isinstance(answer, Rejected)
    assert answer.start_s == pytest.approx(2.0, rel=0.05), "its deadline moves it to the front"
    assert answer.retry_after_s == pytest.approx(7.0, rel=0.05)
