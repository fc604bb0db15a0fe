"""Serving time and memory: closed forms against sums, fits against known machines."""

from random import Random

import pytest
from hypothesis import given, strategies as st

from shared.costs import (
    BUCKET_SAMPLES,
    BUCKETS_MAX,
    PRIOR,
    Bilinear,
    CostFit,
    SliceCost,
    joining_saves,
)
from shared.memory import (
    batch_size_limit,
    closed_batch_tokens,
    kv_bytes_per_token,
    token_budget,
)
from shared.messages import SliceTimings

coefficients = st.floats(0, 1e-2)
bilinears = st.builds(Bilinear, coefficients, coefficients, coefficients, coefficients)
TRUE = SliceCost(
    prefill=Bilinear(per_row_token=3e-4, per_row=1e-3, per_token=2e-4, fixed=0.02),
    decode=Bilinear(per_row_token=4e-6, per_row=2e-3, per_token=1e-6, fixed=0.03),
)


def by_hand(cost: SliceCost, rows: int, longest: int, iterations: int) -> float:
    """A slice's time, iteration by iteration."""
    seconds = cost.prefill.at(rows, longest)
    for context in range(longest + 1, longest + iterations):
        seconds += cost.decode.at(rows, context)
    return seconds


@given(bilinears, bilinears, st.integers(1, 64), st.integers(1, 2000), st.integers(1, 200))
def test_closed_form_equals_the_sum(
    prefill: Bilinear, decode: Bilinear, rows: int, longest: int, iterations: int
) -> None:
    cost = SliceCost(prefill=prefill, decode=decode)
    expected = by_hand(cost, rows, longest, iterations)
    assert cost.slice_s(rows, longest, iterations) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def measured(cost: SliceCost, rng: Random, noise: float) -> SliceTimings:
    rows, longest, iterations = rng.randint(1, 32), rng.randint(4, 900), rng.choice((8, 32, 64))
    prefill_s = cost.prefill.at(rows, longest)
    whole_s = by_hand(cost, rows, longest, iterations)
    return SliceTimings(
        prefill_s=prefill_s * rng.uniform(1 - noise, 1 + noise),
        decode_s=(whole_s - prefill_s) * rng.uniform(1 - noise, 1 + noise),
        iterations=iterations,
        input_tokens_max=longest,
        batch_size=rows,
    )


@pytest.mark.parametrize(("noise", "worst"), [(0.0, 0.01), (0.1, 0.1)])
def test_the_fit_predicts_slices_it_has_not_seen(noise: float, worst: float) -> None:
    rng = Random(7)
    fit = CostFit()
    for _ in range(200):
        fit.observe(measured(TRUE, rng, noise))
    for _ in range(100):
        rows, longest, iterations = rng.randint(1, 32), rng.randint(4, 900), rng.choice((16, 128))
        expected = by_hand(TRUE, rows, longest, iterations)
        assert fit.cost.slice_s(rows, longest, iterations) == pytest.approx(expected, rel=worst)


@pytest.mark.parametrize("speed", [0.01, 1.0, 100.0])
def test_one_sample_sets_the_speed(speed: float) -> None:
    """Whatever the prior's speed: the same slice is predicted well after it was seen once."""
    fit = CostFit()
    seen = SliceTimings(
        prefill_s=0.02 * speed,
        decode_s=0.5 * speed,
        iterations=64,
        input_tokens_max=100,
        batch_size=4,
    )
    fit.observe(seen)
    assert fit.cost.slice_s(4, 100, 64) == pytest.approx(0.52 * speed, rel=0.05)


@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 3, *[st.floats(0, 1e3)] * 2), max_size=20))
def test_coefficients_are_never_negative(rows: list[tuple[int, int, int, float, float]]) -> None:
    fit = CostFit()
    for batch_size, longest, iterations, prefill_s, decode_s in rows:
        fit.observe(
            SliceTimings(
                prefill_s=prefill_s,
                decode_s=decode_s,
                iterations=iterations,
                input_tokens_max=longest,
                batch_size=batch_size,
            )
        )
    for part in (fit.cost.prefill, fit.cost.decode):
        assert min(part.per_row_token, part.per_row, part.per_token, part.fixed) >= 0.0
        assert part.at(10, 10) < float("inf")


def test_the_window_is_bounded() -> None:
    fit = CostFit()
    rng = Random(1)
    for _ in range(5000):
        rows, longest = int(2 ** rng.uniform(0, 24)), int(2 ** rng.uniform(0, 24))
        timings = SliceTimings(
            prefill_s=0.1, decode_s=0.0, iterations=1, input_tokens_max=longest, batch_size=rows
        )
        fit.observe(timings)
    assert fit.samples > 1000
    assert BUCKETS_MAX < len(fit.window) <= BUCKETS_MAX * BUCKET_SAMPLES


def test_impossible_timings_are_ignored() -> None:
    fit = CostFit()
    for nonsense in (
        SliceTimings(),
        SliceTimings(prefill_s=float("nan"), iterations=1, input_tokens_max=1, batch_size=1),
        SliceTimings(prefill_s=-1.0, iterations=1, input_tokens_max=1, batch_size=1),
        SliceTimings(decode_s=float("inf"), iterations=2, input_tokens_max=1, batch_size=1),
    ):
        fit.observe(nonsense)
    assert fit.samples == 0
    assert fit.cost == PRIOR


@given(bilinears, st.integers(1, 30), st.integers(1, 30), st.integers(1, 500), st.integers(0, 500))
def test_joining_saves_what_it_says(
    cost: Bilinear, short_rows: int, long_rows: int, shorter: int, more: int
) -> None:
    longer = shorter + more
    apart = cost.at(short_rows, shorter) + cost.at(long_rows, longer)
    together = cost.at(short_rows + long_rows, longer)
    if abs(apart - together) > 1e-9 * (apart + together):
        assert joining_saves(cost, short_rows, shorter, longer) == (together < apart)


def test_memory_of_known_models() -> None:
    """LLaMA2-13B and -7B in float16: 800 and 512 KiB per token."""
    assert kv_bytes_per_token(40, 40, 128, 2) == 819_200
    assert kv_bytes_per_token(32, 32, 128, 2) == 524_288


@given(st.integers(0, 10**6), st.integers(1, 4000), st.integers(1, 512))
def test_the_limit_is_the_last_size_that_fits(budget: int, longest: int, iterations: int) -> None:
    rows = batch_size_limit(budget, longest, iterations)
    assert closed_batch_tokens(rows, longest, iterations) <= budget
    assert closed_batch_tokens(rows + 1, longest, iterations) > budget
    assert token_budget(budget, 0.5) == budget // 2
