"""`python -m sim.foretold`: what predictions of outputs are worth, by how true they are.

Memory only (memory_chance.py), so that nothing else plays a part. Past-Future with a reserve of 3 %
gives the steps; `chance` is run with fixed margins, with and without predictions, and its evictions
at as many steps are interpolated between two margins (their logarithm, over steps). A prediction is
the true output and noise of the size that makes the wanted correlation, so the scheduler is told
what a predictor of that quality would say, and nothing more; or what a real predictor said; or what
a bad one would say. A run is 6,000 requests long: 1 % of steps is a factor of two in evictions, and
with a third as many (all that ShareGPT-o1 has) where a run ends is worth as much.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from math import exp, log, sqrt
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, pstdev
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sim.memory_chance import PRESET, Rules, simulate_chance
from sim.memory_only import QUIRKS, Lengths, simulate
from sim.memory_sets import MemorySet, memory_set

MARGINS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
"""Deviations; between two of them lies all that Past-Future's steps ask for."""
FIRST = 6
"""The margin that is tried first."""
RESERVE = 0.03
LIMIT = 0.35
"""Evictions over Past-Future's at equal steps, with predictions of correlation 0.95."""
TRUE = 0.94
"""For predictions that came out with at least this correlation the limit holds."""
LENGTHS = ("Dist-1", "ShareGPT-o1", "ShareGPT")
REAL, CONSTANT, DOUBLED = "real", "constant", "doubled"
"""What a real predictor said (only of sets that have one); always the same; 0.95 and twice that."""


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
    told: str
    correlation: float
    """Of the predictions, as they came out; 0: without predictions."""
    steps: int
    """Past-Future's."""
    past_future: float
    """Its evictions per finished request."""
    evictions: float
    """Of `chance` at as many steps."""
    bound: str
    """`at most` or `at least`, where the margins do not reach as far."""

    @property
    def ratio(self) -> float:
        return self.evictions / self.past_future


KEYS = tuple(field.name for field in fields(Found))


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


def told_by(source: MemorySet, told: str, seed: int) -> list[int] | None:
    """The predictions of this name, or of this correlation; 0 and REAL without one: None."""
    outputs = [output for _, output in source.requests]
    if told == REAL:
        return source.predicted
    if told == CONSTANT:
        return [round(fmean(outputs))] * len(outputs)
    if told == DOUBLED:
        return [2 * tokens for tokens in foretold(source.requests, 0.95, seed)]
    wanted = float(told)
    return foretold(source.requests, wanted, seed) if wanted else None


def measure(lengths: str, seed: int, told: str, requests: int) -> Found:
    """One comparison; `told` as of `told_by`."""
    source = memory_set(lengths, seed).long(requests, seed)
    constants = replace(QUIRKS, future_reserve=RESERVE)
    capacity = source.capacity_tokens
    base = simulate(source.requests, "past-future", constants, seed=seed, capacity_tokens=capacity)
    predicted = told_by(source, told, seed)
    points: dict[int, Point] = {}

    def steps_at(place: int) -> int:
        rules = Rules(steered=False, z=MARGINS[place])
        run = simulate_chance(
            source.requests, rules, PRESET, predicted=predicted, capacity_tokens=capacity
        ).plain
        points[place] = Point(run.steps, _share(run.evictions, run.finished))
        return run.steps

    way = 1 if steps_at(FIRST) < base.steps else -1
    place = FIRST + way
    while 0 <= place < len(MARGINS) and (steps_at(place) < base.steps) == (way > 0):
        place += way
    evictions, bound = at_steps(list(points.values()), base.steps)
    real = _correlation(predicted, [output for _, output in source.requests])
    past_future = _share(base.evictions, base.finished)
    return Found(lengths, seed, told, real, base.steps, past_future, evictions, bound)


def _correlation(predicted: Sequence[int] | None, outputs: Sequence[int]) -> float:
    try:
        return correlation(predicted, outputs) if predicted is not None else 0.0
    except StatisticsError:  # a constant
        return 0.0


def _share(evictions: int, finished: int) -> float:
    """None at all counts as half of one, so that it has a logarithm."""
    return max(0.5, evictions) / max(1, finished)


def table(found: Sequence[Found]) -> Table:
    """For the terminal."""
    shown = Table(title=f"Evictions at Past-Future's steps (reserve {RESERVE:.0%}), memory only")
    for name in ("lengths", "seed", "told", "correlation", "Past-Future", "chance", "ratio"):
        shown.add_column(name, justify="left" if name == "lengths" else "right")
    for one in found:
        shown.add_row(
            one.lengths,
            str(one.seed),
            "nothing" if one.told == "0" else one.told,
            f"{one.correlation:.3f}",
            f"{one.past_future:.2%}",
            f"{one.bound} {one.evictions:.2%}".strip(),
            f"{one.ratio:.2f}",
        )
    return shown


def main(
    correlations: Annotated[
        list[str] | None,
        typer.Option("--correlation", help=f"Repeatable; 0: none; {REAL}, {CONSTANT}, {DOUBLED}."),
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="A set; repeatable.")] = None,
    requests: int = 6_000,
    seeds: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Goes on with it.")] = None,
) -> None:
    """Exit code 1 if the limit for correlations of 0.95 is not held by the mean of a set."""
    console = Console(width=120)
    kept = json.loads(json_file.read_text()) if json_file and json_file.exists() else []
    found = [Found(**{key: one[key] for key in KEYS}) for one in kept]
    done = {(one.lengths, one.seed, one.told) for one in found}
    for seed in range(seeds):
        for name in lengths or LENGTHS:
            real = memory_set(name, seed).predicted is not None
            for told in correlations or ("0", REAL if real else "0.95"):
                if (name, seed, told) in done or (told == REAL and not real):
                    continue
                found.append(measure(name, seed, told, requests))
                console.print(found[-1])
                if json_file is not None:
                    result = [{**asdict(one), "ratio": one.ratio} for one in found]
                    json_file.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(found))
    if missed(found):
        raise typer.Exit(1)


def missed(found: Sequence[Found]) -> list[str]:
    """Sets on which true predictions do not gain what they should."""
    told = [one for one in found if one.correlation >= TRUE]
    names = sorted({one.lengths for one in told})
    return [n for n in names if fmean(one.ratio for one in told if one.lengths == n) > LIMIT]


if __name__ == "__main__":
    typer.run(main)
