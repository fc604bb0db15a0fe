"""The memory-only simulator: to the step where nothing is drawn, and its rules step by step."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.scheduler.core.policies.future import peak
from sim.memory_only import QUIRKS, Lengths, Tally, simulate
from sim.past_future_source import FILE_SET, POLICIES, SETS, SOURCE_STEPS, requests_of
from sim.past_future_table import BLURRED, Task, as_table, cell, run_task, tasks, verdict

O1 = requests_of(FILE_SET, 0)
"""The file's own 1,981 requests."""


def run(policy: str, seed: int = 0) -> Tally:
    return run_task(Task(FILE_SET, policy, seed), lambda done, total: None)


@pytest.mark.parametrize(
    ("policy", "steps", "finished", "evictions"),
    [
        ("aggressive 99 %", 66_560, None, 216.30),
        ("aggressive 95 %", 68_790, None, 60.83),
        ("conservative 100 %", 164_180, 1955, 0.0),
        ("oracle", 71_190, None, 0.0),
    ],
)
def test_what_is_deterministic_is_exact(
    policy: str, steps: int, finished: int | None, evictions: float
) -> None:
    tally = run(policy)
    assert tally.steps == steps
    assert finished in (None, tally.finished)
    assert round(tally.evictions_percent, 2) == evictions
    assert verdict(FILE_SET, policy, tally.steps, 0.0, tally.evictions_percent) == "exact"


def test_past_future_is_near_the_source() -> None:
    """One seed; the table has five and holds them to 1 % and 2.5 points."""
    tally = run("past-future 3 %", seed=1)
    assert tally.steps == pytest.approx(0.988 * 71_190, rel=0.015)
    assert tally.evictions_percent == pytest.approx(37.5, abs=5)
    assert 100 * tally.memory_mean == pytest.approx(95.2, abs=0.5)
    assert 100 * tally.future_mean == pytest.approx(101.0, abs=0.5)


def test_a_seed_repeats_itself() -> None:
    first, again, other = (simulate(O1[:200], "past-future", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def plainly(source: Sequence[Lengths], watermark: float, capacity: int) -> tuple[int, int, int]:
    """The aggressive policy in the note's words, one step at a time: steps, finished, evictions."""
    waiting, running = [], []
    rows = [[prompt, output, 0] for prompt, output in source]
    steps = finished = evictions = 0
    while True:
        for _ in range(10):
            steps += 1
            for row in running:
                row[2] += 1
            finished += sum(row[2] >= row[1] for row in running)
            running = [row for row in running if row[2] < row[1]]
            while sum(row[0] + row[2] for row in running) > capacity:
                waiting.insert(0, running.pop())
                evictions += 1
        prefill = 0
        while prefill < 32_768:
            if not waiting:
                if not rows:
                    return steps, finished, evictions
                waiting.append(rows.pop(0))
            if sum(r[0] + r[2] for r in running) + waiting[0][0] > watermark * capacity:
                break
            prefill += waiting[0][0]
            running.append(waiting.pop(0))


@pytest.mark.parametrize("capacity", [12_000, 20_000])
@pytest.mark.parametrize("watermark", [0.8, 0.99])
def test_jumps_change_nothing(capacity: int, watermark: float) -> None:
    source = O1[:150]
    constants = replace(QUIRKS, aggressive_watermark=watermark)
    tally = simulate(source, "aggressive", constants, capacity_tokens=capacity)
    expected = plainly(source, watermark, capacity)
    assert (tally.steps, tally.finished, tally.evictions) == expected
    assert expected[2] > 0


def test_memory_and_future_are_means_of_what_is_held() -> None:
    """Two requests of 100 + 20 and 50 + 5 tokens: ten empty steps, then both join and a third is
    refused; after five steps the short one ends; after ten the third joins and the run stops."""
    source = [(100, 20), (50, 5), (160, 30)]
    constants = replace(QUIRKS, aggressive_watermark=1.0)
    tally = simulate(source, "aggressive", constants, capacity_tokens=300)
    first = [0] * 10 + [150]
    second = [150 + 2 * n for n in range(1, 5)] + [100 + n for n in range(5, 11)]
    assert tally.steps == 20
    assert tally.finished == 1
    assert tally.memory_mean == pytest.approx(sum([*first, *second]) / 21 / 300)
    assert tally.future_mean == pytest.approx(peak([100, 50], [20, 5]) / 300)


def test_every_cell_of_the_table_has_runs_and_a_figure_of_the_source() -> None:
    runs = {(task.lengths, task.policy) for task in tasks(seeds=2)}
    assert runs == {(lengths, policy) for lengths in SETS for policy in POLICIES}
    assert set(SOURCE_STEPS) <= runs
    # What has no chance in it runs once; what is blurred over five seeds has twenty.
    assert len(tasks(seeds=5)) == 5 * len(runs) - 4 * 7 + 15 * len(BLURRED)
    assert runs >= BLURRED


def test_a_run_beyond_the_tolerance_is_said_to_differ() -> None:
    assert verdict("Dist-1", "past-future 3 %", 0, 1.015 * 1.009, 8.1 + 2.4) == "agrees"
    assert verdict("Dist-1", "past-future 3 %", 0, 1.015 * 1.011, 8.1) == "differs"
    assert verdict("Dist-1", "past-future 3 %", 0, 1.015, 8.1 - 2.6) == "differs"
    assert verdict("Dist-1", "oracle", 296_006 * 1.011, 1.0, 0) == "differs"
    assert verdict(FILE_SET, "oracle", 71_180, 1.0, 0) == "differs"
    assert verdict(FILE_SET, "conservative 150 %", 1, 9.0, 0) == "reported only"


def test_more_seeds_do_not_hide_what_the_first_ones_said() -> None:
    oracle = [Tally(71_190, 1935, 0, 0.949, 0.995)]
    near, far = Tally(73_900, 1000, 107, 0.9, 0.95), Tally(75_500, 1000, 107, 0.9, 0.95)
    row = cell(FILE_SET, "past-future 10 %", [far] * 5 + [near] * 15, oracle)
    assert (row.first.verdict, row.verdict) == ("differs", "agrees")
    assert row.first.steps_ratio == pytest.approx(75_500 / 71_190)
    assert row.seeds == 20
    said = next(iter(as_table([row]).columns[-1].cells))
    assert said == "agrees (differs over 5 seeds: x 1.061, 10.70 %)"


def test_the_table_shows_ours_beside_the_source_s() -> None:
    ours = Tally(71_190, 1935, 0, 0.949, 0.995)
    row = cell(FILE_SET, "oracle", [ours], [ours])
    assert (row.steps_ratio, row.seeds, row.verdict) == (1.0, 1, "exact")
    shown = as_table([row])
    assert [next(iter(column.cells)) for column in shown.columns] == [
        "ShareGPT-o1",
        "oracle",
        "1",
        "71,190 / 71,190",
        "1.000 / 1.000",
        "94.9 / 94.9",
        "99.5 / 99.5",
        "0.00 / 0",
        "exact",
    ]
