"""The sets of memory-only runs, and that `chance` keeps its target on one of them."""

from dataclasses import replace

import pytest

from sim.memory_sets import MEMORY_SETS, memory_set
from sim.remembered import (
    CREDITS,
    OURS,
    RESERVES,
    VARIANTS,
    Remembered,
    measure,
    missed,
    oracle,
    summary,
    table,
)


@pytest.mark.parametrize("name", MEMORY_SETS)
def test_a_seed_is_a_set(name: str) -> None:
    one, again, other = (memory_set(name, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.requests) == (1981 if name == "ShareGPT-o1" else 3000)
    assert all(prompt >= 0 and output > 0 for prompt, output in one.requests)
    assert max(map(sum, one.requests)) <= one.capacity_tokens


def test_predictions_belong_to_their_requests() -> None:
    chat = memory_set("ShareGPT", 0).first(500)
    assert chat.predicted is not None
    assert len(chat.predicted) == len(chat.requests) == 500
    off = [
        abs(told - output) for told, (_, output) in zip(chat.predicted, chat.requests, strict=True)
    ]
    assert sorted(off)[250] < 20
    assert memory_set("Dist-1", 0).predicted is None


def test_one_run_of_each_kind() -> None:
    steps = oracle("ShareGPT", 0, 300)
    runs = [measure("ShareGPT", 0, variant, 300, steps) for variant in VARIANTS]
    assert all(0.9 < run.steps_over_oracle < 1.5 for run in runs)
    assert all(0 <= run.evictions_percent < 20 for run in runs)
    assert table(runs).row_count == len(VARIANTS)
    assert summary(runs, "ShareGPT")["seeds"] == 1
    assert not summary(runs[:-1], "ShareGPT")


def _runs(**changes: float) -> list[Remembered]:
    """Of a policy that holds all limits, but for `changes`."""
    usual = {"ours": 1.02, "credits": 1.025, "evicted": 3.0, "stall": 100.0, **changes}
    rows = {
        OURS: (usual["ours"], usual["evicted"], usual["stall"]),
        CREDITS: (usual["credits"], 3.0, 0.0),
        **dict.fromkeys(RESERVES, (1.02, 8.0, 1000.0)),
    }
    return [Remembered("Dist-1", 0, variant, *row) for variant, row in rows.items()]


@pytest.mark.parametrize(
    ("changes", "figure"),
    [
        ({}, ""),
        ({"ours": 1.04, "credits": 1.04}, "steps"),
        ({"evicted": 2.3}, "evicted"),
        ({"evicted": 3.4}, "evicted"),
        ({"credits": 1.035}, "price of credits"),
        ({"stall": 400.0}, "stall ratio"),
    ],
)
def test_what_a_limit_misses_is_said(changes: dict[str, float], figure: str) -> None:
    assert [words.split(":")[1].split()[0] for words in missed(_runs(**changes))] == (
        [figure.split()[0]] if figure else []
    )


def test_evictions_at_equal_steps_are_interpolated() -> None:
    """Between 1 % more and 3 % more steps Past-Future's evictions fall from 16 to 4 per cent: at
    2 % they are 8."""
    told = {variant: run for run, variant in zip(_runs(), VARIANTS, strict=True)}
    ends = [(1.01, 16.0), (1.03, 4.0), (1.05, 1.0), (1.07, 0.5)]
    for variant, (steps, evicted) in zip(RESERVES, ends, strict=True):
        told[variant] = replace(told[variant], steps_over_oracle=steps, evictions_percent=evicted)
    ratio = summary(list(told.values()), "Dist-1")["evictions at equal steps"]
    assert ratio == pytest.approx(3 / 8)
