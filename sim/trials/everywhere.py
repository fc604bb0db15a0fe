"""Everywhere: every preset on every open trace and length set, from half load to overload.

`tranche` is asked to be best, or within 3 % of the best, in each figure of each cell. Where
differences are below what anybody can feel (`FLOORS`) they do not count.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rich.table import Table

from services.scheduler.core.presets import PRESETS
from sim.trials.cell import Cell, Figures
from sim.trials.kept import Kept

OURS = "tranche"
LOADS = (0.92, 1.05, 0.8, 0.5)
"""In the order in which they are run: the telling ones first."""
WORKLOADS = (
    "azure-conv",
    "sharegpt",
    "dec",
    "azure-code",
    "sharegpt-o1",
    "dist-1",
    "dist-2",
    "dist-3",
)
FIRST = ("tranche", "past-future", "vllm", "aggressive", "sal+larry", "sarathi")
WITHIN = 0.03
LARGER_IS_BETTER = ("output_tps", "good_share")
FIGURES: Mapping[str, str] = {
    "output_tps": "throughput",
    "good_share": "goodput",
    "ttft_mean_s": "mean TTFT",
    "ttft_p99_s": "p99 TTFT",
    "e2e_mean_s": "mean e2e",
    "gap_p99_s": "p99 stall",
}
FLOORS: Mapping[str, float] = {
    "output_tps": 0.0,
    "good_share": 0.002,
    "ttft_mean_s": 0.005,
    "ttft_p99_s": 0.05,
    "e2e_mean_s": 0.05,
    "gap_p99_s": 0.02,
}
"""Differences below these do not count, whatever they are in per cent: two requests of a thousand,
some milliseconds of a mean, about one iteration of a tail."""


def policies() -> list[str]:
    """All but the oracle, which is told the truth; closed batches last."""
    rest = [p.name for p in PRESETS.values() if p.name not in FIRST and not p.needs_truth]
    return [*FIRST, *sorted(rest, key=lambda name: PRESETS[name].form == "closed")]


def cells(seeds: int, requests: int, names: Sequence[str]) -> Iterator[Cell]:
    """Seed by seed, the strongest presets first."""
    for seed in range(1, seeds + 1):
        for chunk in (names[: len(FIRST)], names[len(FIRST) :]):
            for load in LOADS:
                for workload in WORKLOADS:
                    for policy in chunk:
                        yield cell_of(workload, load, policy, requests, seed)


def cell_of(workload: str, load: float, policy: str, requests: int, seed: int) -> Cell:
    """One of them."""
    return Cell(workload=workload, load=load, policy=policy, requests=requests, seed=seed)


@dataclass(frozen=True, slots=True)
class Place:
    """A workload at a load: what each preset did, as means over the seeds that all have run."""

    workload: str
    load: float
    seeds: int
    means: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Policy to figure to value."""

    def best(self, figure: str) -> tuple[str, float]:
        """Of those that completed as much as `tranche`: who refuses or fails has it easier."""
        least = self.means[OURS]["completed"] - 1e-9
        fair = {n: m[figure] for n, m in self.means.items() if m["completed"] >= least}
        choose = max if figure in LARGER_IS_BETTER else min
        name = choose(fair, key=lambda policy: fair[policy])
        return name, fair[name]

    def behind(self, figure: str) -> float:
        """By how much `tranche` is worse than the best, as a share of the best; 0: within what
        counts."""
        _, best = self.best(figure)
        ours = self.means[OURS][figure]
        worse = best - ours if figure in LARGER_IS_BETTER else ours - best
        if worse <= FLOORS[figure]:
            return 0.0
        return worse / max(best, 1e-9)


def places(kept: Kept, seeds: int, requests: int, names: Sequence[str]) -> list[Place]:
    """Those where `tranche` and somebody else have run on the same seeds."""
    found = []
    for workload in WORKLOADS:
        for load in sorted(LOADS):
            runs: dict[str, list[Figures | None]] = {
                name: [
                    kept.of(cell_of(workload, load, name, requests, seed))
                    for seed in range(1, seeds + 1)
                ]
                for name in names
            }
            done = [s for s in range(seeds) if runs[OURS][s] is not None]
            means = {
                name: means_of([run for s in done if (run := each[s]) is not None])
                for name, each in runs.items()
                if done and all(each[s] is not None for s in done)
            }
            if len(means) > 1:
                found.append(Place(workload, load, len(done), means))
    return found


def means_of(runs: Sequence[Figures]) -> dict[str, float]:
    """Of each figure, over the seeds."""
    names = ("completed", "evictions", *FIGURES)
    return {name: fmean(getattr(run, name) for run in runs) for name in names}


