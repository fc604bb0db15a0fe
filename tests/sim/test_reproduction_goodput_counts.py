"""Plain counts of goodput: what is below and what is surely below, errors, small runs."""

from dataclasses import replace
from math import sqrt

import pytest

from sim.reproduction import goodput, goodput_counts
from sim.reproduction.goodput_counts_claims import claims
from sim.reproduction.goodput_estimates import Estimates, error_by_seeds, estimate, mean_ratio
from sim.reproduction.goodput_runs import PAST_FUTURE, SETS, Result, Task

STRONG, WEAK = "aggressive 90 %", "aggressive 99 %"


def result(policy: str, rps: float, noise: float = 0.0, seed: int = 1, clients: int = 10) -> Result:
    """100 s; the parts are above and below their mean in turn, and the last is on it."""
    return Result(
        task=Task("Dist-1", clients, policy, "past-future", seed=seed),
        goodput_rps=0.0,  # by work: nothing here may look at it
        counted_rps=rps,
        good_tps=0.0,
        ended=120,
        good=round(100 * rps),
        late=3,
        turned_away=0,
        evictions=0,
        kv_util=0.9,
        batch=30.0,
        duration_s=100.0,
        parts_rps=(rps + noise, rps - noise, rps + noise, rps - noise, rps),
    )


def of(ours: float, noise: float = 0.0) -> Estimates:
    """Past-Future has so much of the better of two baselines, at one of two points."""
    return Estimates(
        [
            result(policy, rps, noise, seed, clients)
            for seed in (1, 2)
            for clients in (10, 20)
            for policy, rps in ((PAST_FUTURE, ours if clients == 10 else 1.0), (WEAK, 0.5))
        ]
        + [result(STRONG, 1.0, noise, seed, clients) for seed in (1, 2) for clients in (10, 20)]
    )


@pytest.mark.parametrize(
    ("ours", "noise", "strictly", "within_noise"),
    [
        (0.97, 0.0, True, True),
        (0.96, 0.0, False, False),
        (0.96, 0.1, False, True),  # the ratio's standard error is 0.04
        (0.80, 0.1, False, False),
        (1.10, 0.1, True, True),
    ],
)
def test_below_and_surely_below(
    ours: float, noise: float, strictly: bool, within_noise: bool
) -> None:
    checks = claims(of(ours, noise))
    assert [check.holds for check in checks] == [strictly, within_noise, None]


def test_it_is_said_how_many_are_below_and_how_many_of_them_by_chance() -> None:
    assert "below 0.97 at 1 of 2, of which 1 by no more than 2" in claims(of(0.96, 0.1))[0].got
    assert "below 0.97 at 1 of 2, of which 0 by no more than 2" in claims(of(0.96))[0].got


def test_the_best_baseline_is_what_counts() -> None:
    point = of(0.9).points[0]
    assert point.best == STRONG
    assert point.ratio == pytest.approx(0.9)


def test_a_rate_is_over_all_runs_and_its_error_that_of_the_parts() -> None:
    runs = [result(STRONG, 1.0, 0.1), replace(result(STRONG, 0.8, 0.1, seed=2), duration_s=300.0)]
    found = estimate(runs)
    assert found.rps == pytest.approx((100 + 80) / 400)
    assert found.late == 6
    # Ten parts: 8 of them 0.1 from 1.0 or 0.8, all of them 0.1 from the mean besides.
    squares = 8 * 0.1**2 + 10 * 0.1**2
    assert found.error == pytest.approx(sqrt(squares / 9 / 10))


def test_errors_of_two_rates_add_as_squares() -> None:
    point = of(0.9, 0.09).points[0]
    ours, theirs = point.ours.error / 0.9, point.theirs.error
    assert point.error == pytest.approx(0.9 * sqrt(ours**2 + theirs**2))
    assert mean_ratio([point, point]) == pytest.approx((0.9, point.error / sqrt(2)))


def test_seeds_that_differ_tell_of_the_noise_too() -> None:
    rates = {1: 1.0, 2: 1.21}
    runs = [result(PAST_FUTURE, rate, seed=seed) for seed, rate in rates.items()]
    runs += [result(STRONG, 1.0, seed=seed) for seed in rates]
    (point,) = Estimates(runs).points
    assert point.error_by_seeds == pytest.approx(0.0953, abs=1e-4)  # ln(1.21) / 2
    assert error_by_seeds([point]) == point.error_by_seeds
    (alone,) = Estimates([runs[0], runs[2]]).points
    assert alone.error_by_seeds is error_by_seeds([alone]) is None


def test_a_point_that_seeds_alone_call_low_is_told() -> None:
    """The parts' error of 0.04 hides it; seeds that agree do not."""
    rates = {1: 0.94, 2: 0.942}
    runs = [result(PAST_FUTURE, rate, 0.1, seed) for seed, rate in rates.items()]
    said = claims(Estimates(runs + [result(STRONG, 1.0, 0.1, seed) for seed in rates]))[1]
    assert said.holds is True
    assert said.got.startswith("0 of 1")
    assert "with the error by seeds, 0.1 %, 1," in said.got


def test_the_whole_grid_is_run_with_every_seed_and_every_run_is_longer_alike() -> None:
    tasks = goodput_counts.tasks(quick=False)
    cells = {(t.lengths, t.clients, t.policy, t.seed) for t in tasks}
    assert len(cells) == len(tasks) == 4 * 7 * len(goodput_counts.POLICIES) * 2
    grid = {
        (t.lengths, t.clients, t.policy): t for t in goodput.tasks(quick=False) if t.group == "grid"
    }
    for task in tasks:
        short = grid[task.lengths, task.clients, task.policy]
        assert task.counted == goodput_counts.LONGER * short.counted
        assert (task.warm, task.preset, task.constants) == (
            short.warm,
            short.preset,
            short.constants,
        )
    assert {t.lengths for t in tasks} == set(SETS)


def test_a_section_of_small_runs() -> None:
    tasks = [
        replace(task, warm=1, counted=3, clients=2)
        for task in goodput_counts.tasks(quick=True)
        if task.clients == 10
    ]
    section = goodput_counts.section([goodput_counts.run(t, lambda done, n: None) for t in tasks])
    assert section.checks[0].holds is True  # two clients: every policy admits alike
    assert [row[5][:5] for row in section.tables[0].rows] == ["1.000"]
