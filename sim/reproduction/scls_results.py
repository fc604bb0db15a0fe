"""SCLS: the results of the part, as its tables, checks and pictures ask for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from sim.reproduction.scls_fit import FitFigures
from sim.reproduction.scls_runs import Figures

Value = Callable[[Figures], float]


@dataclass(frozen=True, slots=True)
class Results:
    """All runs, and the fits."""

    runs: Sequence[Figures]
    fits: Sequence[FitFigures]

    def of(self, study: str, policy: str = "", x: float | None = None) -> list[Figures]:
        """The runs of a study, of one policy and one place if asked for."""
        return [
            run
            for run in self.runs
            if run.task.study == study
            and policy in ("", run.task.policy)
            and x in (None, run.task.x)
        ]

    def seeds(self, policy: str, value: Value) -> list[float]:
        """Of the ablation's runs, seed by seed."""
        return [value(run) for run in self.of("ladder", policy)]

    def mean(self, policy: str, value: Value) -> float:
        """Over the seeds of the ablation."""
        return fmean(self.seeds(policy, value))

    def means(self, study: str, policy: str, x: float, value: Value) -> float:
        """Over the seeds of another study."""
        return fmean(value(run) for run in self.of(study, policy, x))

    def at_rate(self, study: str, policy: str, x: float, rate: float) -> Figures:
        """The one run of a study at a rate."""
        (run,) = [r for r in self.of(study, policy, x) if r.task.rate == rate]
        return run

    def series(self, study: str, policy: str, rate: float | None = None) -> list[Figures]:
        """A sweep, by its place."""
        runs = [r for r in self.of(study, policy) if rate in (None, r.task.rate)]
        return sorted(runs, key=lambda run: run.task.x)


def rps(run: Figures) -> float:
    """Throughput: completed / (last completion - first arrival)."""
    return run.rps


def end_std(run: Figures) -> float:
    """Standard deviation of the workers' last completions, in seconds."""
    return run.end_std_s


def rises(values: Sequence[float], slack: float = 0.0) -> bool:
    """Each at least the one before, less a share of it."""
    return all(b >= a * (1 - slack) for a, b in pairwise(values))


def peaked(values: Sequence[float], slack: float = 0.0) -> bool:
    """Up to one highest value, then down; the highest is not at an end."""
    top = values.index(max(values))
    return (
        0 < top < len(values) - 1
        and rises(values[: top + 1], slack)
        and rises(values[top:][::-1], slack)
    )
