"""Predictions of outputs: what counts is what became of like predictions, however bad they are."""

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from services.scheduler.core.policies.lengths import LengthModel, prepare_lengths
from services.scheduler.core.policies.survival import KINDS, kind_of, kinds_of
from services.scheduler.core.settings import Constants
from sim.foretold import Found, Point, at_steps, foretold, measure, missed, told_by
from sim.memory_sets import memory_set

CONSTANTS = Constants(count_last_token=True)
CAP = 4096
Ints = NDArray[np.int64]


def history(count: int = 1000, noise: float = 60.0) -> tuple[Ints, Ints]:
    """Outputs, and predictions that are off by a normal error."""
    draw = np.random.default_rng(3)
    outputs = draw.integers(100, 2000, count)
    told = np.rint(outputs + draw.normal(0.0, noise, count)).astype(np.int64)
    return outputs, np.maximum(1, told)


def model(outputs: Ints, told: Ints | None, cut: Ints | None = None) -> LengthModel:
    kinds = kinds_of(np.full(len(outputs), 100), told)
    censored = None if cut is None else cut.astype(np.bool_)
    return prepare_lengths(outputs, censored, CONSTANTS, kinds)


def middle(known: LengthModel, told: int) -> tuple[float, ...]:
    return known.quantiles((0.1, 0.5, 0.9), CAP, kind_of(100, told))


def test_like_predictions_speak_for_a_request() -> None:
    known = model(*history())
    for told in (300, 1000, 1800):
        low, half, high = middle(known, told)
        assert half == pytest.approx(told, abs=60)
        assert high - low < 400
    assert known.left_tokens(0, CAP, kind_of(100)) == pytest.approx(1050, rel=0.05)


@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_a_bias_does_no_harm(factor: float) -> None:
    outputs, told = history()
    biased = np.maximum(1, (told * factor).astype(np.int64))
    for tokens in (400, 1000, 1800):
        plain = middle(model(outputs, told), tokens)
        assert middle(model(outputs, biased), int(tokens * factor)) == pytest.approx(plain, abs=60)


@pytest.mark.parametrize("told", [np.full(1000, 700), None])
def test_a_predictor_that_tells_nothing_is_not_heard(told: Ints | None) -> None:
    outputs, _ = history()
    if told is None:
        told = np.random.default_rng(5).integers(1, 4000, len(outputs))
    without, known = model(outputs, None), model(outputs, told)
    assert middle(known, 700) == without.quantiles((0.1, 0.5, 0.9), CAP, kind_of(100))


def test_who_outlives_its_prediction_goes_on_as_its_class_does() -> None:
    known = model(*history())
    made, cap = np.array((1500,)), np.array((CAP,))
    ahead = known.survival.horizon(CAP)
    late = known.survival.chances(made, cap, np.array((kind_of(100, 300),)), ahead)[0]
    any_ = known.survival.chances(made, cap, np.array((kind_of(100),)), ahead)[0]
    assert late == pytest.approx(any_)
    assert (np.diff(late) <= 0).all()
    assert known.left_tokens(400, CAP, kind_of(100, 300)) > 20


def test_chances_begin_at_one_and_fall() -> None:
    known = model(*history())
    made = np.arange(0, 2400, 50)
    kinds = np.full(len(made), kind_of(100, 900))
    ahead = known.survival.horizon(CAP)
    chances = known.survival.chances(made, np.full(len(made), CAP), kinds, ahead)
    assert chances[:, 0] == pytest.approx(np.ones(len(made)))
    assert (np.diff(chances, axis=1) <= 1e-12).all()
    assert (chances >= 0).all()


def test_outputs_that_a_limit_cut_are_lower_bounds_among_like_predictions_too() -> None:
    outputs, told = history()
    limit = 1200
    known = model(np.minimum(outputs, limit), told, (outputs > limit).astype(np.int64))
    assert middle(known, 600)[1] == pytest.approx(600, abs=60)
    assert middle(known, 1800)[1] > 1200


