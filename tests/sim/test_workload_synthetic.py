"""Drawn lengths and arrivals: their distribution, their repeatability, and what is no set."""

import statistics
from itertools import pairwise

import pytest

from sim.workload import Workload, WorkloadError, make_workload

DRAWS = 4000


def gaps_of(workload: Workload) -> list[float]:
    """Seconds between neighbouring arrivals."""
    times = [item.arrival_s or 0.0 for item in workload.items]
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("dist-1", (32, 4096), (2048, 4096)),
        ("dist-2", (3000, 5000), (3000, 5000)),
        ("dist-3", (2048, 4096), (32, 4096)),
        ("uniform:7x1-3", (7, 7), (1, 3)),
    ],
)
def test_uniform_sets_fill_their_range(
    name: str, prompt: tuple[int, int], output: tuple[int, int]
) -> None:
    items = make_workload(name, limit=DRAWS, clients=4).items
    for (low, high), lengths in (
        (prompt, [item.prompt_tokens for item in items]),
        (output, [item.output_tokens for item in items]),
    ):
        assert low <= min(lengths) <= low + (high - low) * 0.02
        assert high - (high - low) * 0.02 <= max(lengths) <= high
        assert statistics.mean(lengths) == pytest.approx((low + high) / 2, rel=0.05)


def test_a_lognormal_has_its_median_and_is_capped() -> None:
    items = make_workload("lognormal:500/1.2x200/0.5", limit=DRAWS, rate=1).items
    assert statistics.median(item.prompt_tokens for item in items) == pytest.approx(500, rel=0.1)
    logs = [item.output_tokens for item in items]
    assert statistics.quantiles(logs, n=100)[83] == pytest.approx(200 * 2.71828**0.5, rel=0.08)
    capped = make_workload("lognormal:500/1.2x200/0.5", limit=DRAWS, rate=1, max_prompt_tokens=600)
    assert max(item.prompt_tokens for item in capped.items) == 600


def test_lengths_repeat_with_the_seed_and_stay_when_the_rate_changes() -> None:
    slow, fast, other = (
        [
            item.output_tokens
            for item in make_workload("dist-1", limit=50, rate=rate, seed=seed).items
        ]
        for rate, seed in ((1, 3), (9, 3), (1, 4))
    )
    assert slow == fast
    assert slow != other


@pytest.mark.parametrize("burst", [None, 0.3, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(burst: float | None) -> None:
    gaps = gaps_of(make_workload("uniform:1x1", limit=20_000, rate=4.0, burst=burst))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.08)
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burst or 1.0, rel=0.08)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("uniform:32-4096", "uniform:LOW-HIGHxLOW-HIGH"),
        ("uniform:9-3x5", "'9-3' must rise"),
        ("uniform:0-3x5", "within 1"),
        ("lognormal:500x200", "MEDIAN/SIGMA"),
        ("lognormal:500/-1x200/1", "sigma"),
        ("dist-4", r"no such file.*dist-1, dist-2, dist-3"),
    ],
)
def test_what_is_no_set_is_told_with_the_form(source: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make_workload(source, rate=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --rate or --clients"),
        ({"clients": 2, "burst": 2.0}, "give --rate too"),
        ({"rate": 1.0, "burst": -1.0}, "--burst must be above 0"),
        ({"rate": 1.0, "burst": 1e6}, "up to 100"),
        ({"rate": float("nan")}, "--rate must be above 0"),
        ({"rate": 1.0, "limit": 0}, "--limit must be above 0"),
        ({"rate": 1.0, "max_output_tokens": 0}, "--max-output-tokens must be at least 1"),
        ({"rate": 1.0, "tenants": "many"}, "shares such as 8:1:1"),
    ],
)
def test_options_that_make_no_arrivals_say_why(options: dict[str, float], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        make_workload("dist-1", **options)  # type: ignore[arg-type]
