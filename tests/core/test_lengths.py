"""Lengths: draws, conditional samples after the source's rule, cold start, cut lengths, means."""

from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.lengths import (
    OPEN_END,
    Histories,
    LengthModel,
    prepare,
    prepare_lengths,
)
from services.scheduler.core.settings import Constants
from shared.messages import LengthClass, LengthForecast
from shared.tokens import pack

WARM = Constants(cold_start_share=0.0)
SOURCE = Constants(
    history_window=1000,
    cold_start_tokens=512,
    lengths_within_cap=False,
    requeued_conditioned=False,
)
"""The artifact's simulator."""
SPLITMIX64 = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
"""First outputs of the reference implementation in C for seed 1234567."""


def model_of(lengths: list[int], constants: Constants = WARM, cut: str = "") -> LengthModel:
    censored = np.array([mark == "x" for mark in cut]) if cut else None
    return prepare_lengths(np.array(lengths, dtype=np.int64), censored, constants)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# ------------------------------------------------------------------------------------------- draws


def test_draws_are_those_of_the_reference_implementation() -> None:
    assert Draws(1234567).uniforms(4).tolist() == [(x >> 11) * 2.0**-53 for x in SPLITMIX64]


def test_draws_do_not_depend_on_how_they_were_asked_for() -> None:
    whole = Draws(5).uniforms(20_000).tolist()
    parts = Draws(5)
    assert [x for size in (1, 4000, 7, 9000, 0, 6992) for x in parts.uniforms(size)] == whole
    assert Draws(5, drawn=12_345).uniforms(3).tolist() == whole[12_345:12_348]
    assert min(whole) >= 0
    assert max(whole) < 1
    assert Draws(-1).uniforms(2).tolist() == Draws(2**64 - 1).uniforms(2).tolist()
    assert Draws(6).uniforms(3).tolist() != whole[:3]


