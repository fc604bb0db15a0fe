"""The estimator's predictor seen by the scheduler: asked beside the path, heeded if it answers."""

from services.scheduler.core.foretelling import ASKED_MAX
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Finished,
    LengthClass,
    LengthForecast,
    LengthPredicted,
    PredictionWanted,
    RunSlice,
    SchedulerCommand,
    Stopped,
)
from tests.core.seam import PROMPT, Bench, beat_of, submit

FULL = Constants(slice_tokens=16, waiting_max=5000, running_max=1)


def forecast_of(*each: int, predicts: bool = False) -> LengthForecast:
    """Outputs of these lengths in turn, each predicted as it became."""
    lengths = tokens.pack(each * 50)
    count = tokens.count(lengths)
    known = LengthClass(
        model="m",
        lengths=lengths,
        finished=count,
        prompts=tokens.pack([10] * count),
        predicted=lengths,
    )
    return LengthForecast(version=1, classes=(known,), predicts=predicts)


def bench_of(*, predicts: bool = True) -> Bench:
    bench = Bench("tranche", FULL)
    bench.say(beat_of("w1", forms=("leased",)))
    bench.say(forecast_of(2, 400, predicts=predicts))
    return bench


def questions(commands: list[SchedulerCommand]) -> list[PredictionWanted]:
    return [command for command in commands if isinstance(command, PredictionWanted)]


def test_a_new_request_is_asked_about_and_placed_without_waiting() -> None:
    said = bench_of().say(submit("a", tenant="t"))
    (question,) = questions(said)
    assert (question.request_id, question.tenant, question.prompt) == ("a", "t", PROMPT)
    assert any(isinstance(command, RunSlice) for command in said)


def test_nobody_is_asked_without_a_predictor_or_with_a_prediction() -> None:
    assert not questions(bench_of(predicts=False).say(submit("a")))
    assert not questions(bench_of().say(submit("a", predicted_output_tokens=9)))


def test_an_answer_ranks_anew_and_the_history_hears_of_it() -> None:
    bench = bench_of()
    for name in ("runs", "long", "short"):
        bench.say(submit(name, max_tokens=400))
    line = bench.core.books.lines.central
    assert [request.request_id for request in line.ordered(bench.now)] == ["long", "short"]
    for name, length in (("long", 400), ("short", 2)):
        assert bench.say(LengthPredicted(request_id=name, output_tokens=length)) == []
    assert [request.request_id for request in line.ordered(bench.now)] == ["short", "long"]
    bench.say(LengthPredicted(request_id="short", output_tokens=300))  # the first one counts
    said = bench.say(Stopped(gateway="g1", request_id="short", output_tokens=1))
    (ended,) = [command for command in said if isinstance(command, Finished)]
    assert ended.predicted_output_tokens == 2


def test_absurd_and_late_answers_change_nothing() -> None:
    bench = bench_of()
    bench.say(submit("a"))
    request = bench.core.books.requests.open["a"]
    for name, length in (("a", 0), ("a", -5), ("nobody", 7)):
        assert bench.say(LengthPredicted(request_id=name, output_tokens=length)) == []
    assert request.predicted_tokens == 0
    bench.say(LengthPredicted(request_id="a", output_tokens=1 << 30))
    assert request.predicted_tokens == request.spec.max_tokens


def test_questions_without_an_answer_are_bounded_until_the_estimator_speaks() -> None:
    bench = bench_of()
    asked = sum(len(questions(bench.say(submit(f"r{n}")))) for n in range(ASKED_MAX + 20))
    assert asked == ASKED_MAX
    bench.say(LengthForecast(version=2, classes=(), predicts=True))
    assert questions(bench.say(submit("later")))
