"""Plain counts per second over several runs, their standard errors, and ratios of two of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, log, sqrt
from statistics import fmean, stdev

from sim.reproduction.goodput_runs import PAST_FUTURE, Result


@dataclass(frozen=True, slots=True)
class Estimate:
    """Passing requests per second."""

    rps: float
    error: float
    """Standard error, from the parts of all runs taken as independent."""
    by_seed: tuple[float, ...]
    late: int
    """Ended outside the SLA."""

    @property
    def relative(self) -> float:
        """The standard error over the rate; 0 where nothing passed."""
        return self.error / self.rps if self.rps else 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """Past-Future beside the baseline that had most here."""

    lengths: str
    clients: int
    ours: Estimate
    best: str
    theirs: Estimate

    @property
    def ratio(self) -> float:
        return self.ours.rps / self.theirs.rps

    @property
    def error(self) -> float:
        """Of the ratio: two independent errors, to first order."""
        return self.ratio * hypot(self.ours.relative, self.theirs.relative)

    @property
    def error_by_seeds(self) -> float | None:
        """Of the ratio's logarithm, from two seeds alone: half their difference."""
        ratios = [a / b for a, b in zip(self.ours.by_seed, self.theirs.by_seed, strict=True)]
        return abs(log(ratios[0] / ratios[1])) / 2 if len(ratios) == 2 else None

    @property
    def where(self) -> str:
        return f"{self.lengths}, N = {self.clients}"


class Estimates:
    """By length set, clients and policy."""

    def __init__(self, results: Sequence[Result]) -> None:
        found: dict[tuple[str, int, str], list[Result]] = {}
        for r in results:
            found.setdefault((r.task.lengths, r.task.clients, r.task.policy), []).append(r)
        self._cells = {key: estimate(runs) for key, runs in found.items()}
        self.sets = tuple(dict.fromkeys(r.task.lengths for r in results))
        self.clients = tuple(sorted({r.task.clients for r in results}))
        self.policies = tuple(dict.fromkeys(r.task.policy for r in results))
        self.points = tuple(self._point(s, n) for s in self.sets for n in self.clients)

    def at(self, lengths: str, clients: int, policy: str) -> Estimate:
        return self._cells[lengths, clients, policy]

    def _point(self, lengths: str, clients: int) -> Point:
        others = [policy for policy in self.policies if policy != PAST_FUTURE]
        best = max(others, key=lambda policy: self.at(lengths, clients, policy).rps)
        ours = self.at(lengths, clients, PAST_FUTURE)
        return Point(lengths, clients, ours, best, self.at(lengths, clients, best))


def estimate(runs: Sequence[Result]) -> Estimate:
    """Of one policy at one point."""
    parts = [rate for run in runs for rate in run.parts_rps]
    return Estimate(
        rps=sum(run.good for run in runs) / sum(run.duration_s for run in runs),
        error=stdev(parts) / sqrt(len(parts)),
        by_seed=tuple(run.counted_rps for run in runs),
        late=sum(run.late for run in runs),
    )


def error_by_seeds(points: Sequence[Point]) -> float | None:
    """Of a ratio, relative, from what two seeds differ by: the root mean square over the points,
    but for those where both policies did exactly the same."""
    errors = [e for point in points if (e := point.error_by_seeds)]
    return sqrt(fmean(e * e for e in errors)) if errors else None


def mean_ratio(points: Sequence[Point]) -> tuple[float, float]:
    """The mean of the ratios and its standard error, if the points are independent."""
    return fmean(p.ratio for p in points), hypot(*(p.error for p in points)) / len(points)
