"""The history core: windows, censoring, repeats, versions and bounds."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st

from services.estimator.core.history import (
    LENGTH_MAX,
    MODELS_MAX,
    RECENT_IDS_MAX,
    History,
    fault_of,
)
from shared.messages import Finished, FinishReason, LengthForecast, decode, encode
from shared.tokens import unpack
from tests.estimator.reports import report

REASONS: tuple[FinishReason, ...] = ("stop", "length", "cancelled", "error")


def test_a_forecast_says_lengths_oldest_first_with_the_cut_ones_marked() -> None:
    history = History(window=10, version=100)
    history.add(report(1, 30))
    history.add(report(2, 100, reason="length"))
    history.add(report(3, 7, reason="cancelled"))
    history.add(report(4, 0, reason="error"))
    history.add(report(5, 20))
    forecast = history.forecast()
    (demo,) = forecast.classes
    assert forecast.version == 103
    assert demo.model == "demo"
    assert list(unpack(demo.lengths)) == [30, 100, 20]
    assert demo.censored == bytes([0, 1, 0])
    assert demo.finished == 3
    assert history.totals("demo") == {"stop": 2, "length": 1, "cancelled": 1, "error": 1}


def test_models_do_not_mix_and_come_in_a_fixed_order() -> None:
    history = History(window=10)
    for number, model in enumerate(("b", "a", "b", "c")):
        history.add(report(number, number, model=model))
    history.add(report(9, model="silent", reason="cancelled"))
    classes = history.forecast().classes
    assert [known.model for known in classes] == ["a", "b", "c"]
    assert [list(unpack(known.lengths)) for known in classes] == [[1], [0, 2], [3]]


def test_a_repeat_changes_nothing_whatever_it_says() -> None:
    history = History(window=10)
    assert history.add(report(1, 30))
    before = history.forecast()
    assert not history.add(report(1, 30))
    assert not history.add(report(1, 99, reason="cancelled"))
    assert history.forecast() == before
    assert history.totals("demo") == {"stop": 1}


def test_a_cancelled_request_does_not_change_the_version() -> None:
    history = History(window=10)
    history.add(report(1, reason="cancelled"))
    assert history.version == 0
    assert history.forecast().classes == ()


def test_five_numbers() -> None:
    history = History(window=100)
    for length in range(1, 101):
        history.add(report(length, length, reason="length" if length > 75 else "stop"))
    lengths = history.lengths("demo")
    assert (lengths.requests, lengths.mean, lengths.p50, lengths.p95) == (100, 50.5, 50, 95)
    assert lengths.censored_share == 0.25


def test_an_empty_window_has_no_numbers_and_does_not_fail() -> None:
    history = History(window=5)
    history.add(report(1, reason="error"))
    assert history.lengths("demo").requests == 0


def test_models_are_bounded_and_the_silent_one_goes() -> None:
    history = History(window=5)
    for number in range(MODELS_MAX):
        history.add(report(number, model=f"m{number}"))
    history.add(report(1_000, model="m0"))
    version = history.version
    history.add(report(1_001, model="new"))
    assert len(history.models()) == MODELS_MAX
    assert "m0" in history.models()
    assert "m1" not in history.models()
    assert history.version > version


def test_remembered_ids_are_bounded() -> None:
    history = History(window=1)
    for number in range(RECENT_IDS_MAX + 1):
        history.add(report(number))
    assert not history.knows("r0")
    assert history.knows("r1")
    assert history.knows(f"r{RECENT_IDS_MAX}")


def test_restored_totals_count_what_no_row_shows() -> None:
    history = History(window=2)
    totals: dict[tuple[str, FinishReason], int] = {
        ("demo", "stop"): 70,
        ("demo", "cancelled"): 4,
        ("gone", "stop"): 1,
    }
    history.restore([report(1, 10), report(2, 20)], totals)
    assert history.totals("demo") == {"stop": 70, "cancelled": 4}
    assert history.models() == ("demo",)
    assert history.forecast().classes[0].finished == 70
    assert not history.add(report(2, 20))


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"output_tokens": -1}, "output_tokens is -1"),
        ({"output_tokens": LENGTH_MAX + 1}, "output_tokens is"),
        ({"prompt_tokens": -5}, "prompt_tokens is -5"),
        ({"max_tokens": 2**60}, "max_tokens is"),
        ({"request_id": ""}, "no request_id"),
        ({"model": ""}, "no model"),
        ({"model": "m" * 100_000}, "a model name of 100000 characters"),
    ],
)
def test_what_cannot_be_true_has_a_fault(wrong: dict[str, Any], fault: str) -> None:
    assert fault_of(report(1)) == ""
    assert fault_of(report(1, LENGTH_MAX)) == ""
    assert fault_of(report(1, **{"output_tokens": 1, **wrong})).startswith(fault)


reports = st.builds(
    report,
    st.integers(0, 20),
    st.integers(0, LENGTH_MAX),
    model=st.sampled_from(("a", "b")),
    reason=st.sampled_from(REASONS),
)


@given(st.lists(reports, max_size=60), st.integers(1, 8))
def test_any_history_equals_a_plain_list(told: list[Finished], window: int) -> None:
    """The oracle: keep everything once, filter, take the last ones."""
    history = History(window)
    versions = [history.version]
    for one in told:
        history.add(one)
        versions.append(history.version)
    firsts: list[Finished] = []
    for one in told:
        if all(one.request_id != first.request_id for first in firsts):
            firsts.append(one)
    forecast = history.forecast()
    expected = {}
    for model in ("a", "b"):
        ended = [one for one in firsts if one.model == model]
        full = [one for one in ended if one.reason in ("stop", "length")]
        if full:
            expected[model] = [(o.output_tokens, o.reason == "length") for o in full[-window:]]
        if ended:
            assert history.totals(model) == Counter(one.reason for one in ended)
    shown = {
        known.model: list(zip(unpack(known.lengths), map(bool, known.censored), strict=True))
        for known in forecast.classes
    }
    assert shown == expected
    assert versions == sorted(versions)
    assert decode(encode(forecast)) == forecast
    assert isinstance(forecast, LengthForecast)
