"""Drift: windows of one source are alike, windows of two are not."""

from random import Random

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.estimator.core.drift import REQUESTS_MIN, similarity
from services.estimator.core.history import History
from services.estimator.metrics import EstimatorMetrics
from tests.estimator.reports import report

RNG = Random(0)
SHORT = [int(RNG.expovariate(1 / 60)) for _ in range(1000)]
LONG = [int(RNG.gauss(900, 200)) for _ in range(1000)]


def test_the_measure_is_a_cosine() -> None:
    assert similarity(SHORT, SHORT) == pytest.approx(1)
    assert similarity([1] * 200, [1000] * 200) == 0
    assert similarity([0] * 200, [0] * 400) == pytest.approx(1)
    assert similarity([1] * 200, [1] * 100 + [1000] * 100) == pytest.approx(0.5**0.5)


def test_one_source_is_like_itself_and_unlike_another() -> None:
    steady, changed = similarity(SHORT[:500], SHORT[500:]), similarity(SHORT, LONG)
    assert steady is not None
    assert changed is not None
    assert steady > 0.95
    assert changed < 0.2


def test_few_requests_say_nothing() -> None:
    few = [5] * (REQUESTS_MIN - 1)
    assert similarity(few, SHORT) is None
    assert similarity(SHORT, few) is None
    assert similarity([], []) is None


def test_the_history_tells_when_its_model_s_lengths_change_and_when_they_have_changed() -> None:
    history = History(window=600)
    said = []
    for number, length in enumerate([*SHORT[:600], *LONG[:600]]):
        history.add(report(number, max(0, length)))
        said.append(history.similarity("demo"))
    assert said[2 * REQUESTS_MIN - 2] is None
    known = said[2 * REQUESTS_MIN - 1 :]
    assert min(known[:200]) > 0.85
    assert min(known[200:]) < 0.2
    assert known[-1] > 0.85


def test_metrics_show_it_once_it_is_known() -> None:
    registry = CollectorRegistry()
    metrics, history = EstimatorMetrics(registry), History(window=1000)
    for number, length in enumerate(SHORT[:500]):
        if number == 300:
            metrics.show(history)
            assert b"similarity_ratio{" not in generate_latest(registry)
        history.add(report(number, length))
    metrics.show(history)
    assert b'tranche_estimator_window_similarity_ratio{model="demo"} 0.9' in generate_latest(
        registry
    )
