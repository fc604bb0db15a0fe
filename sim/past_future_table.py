"""The Past-Future table: four length sets, thirteen policies, ours beside the source's.

`python -m sim.past_future_table` runs and prints it: some minutes of CPU.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from sim.memory_only import Progress as Told, Tally, simulate
from sim.parallel import run_all
from sim.past_future_source import (
    FILE_SET,
    POLICIES,
    REPORTED_ONLY,
    SETS,
    SOURCE_STEPS,
    is_certain,
    requests_of,
)

SEEDS = 5
"""Of every run with chance in it, as in the source."""
SEEDS_MAX = 20
"""Of those whose mean over the first seeds is not sharp enough to be held to the tolerances: its
standard error is above a quarter of one. A run is never repeated for what it said."""
STEPS_TOLERANCE = 0.01
"""Of the steps, as a share."""
EVICTIONS_TOLERANCE = 2.5
"""Percentage points."""

Verdict = Literal["exact", "agrees", "differs", "reported only"]


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    lengths: str
    policy: str
    seed: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy on one set: means over the seeds, beside the source's."""

    lengths: str
    policy: str
    seeds: int
    steps: float
    finished: float
    steps_ratio: float
    """Steps over those of the oracle for the same requests."""
    ratio_error: float
    """Standard error of that."""
    memory_percent: float
    future_percent: float
    evictions_percent: float
    evictions_error: float
    """Standard error of that."""
    source: tuple[float, float, float, float]
    """Steps over the oracle's, memory %, future-required %, evictions %."""
    source_steps: int | None
    """Where the source says it to the step."""
    verdict: Verdict


def tasks(seeds: int = SEEDS) -> list[Task]:
    """All runs; of what has no chance in it, one. The longest come first."""
    runs = [
        Task(lengths, name, seed)
        for lengths in ("Dist-2", "Dist-1", "Dist-3", FILE_SET)
        for name in POLICIES
        for seed in range(seeds)
    ]
    return [run for run in runs if run.seed == 0 or not is_certain(run.lengths, run.policy)]


def run_task(task: Task, progress: Told) -> Tally:
    """One run."""
    policy = POLICIES[task.policy]
    source = requests_of(task.lengths, task.seed)
    return simulate(source, policy.gate, policy.constants, seed=task.seed, progress=progress)


Found = dict[tuple[str, str], list[Tally]]


def table(
    seeds: int = SEEDS,
    *,
    seeds_max: int = SEEDS_MAX,
    processes: int = 0,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cell]:
    """Run everything, in parallel, and put it beside the source's; set by set. `watch` hears how
    many runs have ended, and of how many."""
    found: Found = {}
    runs = tasks(seeds)
    _run(runs, found, processes, lambda done: watch(done, len(runs)))
    blurred = [cell for cell in _cells(found) if _is_blurred(cell)]
    more = [
        Task(cell.lengths, cell.policy, seed)
        for cell in blurred
        for seed in range(seeds, seeds_max)
    ]
    total = len(runs) + len(more)
    _run(more, found, processes, lambda done: watch(len(runs) + done, total))
    return _cells(found)


def _run(runs: Sequence[Task], found: Found, processes: int, ended: Callable[[int], None]) -> None:
    """Run all; `ended` hears how many have ended."""
    over: set[int] = set()

    def watch(number: int, done: int, total: int) -> None:
        if done == total:
            over.add(number)
            ended(len(over))

    tallies = run_all(run_task, runs, processes=processes, watch=watch) if runs else []
    for task, tally in zip(runs, tallies, strict=True):
        found.setdefault((task.lengths, task.policy), []).append(tally)


def _cells(found: Found) -> list[Cell]:
    return [
        cell(lengths, name, found[lengths, name], found[lengths, "oracle"])
        for lengths in SETS
        for name in POLICIES
    ]


def _is_blurred(cell: Cell) -> bool:
    """Chance could carry its mean out of the tolerances."""
    blurred = cell.ratio_error > STEPS_TOLERANCE / 4
    blurred = blurred or cell.evictions_error > EVICTIONS_TOLERANCE / 4
    return blurred and cell.policy not in REPORTED_ONLY


def cell(lengths: str, policy: str, tallies: Sequence[Tally], oracle: Sequence[Tally]) -> Cell:
    """The means of one policy on one set, and how they compare with the source. `oracle`: seed by
    seed the same requests, or one run if those of all seeds are the same."""
    steps = fmean(tally.steps for tally in tallies)
    beside = list(oracle) * (len(tallies) if len(oracle) == 1 else 1)
    ratios = [ours.steps / best.steps for ours, best in zip(tallies, beside, strict=False)]
    evictions = [tally.evictions_percent for tally in tallies]
    return Cell(
        lengths=lengths,
        policy=policy,
        seeds=len(tallies),
        steps=steps,
        finished=fmean(tally.finished for tally in tallies),
        steps_ratio=fmean(ratios),
        ratio_error=_error(ratios),
        memory_percent=100 * fmean(tally.memory_mean for tally in tallies),
        future_percent=100 * fmean(tally.future_mean for tally in tallies),
        evictions_percent=fmean(evictions),
        evictions_error=_error(evictions),
        source=POLICIES[policy].source[lengths],
        source_steps=SOURCE_STEPS.get((lengths, policy)),
        verdict=verdict(lengths, policy, steps, fmean(ratios), fmean(evictions)),
    )


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 of one value, which is certain here."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def verdict(
    lengths: str, policy: str, steps: float, steps_ratio: float, evictions_percent: float
) -> Verdict:
    """What is deterministic, and known to the step, has to be exact; other steps count relative to
    the oracle's, whose own count absolutely."""
    if policy in REPORTED_ONLY:
        return "reported only"
    ratio, _, _, evictions = POLICIES[policy].source[lengths]
    known = SOURCE_STEPS.get((lengths, policy))
    if known is not None and is_certain(lengths, policy):
        exact = steps == known and round(evictions_percent, 2) == evictions
        return "exact" if exact else "differs"
    close = abs(steps_ratio / ratio - 1) <= STEPS_TOLERANCE
    if known is not None:
        close = abs(steps / known - 1) <= STEPS_TOLERANCE
    return (
        "agrees"
        if close and abs(evictions_percent - evictions) <= EVICTIONS_TOLERANCE
        else "differs"
    )


# ---------------------------------------------------------------------------------------- printing


def as_table(cells: Sequence[Cell]) -> Table:
    """Ours / the source's, for people."""
    shown = Table(title="Past-Future, memory only: ours / the source's")
    shown.add_column("lengths")
    shown.add_column("policy")
    for heading in ("seeds", "steps", "x oracle", "memory %", "future %", "evicted %"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict")
    for cell in cells:
        ratio, memory, future, evictions = cell.source
        known = f" / {cell.source_steps:,}" if cell.source_steps else ""
        shown.add_row(
            cell.lengths,
            cell.policy,
            str(cell.seeds),
            f"{cell.steps:,.0f}{known}",
            f"{cell.steps_ratio:.3f} / {ratio:.3f}",
            f"{cell.memory_percent:.1f} / {memory:.1f}",
            f"{cell.future_percent:.1f} / {future:.1f}",
            f"{cell.evictions_percent:.2f} / {evictions:g}",
            cell.verdict,
        )
    return shown


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(prog="python -m sim.past_future_table", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=0, help="0: as many as cores")
    options = parser.parse_args()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs")
        cells = table(
            options.seeds,
            seeds_max=max(options.seeds, SEEDS_MAX),
            processes=options.processes,
            watch=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    Console(width=140).print(as_table(cells))


if __name__ == "__main__":
    main()
