"""`python -m sim.foretold`: what predictions of outputs are worth, by how true they are.

Memory only (memory_chance.py), so that nothing else plays a part. Past-Future with a reserve of 3 %
gives the steps; `chance` is run with several fixed margins, with and without predictions, and its
evictions at as many steps are interpolated (their logarithm, over steps). A prediction is the true
output and noise of the size that makes the wanted correlation, so the scheduler is told what a
predictor of that quality would say, and nothing more.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import exp, log, sqrt
from pathlib import Path
from statistics import correlation, fmean, pstdev
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sim.memory_chance import CHANCE, Rules, simulate_chance
from sim.memory_only import QUIRKS, Lengths, simulate
from sim.past_future_source import requests_of

MARGINS = (0.0, 0.5, 0.75, 1.0, 1.5)
"""Deviations; between them lies all that Past-Future's steps ask for."""
RESERVE = 0.03
LIMIT = 0.35
"""Evictions over Past-Future's at equal steps, with predictions of correlation 0.95."""
LENGTHS = ("Dist-1", "ShareGPT-o1")


@dataclass(frozen=True, slots=True)
class Point:
    """One run: how long it took and how many it evicted."""

    steps: int
    evictions: float
    """Per finished request."""


@dataclass(frozen=True, slots=True)
class Found:
    """One set and one seed."""

    lengths: str
    seed: int
    correlation: float
    """Of the predictions, as they came out; 0: without predictions."""
    steps: int
    """Past-Future's."""
    past_future: float
    """Its evictions per finished request."""
    evictions: float
    """Of `chance` at as many steps."""
    bound: str = ""
    """`at most` or `at least`, where the margins do not reach as far."""

    @property
    def ratio(self) -> float:
        return self.evictions / self.past_future


def foretold(source: Sequence[Lengths], wanted: float, seed: int) -> list[int]:
    """Predictions of this correlation with the outputs: true output and normal noise."""
    rng = np.random.default_rng((seed, round(1000 * wanted)))
    outputs = [output for _, output in source]
    noise = pstdev(outputs) * sqrt(1 / wanted**2 - 1)
    told = rng.normal(0.0, noise, len(outputs)) + outputs
    return [int(value) for value in np.maximum(1, np.rint(told))]


def at_steps(points: Sequence[Point], steps: int) -> tuple[float, str]:
    """Evictions at so many steps, and whether that is only a bound. `points` in order of margin:
    more steps, fewer evictions."""
    ordered = sorted(points, key=lambda point: point.steps)
    if steps <= ordered[0].steps:
        return ordered[0].evictions, "at least" if steps < ordered[0].steps else ""
    for before, after in pairwise(ordered):
        if steps <= after.steps:
            share = (steps - before.steps) / (after.steps - before.steps)
            low, high = log(before.evictions), log(after.evictions)
            return exp(low + share * (high - low)), ""
    return ordered[-1].evictions, "at most"


def measure(lengths: str, seed: int, wanted: float, requests: int) -> Found:
    """One comparison; `wanted` 0: `chance` without predictions."""
    source = requests_of(lengths, seed)[:requests]
    base = simulate(source, "past-future", replace(QUIRKS, future_reserve=RESERVE), seed=seed)
    told = foretold(source, wanted, seed) if wanted else None
    points = []
    for z in MARGINS:
        run = simulate_chance(source, Rules(steered=False, z=z), CHANCE, predicted=told).plain
        points.append(Point(run.steps, _share(run.evictions, run.finished)))
    evictions, bound = at_steps(points, base.steps)
    real = correlation(told, [output for _, output in source]) if told else 0.0
    past_future = _share(base.evictions, base.finished)
    return Found(lengths, seed, real, base.steps, past_future, evictions, bound)


def _share(evictions: int, finished: int) -> float:
    """None at all counts as half of one, so that it has a logarithm."""
    return max(0.5, evictions) / max(1, finished)


def table(found: Sequence[Found]) -> Table:
    """For the terminal."""
    shown = Table(title=f"Evictions at Past-Future's steps (reserve {RESERVE:.0%}), memory only")
    for name in ("lengths", "seed", "correlation", "Past-Future", "chance", "ratio"):
        shown.add_column(name, justify="left" if name == "lengths" else "right")
    for one in found:
        shown.add_row(
            one.lengths,
            str(one.seed),
            f"{one.correlation:.3f}" if one.correlation else "none told",
            f"{one.past_future:.2%}",
            f"{one.bound} {one.evictions:.2%}".strip(),
            f"{one.ratio:.2f}",
        )
    return shown


def main(
    correlations: Annotated[
        list[float] | None, typer.Option("--correlation", help="Repeatable; 0: none told.")
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="A set; repeatable.")] = None,
    requests: int = 3_000,
    seeds: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Exit code 1 if the limit for correlations of 0.95 and more is not held."""
    console = Console(width=120)
    found = []
    for name in lengths or LENGTHS:
        for wanted in correlations or (0.0, 0.95):
            for seed in range(seeds):
                found.append(measure(name, seed, wanted, requests))
                console.print(found[-1])
    console.print(table(found))
    if json_file is not None:
        result = [{**asdict(one), "ratio": one.ratio} for one in found]
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    told = [one for one in found if one.correlation >= 0.94]
    means = [
        fmean(o.ratio for o in told if o.lengths == name) for name in {o.lengths for o in told}
    ]
    if any(mean > LIMIT for mean in means):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