def test_whole_numbers_are_even_and_within_bounds() -> None:
    draws = Draws(1)
    counts = Counter(draws.below(5) for _ in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(abs(count - 1000) for count in counts.values()) < 150
    assert [draws.below(1), draws.below(0), draws.below(-3)] == [0, 0, 0]


# ------------------------------------------------------------------------------------- the sampler


def by_the_note(history: list[int], made: int, cap: int, share: float) -> int:
    """Section 1.2's rule in its own words; `share` of the way through the segments."""
    ordered = sorted(history)
    above = ordered[bisect_right(ordered, made) :]
    grid = [made, *above, max(cap, above[-1] if above else made)]
    place = share * (len(grid) - 1)
    k = int(place)
    return round(grid[k] + (grid[k + 1] - grid[k]) * (place - k)) - made


def test_samples_are_the_source_s_rule_draw_for_draw() -> None:
    rng = np.random.default_rng(0)
    history = rng.integers(1, 3000, 700).tolist()
    made, cap = rng.integers(0, 3500, 60), np.full(60, 4096)
    model = model_of(history, replace(SOURCE, cold_start_share=0.0))
    shares = Draws(9).uniforms(5 * 60).reshape(5, 60)
    found = model.remaining(made, cap, Draws(9), 5)
    for row, rows in zip(found, shares, strict=True):
        expected = [by_the_note(history, g, 4096, u) for g, u in zip(made, rows, strict=True)]
        assert row.tolist() == expected


def test_a_limit_below_the_history_binds_unless_the_source_s_quirk_is_on() -> None:
    history = list(range(100, 1100))
    model = model_of(history)
    assert model.remaining(ints(10), ints(200), Draws(1), 500).max() == 190
    assert model.candidate(0, 200, Draws(1), 500).max() == 200
    free = model_of(history, replace(WARM, lengths_within_cap=False))
    assert free.remaining(ints(10), ints(200), Draws(1), 500).max() > 900
    assert free.candidate(0, 200, Draws(1), 500).max() > 900


def test_who_has_outlived_the_history_may_go_to_the_limit() -> None:
    left = model_of([5, 9]).remaining(ints(50), ints(150), Draws(2), 4000)
    assert 45 < left.mean() < 55
    assert left.min() >= 0
    assert left.max() <= 100


def test_the_plain_variant_gives_only_known_lengths_and_the_limit_where_there_is_none() -> None:
    model = model_of([10, 20, 20, 40], replace(WARM, lengths_interpolated=False))
    left = model.remaining(ints(10, 15, 40), ints(64, 64, 64), Draws(3), 3000)
    assert Counter(left[:, 0].tolist()).keys() == {10, 30}
    assert (left[:, 1] == 5).mean() == pytest.approx(2 / 3, abs=0.03)
    assert set(left[:, 2].tolist()) == {24}


def test_new_and_requeued_candidates() -> None:
    history = [10, 20, 30, 40]
    ours, source = model_of(history), model_of(history, replace(SOURCE, cold_start_share=0.0))
    for model in (ours, source):
        assert set(model.candidate(0, 64, Draws(4), 400).tolist()) == set(history)
    again = ours.candidate(35, 64, Draws(4), 400)
    assert again.min() >= 0
    assert again.max() <= 64 - 35
    assert set(source.candidate(35, 64, Draws(4), 400).tolist()) == set(history)


def test_means_are_those_of_the_samples() -> None:
    rng = np.random.default_rng(5)
    model = model_of(rng.integers(1, 900, 300).tolist())
    for made, cap in ((0, 400), (1, 4096), (350, 800), (899, 2000), (950, 1000)):
        if made:
            samples = model.remaining(ints(made), ints(cap), Draws(made), 40_000)
        else:
            samples = model.candidate(made, cap, Draws(made), 40_000)
        expected = model.expected_remaining(made, cap)
        assert samples.mean() == pytest.approx(expected, rel=0.02, abs=0.6)
        assert model.expected_remaining_all(ints(made), ints(cap))[0] == pytest.approx(expected)
    assert model.expected_output(10_000) == pytest.approx(np.mean(model.lengths))


# -------------------------------------------------------------------------- cold start, cut lengths


def test_stand_ins_go_as_lengths_come() -> None:
    constants = Constants(history_window=10, cold_start_tokens=512)
    for real, stand_ins in ((0, 5), (3, 5), (5, 5), (6, 4), (9, 1), (10, 0), (25, 0)):
        model = model_of([1] * real, constants)
        assert Counter(model.lengths.tolist())[512] == stand_ins
        assert Counter(model.lengths.tolist())[1] == min(real, 10)
        assert model.requests == min(real, 10)


def test_without_any_history_everybody_may_use_the_whole_limit() -> None:
    model = prepare(None, Constants())
    assert set(model.candidate(0, 700, Draws(1), 50).tolist()) == {700}
    left = model.remaining(ints(10), ints(700), Draws(1), 2000)
    assert (left == 690).mean() > 0.99
    assert model.expected_output(700) == 700
    assert prepare(None, WARM).candidate(0, 700, Draws(1), 3).tolist() == [700, 700, 700]
    assert prepare(None, WARM).expected_output(700) == 350  # nothing at all: anywhere up to it


def test_the_weight_of_a_cut_length_goes_to_longer_ones() -> None:
    # Kaplan-Meier by hand: 10 has 1/5, 20 has 1/5; the cut 30 gives its fifth to 40 and beyond.
    model = model_of([20, 10, 30, 40, 50], cut="..x..")
    assert model.lengths.tolist() == [10, 20, 40, 40, 50]
    untouched = model_of([20, 10, 30, 40, 50], replace(WARM, censored_open=False), cut="..x..")
    assert untouched.lengths.tolist() == [10, 20, 30, 40, 50]


def test_beyond_the_longest_full_length_the_end_is_open() -> None:
    model = model_of([10, 20, 64, 64], cut="..xx")
    assert model.lengths.tolist() == [10, 20, OPEN_END, OPEN_END]
    drawn = model.candidate(0, 300, Draws(1), 4000)
    assert (drawn == 300).mean() == pytest.approx(0.5, abs=0.03)
    assert model.expected_output(300) == 157.5


def test_cut_lengths_at_differing_limits_estimate_the_whole_distribution() -> None:
    rng = np.random.default_rng(7)
    truth, limits = rng.geometric(1 / 300, 1000), rng.choice([100, 400, 5000], 1000)
    seen, cut = np.minimum(truth, limits), truth > limits
    found = prepare_lengths(seen, cut, WARM).lengths
    biased = prepare_lengths(seen, None, WARM).lengths
    assert np.median(found) == pytest.approx(np.median(truth), rel=0.1)
    assert np.median(biased) < 0.6 * np.median(truth)


# ---------------------------------------------------------------------------------- from the wire


def test_the_model_s_own_class_is_used_and_prepared_once() -> None:
    mine = LengthClass(model="m", lengths=pack([5, 7, 64]), censored=bytes([0, 0, 1]), finished=3)
    other = LengthClass(model="o", lengths=pack([9]), finished=1)
    forecast = LengthForecast(version=1, classes=(other, mine))
    histories = Histories(WARM)
    model = histories.of(forecast, "m")
    assert model.lengths.tolist() == [5, 7, OPEN_END]
    assert histories.of(forecast, "m") is model
    assert histories.of(forecast, "o").lengths.tolist() == [9]
    assert histories.of(forecast, "nobody").requests == 0
    later = LengthForecast(version=2, classes=(mine,))
    assert histories.of(later, "m") is not model
    assert histories.of(None, "m").requests == 0


def test_only_the_latest_of_the_window_count() -> None:
    known = LengthClass(model="m", lengths=pack(range(1, 101)), finished=100)
    model = prepare(known, Constants(history_window=10))
    assert model.lengths.tolist() == list(range(91, 101))


def test_a_class_that_makes_no_sense_is_still_a_history() -> None:
    torn = LengthClass(model="m", lengths=pack([5, 7]) + b"\x01", censored=b"\x01", finished=-4)
    assert prepare(torn, WARM).lengths.tolist() == [5, 7]
    empty = LengthClass(model="m", lengths=b"", finished=0)
    assert prepare(empty, WARM).candidate(0, 8, Draws(0), 2).tolist() == [8, 8]
    zero = prepare(LengthClass(model="m", lengths=array("I", [0] * 4).tobytes(), finished=4), WARM)
    assert zero.candidate(0, 0, Draws(0), 2).tolist() == [0, 0]
    assert zero.remaining(ints(9), ints(3), Draws(0), 2).tolist() == [[0], [0]]