def table(found: Sequence[Place]) -> Table:
    """A row a place; `=` best or within what counts, else by how much `tranche` is behind whom."""
    shown = Table(title=f"{OURS} against the best of the others, within {WITHIN:.0%}: =")
    for name in ("workload", "load", "presets", "seeds", *FIGURES.values()):
        shown.add_column(name)
    for place in found:
        told = [told_of(place, figure) for figure in FIGURES]
        others = str(len(place.means) - 1)
        shown.add_row(place.workload, f"{place.load:g}", others, str(place.seeds), *told)
    return shown


def told_of(place: Place, figure: str) -> str:
    """A cell of the table."""
    name, best = place.best(figure)
    behind = place.behind(figure)
    ours = place.means[OURS][figure]
    if behind <= WITHIN:
        return f"= {ours:.3g}"
    return f"{ours:.3g}; {name} {best:.3g}"


def losses(found: Sequence[Place]) -> list[tuple[Place, str, float]]:
    """Where it is more than that behind, the worst first."""
    behind = [(place, figure, place.behind(figure)) for place in found for figure in FIGURES]
    return sorted((b for b in behind if b[2] > WITHIN), key=lambda one: -one[2])


TRADES: Mapping[str, str] = {
    "tokens": "it makes fewer tokens a second",
    "stalls": "it lets memory run out more often, and running requests stand still longer",
    "tail": "it lets some wait longer for their first token: its p99 TTFT is worse",
    "waits": "it lets everybody wait for surer memory: its mean TTFT is worse",
    "nothing": "it pays with no other figure",
}
"""What a preset that is ahead in one figure gives up for it in another, by name."""
WORSE = 1.1
"""From so many times on."""


def trade(place: Place, figure: str) -> str:
    """A name of TRADES: why the best one in this figure is not simply better."""
    name, _ = place.best(figure)
    theirs, ours = place.means[name], place.means[OURS]
    if WORSE * theirs["output_tps"] < ours["output_tps"]:
        return "tokens"
    if theirs["gap_p99_s"] > WORSE * ours["gap_p99_s"]:
        return "stalls"
    if theirs["ttft_p99_s"] > WORSE * ours["ttft_p99_s"]:
        return "tail"
    if theirs["ttft_mean_s"] > WORSE * ours["ttft_mean_s"]:
        return "waits"
    return "nothing"


def explained(found: Sequence[Place]) -> list[str]:
    """The losses by what the best one gives up, as lines of a list."""
    by_trade: dict[tuple[str, str], list[tuple[Place, str, float]]] = {}
    for place, figure, behind in losses(found):
        key = (trade(place, figure), place.best(figure)[0])
        by_trade.setdefault(key, []).append((place, figure, behind))
    order = list(TRADES)
    lines = []
    for (what, name), lost in sorted(by_trade.items(), key=lambda one: order.index(one[0][0])):
        clause = TRADES[what] if what == "nothing" else f"{TRADES[what]} (by a tenth or more)"
        lines.append(f"- `{name}`: {clause}: {', '.join(_listed(lost, len(found)))}.")
    return lines


MANY = 8
"""Losses of one figure to one preset; more are told together."""


def _listed(lost: Sequence[tuple[Place, str, float]], places: int) -> list[str]:
    """Each loss, sorted; many of one figure as their number and range."""
    told = []
    for figure, name in FIGURES.items():
        of = [(place, behind) for place, one, behind in lost if one == figure]
        if len(of) > MANY:
            low, high = min(b for _, b in of), max(b for _, b in of)
            told.append(f"{name} in {len(of)} of {places} places ({low:.0%} to {high:.0%})")
        else:
            told += [f"{p.workload} {p.load:g} {name} ({b:.0%})" for p, b in of]
    return sorted(told)


def as_json(found: Sequence[Place]) -> dict[str, object]:
    """What is kept in bench/results."""
    return {
        "cells": len(found) * len(FIGURES),
        "behind": len(losses(found)),
        "why": ["Where it is behind, who is ahead, and by how much:", "", *explained(found)],
        "places": [
            {
                "workload": place.workload,
                "load": place.load,
                "seeds": place.seeds,
                "presets": len(place.means),
                **{
                    figure: {
                        "tranche": place.means[OURS][figure],
                        "best": place.best(figure)[1],
                        "of": place.best(figure)[0],
                        "behind": place.behind(figure),
                    }
                    for figure in FIGURES
                },
            }
            for place in found
        ],
    }