def test_a_few_outputs_say_what_the_whole_says() -> None:
    outputs, told = history(20)
    assert middle(model(outputs, told), 300) == middle(model(outputs, told), 1800)


def test_requests_without_a_prediction_are_counted_as_ever() -> None:
    """By hand: G of the class and 20 of the whole."""
    draw = Random(7)
    outputs = np.array([draw.randint(1, 500) for _ in range(400)])
    prompts = np.array([draw.choice((10, 2000)) for _ in range(400)])
    known = prepare_lengths(outputs, None, CONSTANTS, kinds_of(prompts)).survival
    ahead = np.array((0, 10, 100))
    found = known.chances(np.array((50,)), np.array((CAP,)), np.array((kind_of(10),)), ahead)[0]
    mine = outputs[prompts == 10]
    for t, chance in zip(ahead.tolist(), found.tolist(), strict=True):
        tail = (114 / (114 + t)) ** 2
        whole = ((outputs > 50 + t).sum() + tail) / ((outputs > 50).sum() + 1)
        wanted = ((mine > 50 + t).sum() + 20 * whole) / ((mine > 50).sum() + 20)
        assert chance == pytest.approx(wanted)


def test_kinds_tell_prompts_and_predictions_apart() -> None:
    assert kind_of(10, 400) % KINDS == kind_of(10)
    assert kind_of(10, 400) // KINDS == kind_of(3000, 400) // KINDS > 0
    assert len({kind_of(10, told) for told in (1, 100, 110, 1 << 30)}) == 4


def test_predictions_gain_evictions_where_memory_is_short() -> None:
    """A few requests of the real predictor's; the command's own comparison."""
    with_, without = (measure("ShareGPT", 0, told, 500) for told in ("real", "0"))
    assert with_.correlation > 0.9
    assert with_.steps == without.steps
    assert with_.evictions < 0.7 * without.evictions


def test_evictions_at_steps_between_two_margins() -> None:
    points = [Point(100, 0.08), Point(120, 0.02)]
    evictions, bound = at_steps(points, 110)
    assert evictions == pytest.approx(0.04)
    assert bound == ""
    assert at_steps(points, 90) == (0.08, "at least")
    assert at_steps(points, 130) == (0.02, "at most")
    noisy = foretold([(1, length) for length in range(1, 2000)], 0.95, 1)
    real = float(np.corrcoef(noisy, range(1, 2000))[0, 1])
    assert real == pytest.approx(0.95, abs=0.01)
    bad = Found("A", 0, "0.95", 0.95, 1, 0.1, 0.05, "")
    good = Found("B", 0, "0.95", 0.95, 1, 0.1, 0.03, "")
    assert missed([bad, good]) == ["A"]


@pytest.mark.parametrize("told", ["0.1", "0.3", "0.6", "doubled", "constant"])
def test_no_predictor_does_harm(told: str) -> None:
    """Squared errors of the chances to go on, of 600 requests after 1000, new and half done."""
    source = memory_set("ShareGPT", 2)
    outputs = np.array([output for _, output in source.requests])
    prompts = np.array([prompt for prompt, _ in source.requests])

    def error(predicted: Ints) -> float:
        kinds = kinds_of(prompts, predicted)
        known = prepare_lengths(outputs[:1000], None, CONSTANTS, kinds[:1000]).survival
        new, cap = outputs[1000:1600], np.full(600, CAP)
        ahead = known.horizon(CAP)
        errors = [
            (known.chances(made, cap, kinds[1000:1600], ahead) - ((new - made)[:, None] > ahead))
            for made in (new * 0, new // 2)
        ]
        return sum(float(((off**2)[:, 1:] * np.diff(ahead)).sum(axis=1).mean()) for off in errors)

    without = error(0 * outputs)
    assert error(np.array(told_by(source, told, 2))) < 1.01 * without
    assert error(np.array(source.predicted)) < 0.3 * without
