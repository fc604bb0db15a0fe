"""Goodput by plain counts: the grid of the part before, in longer runs, with its noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sim.reproduction import goodput, goodput_runs
from sim.reproduction.goodput_counts_claims import claims
from sim.reproduction.goodput_counts_text import TEXT, rates_table, ratios_table
from sim.reproduction.goodput_estimates import Estimates
from sim.reproduction.goodput_runs import PAST_FUTURE, SETS, Result, Task
from sim.reproduction.section import Section

NAME = "goodput_counts"
TITLE = "Past-Future: goodput by plain counts"
SEEDS = (1, 2)
LONGER = 2
"""A run counts so many times the requests of the grid's; with two seeds four times as many."""
POLICIES = (
    PAST_FUTURE,
    "aggressive 99 %",
    "aggressive 95 %",
    "aggressive 90 %",
    "conservative 125 %",
    "conservative 150 %",
)
"""Past-Future and every baseline that is ahead of the others anywhere in the grid."""


def tasks(*, quick: bool) -> Sequence[Task]:
    """One seed after the other, so that a part of them is a whole grid."""
    sets = ("Dist-3",) if quick else tuple(SETS)
    clients = (10, 40) if quick else goodput.CLIENTS[::-1]
    policies = POLICIES[:2] if quick else POLICIES
    longer = 1 if quick else LONGER
    return [
        _longer(
            goodput.task_of(name, number, policy, *goodput.POLICIES[policy], NAME), longer, seed
        )
        for seed in SEEDS
        for number in clients
        for name in sets
        for policy in policies
    ]


def _longer(task: Task, longer: int, seed: int) -> Task:
    return replace(task, counted=longer * task.counted, seed=seed)


def run(task: Task, progress: Callable[[int, int], None]) -> Result:
    """One of them."""
    return goodput_runs.run(task, progress)


def section(results: Sequence[Result]) -> Section:
    """Both statements, every rate, every ratio."""
    estimates = Estimates(results)
    return Section(
        name=NAME,
        title=TITLE,
        text=TEXT,
        tables=(
            ratios_table(estimates),
            *(rates_table(estimates, lengths) for lengths in estimates.sets),
        ),
        checks=claims(estimates),
    )
