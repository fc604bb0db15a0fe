"""Runs: what a command ran, put in order: policies x loads x seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sim.report import Record, Report
from sim.series import Series

LoadKind = Literal["recorded", "rate", "rate-scale", "clients"]


@dataclass(frozen=True, slots=True)
class Load:
    """How the requests come: as recorded, at a rate, sped up, or from clients in a closed loop."""

    kind: LoadKind = "recorded"
    value: float = 1.0
    offered_rps: float | None = None
    """What the workload then offers on average, requests a second; None in a closed loop."""

    @property
    def label(self) -> str:
        """For headings and tables."""
        offered = "" if self.offered_rps is None else f" ({self.offered_rps:.3g} requests/s)"
        match self.kind:
            case "rate":
                return f"{self.value:g} requests/s"
            case "rate-scale":
                return f"{self.value:g} x recorded speed{offered}"
            case "clients":
                return f"{self.value:g} client{'s' if self.value != 1 else ''}"
            case "recorded":
                return f"recorded arrivals{offered}"

    @property
    def position(self) -> float:
        """Where it stands on the axis of a picture: requests/s, or clients."""
        if self.kind in ("rate", "clients") or self.offered_rps is None:
            return self.value
        return self.offered_rps


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run. `series` is None where nobody looked inside, as in `tranche bench`."""

    report: Report
    records: Sequence[Record] = ()
    load: Load = field(default_factory=Load)
    seed: int = 0
    series: Series | None = None

    @property
    def policy(self) -> str:
        """Its name in the report."""
        return self.report.policy


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one policy at one load: one for each seed."""

    policy: str
    load: Load
    runs: tuple[Run, ...]

    @property
    def reports(self) -> list[Report]:
        """One for each seed."""
        return [run.report for run in self.runs]


def groups_of(runs: Iterable[Run]) -> list[Group]:
    """Runs by policy and load, both in the order in which they first came."""
    found: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.policy, run.load.kind, run.load.value), []).append(run)
    return [Group(runs[0].policy, runs[0].load, tuple(runs)) for runs in found.values()]


def loads_of(groups: Iterable[Group]) -> list[Load]:
    """The different loads, from light to heavy."""
    found = {(group.load.kind, group.load.value): group.load for group in groups}
    return sorted(found.values(), key=lambda load: load.position)


def offered_at(load: Load, groups: Iterable[Group]) -> float | None:
    """What the workloads of this load offer, requests a second: the mean over the seeds; None in
    a closed loop."""
    seeds = {
        run.seed: run.load.offered_rps
        for group in groups
        for run in group.runs
        if (run.load.kind, run.load.value) == (load.kind, load.value)
    }
    known = [rate for rate in seeds.values() if rate is not None]
    return sum(known) / len(known) if known else None


def policies_of(groups: Iterable[Group]) -> list[str]:
    """The different policies, in the order in which they came."""
    return list(dict.fromkeys(group.policy for group in groups))
