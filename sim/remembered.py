"""`python -m sim.remembered`: does `tranche` evict what it should, on every set of lengths?

Memory only (memory_chance.py), target 3 %, with the preset's constants; as it evicts, and with
leases as credits, where no allocation fails (asserted at every step). Past-Future runs beside it
with several reserves, so that its evictions at as many steps as `tranche` takes can be told: the
logarithm is interpolated between two reserves. Steps are over the oracle's, which never evicts and
goes strictly first come, first served. Results are kept run by run; a command that was stopped goes
on. Exit code 1 where a mean misses a limit.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sim.foretold import Point, at_steps
from sim.memory_chance import PRESET, Rules, simulate_chance
from sim.memory_only import QUIRKS, simulate
from sim.memory_sets import MEMORY_SETS, memory_set

OURS, CREDITS, BASE = "tranche", "tranche, credits", "past-future 3 %"
LEASE_TOKENS = {OURS: 0, CREDITS: 16}
RESERVES = {BASE: 0.03, "past-future 5 %": 0.05, "past-future 8 %": 0.08, "past-future 12 %": 0.12}
VARIANTS = (*LEASE_TOKENS, *RESERVES)


@dataclass(frozen=True, slots=True)
class Remembered:
    """One run."""

    lengths: str
    seed: int
    variant: str
    steps_over_oracle: float
    evictions_percent: float
    stall_p99_steps: float
    """Of each request's longest standstill after its first token."""
    margin_z: float = 0.0
    """At the end; not of Past-Future."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a mean over the seeds has to hold."""

    figure: str
    """A key of `summary`."""
    least: float
    most: float


USUAL = (
    Limit("evicted", 2.4, 3.3),
    Limit("steps", 0.0, 1.03),
    Limit("price of credits", -1.0, 0.01),
)
PREEMPTED = (*USUAL, Limit("evictions at equal steps", 0, 0.65), Limit("stall ratio", 0, 0.35))
LIMITS: dict[str, tuple[Limit, ...]] = {
    **dict.fromkeys(MEMORY_SETS, USUAL),
    "Dist-1": PREEMPTED,
    "ShareGPT-o1": (
        USUAL[0],
        Limit("steps", 0.0, 1.05),
        USUAL[2],
        Limit("evictions at equal steps", 0, 0.4),
        PREEMPTED[-1],
    ),
    "Azure conv": (USUAL[0], Limit("steps", 0.0, 1.0), USUAL[2]),
    # Its memory is small: a lease of each request is much of it.
    "ShareGPT": (*USUAL[:2], Limit("price of credits", -1.0, 0.02)),
}
"""Those of the design, a set at a time."""


def measure(lengths: str, seed: int, variant: str, requests: int, oracle_steps: int) -> Remembered:
    """One run; `oracle_steps` of the same requests."""
    source = memory_set(lengths, seed).first(requests)
    capacity, margin_z = source.capacity_tokens, 0.0
    if variant in RESERVES:
        constants = replace(QUIRKS, future_reserve=RESERVES[variant])
        plain = simulate(
            source.requests, "past-future", constants, seed=seed, capacity_tokens=capacity
        )
    else:
        rules = Rules(lease_tokens=LEASE_TOKENS[variant])
        found = simulate_chance(source.requests, rules, PRESET, capacity_tokens=capacity)
        plain, margin_z = found.plain, found.margin_z
    steps = plain.steps / oracle_steps
    evicted, stall = plain.evictions_percent, plain.stall_p99_steps
    return Remembered(lengths, seed, variant, steps, evicted, stall, margin_z)


def oracle(lengths: str, seed: int, requests: int) -> int:
    """Steps of the one that knows."""
    source = memory_set(lengths, seed).first(requests)
    return simulate(source.requests, "oracle", QUIRKS, capacity_tokens=source.capacity_tokens).steps


def summary(found: Sequence[Remembered], lengths: str) -> dict[str, float]:
    """Means over the seeds on which all variants have run; empty without one."""
    runs = {(one.seed, one.variant): one for one in found if one.lengths == lengths}
    seeds = [s for s in {seed for seed, _ in runs} if all((s, v) in runs for v in VARIANTS)]
    if not seeds:
        return {}
    ours = [runs[seed, OURS] for seed in seeds]
    steps = fmean(one.steps_over_oracle for one in ours)
    evicted = fmean(one.evictions_percent for one in ours)
    price = fmean(runs[s, CREDITS].steps_over_oracle for s in seeds) - steps
    others = [
        _at_equal_steps([runs[s, v] for v in RESERVES], runs[s, OURS].steps_over_oracle)
        for s in seeds
    ]
    stalls = fmean(runs[s, BASE].stall_p99_steps for s in seeds)
    return {
        "seeds": len(seeds),
        "evicted": evicted,
        "evicted, spread": pstdev(one.evictions_percent for one in ours),
        "steps": steps,
        "steps, spread": pstdev(one.steps_over_oracle for one in ours),
        "base evicted": fmean(runs[s, BASE].evictions_percent for s in seeds),
        "price of credits": price,
        "evictions at equal steps": evicted / max(0.01, fmean(others)),
        "stall ratio": fmean(one.stall_p99_steps for one in ours) / max(1.0, stalls),
    }


def _at_equal_steps(runs: Sequence[Remembered], steps: float) -> float:
    """Past-Future's evictions in per cent at so many steps; of the nearest reserve beyond both
    ends."""
    points = [
        Point(round(1e6 * one.steps_over_oracle), max(0.01, one.evictions_percent)) for one in runs
    ]
    return at_steps(points, round(1e6 * steps))[0]


def missed(found: Sequence[Remembered]) -> list[str]:
    """Limits that the means do not hold, said in words."""
    words = []
    for lengths, limits in LIMITS.items():
        figures = summary(found, lengths)
        for limit in limits if figures else ():
            value = figures[limit.figure]
            if not limit.least <= value <= limit.most:
                words.append(
                    f"{lengths}: {limit.figure} {value:.4g}, "
                    f"not between {limit.least:g} and {limit.most:g}"
                )
    return words


def table(found: list[Remembered]) -> Table:
    """Means over seeds and their spread."""
    shown = Table(title=f"Memory only, target {PRESET.chance_target:.0%}")
    for name in ("lengths", "variant", "seeds", "steps / oracle", "evicted", "p99 stall"):
        shown.add_column(name, justify="left" if name in ("lengths", "variant") else "right")
    for pair in dict.fromkeys((one.lengths, one.variant) for one in found):
        runs = [one for one in found if (one.lengths, one.variant) == pair]
        steps = [one.steps_over_oracle for one in runs]
        evicted = [one.evictions_percent for one in runs]
        shown.add_row(
            *pair,
            str(len(runs)),
            f"{fmean(steps):.3f} ± {pstdev(steps):.3f}",
            f"{fmean(evicted):.2f} ± {pstdev(evicted):.2f} %",
            f"{fmean(one.stall_p99_steps for one in runs):.0f}",
        )
    return shown


def compared(found: Sequence[Remembered]) -> Table:
    """`tranche` over Past-Future."""
    shown = Table(title="tranche over Past-Future")
    for name in ("lengths", "evictions at equal steps", "p99 stall", "price of credits"):
        shown.add_column(name, justify="left" if name == "lengths" else "right")
    for lengths in MEMORY_SETS:
        if figures := summary(found, lengths):
            shown.add_row(
                lengths,
                f"{figures['evictions at equal steps']:.2f}",
                f"{figures['stall ratio']:.2f}",
                f"{100 * figures['price of credits']:+.1f} points of steps",
            )
    return shown


def main(
    lengths: Annotated[list[str] | None, typer.Option(help="A set; repeatable.")] = None,
    variants: Annotated[list[str] | None, typer.Option("--variant", help="Repeatable.")] = None,
    requests: int = 3_000,
    seeds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Goes on with it.")] = None,
) -> None:
    """All sets, seed by seed."""
    kept = json.loads(json_file.read_text()) if json_file and json_file.exists() else []
    found = [Remembered(**one) for one in kept]
    done = {(one.lengths, one.seed, one.variant) for one in found}
    console = Console(width=120)
    for seed in range(seeds):
        for name in lengths or MEMORY_SETS:
            left = [v for v in variants or VARIANTS if (name, seed, v) not in done]
            steps = oracle(name, seed, requests) if left else 0
            for variant in left:
                found.append(measure(name, seed, variant, requests, steps))
                console.print(found[-1])
                if json_file is not None:
                    result = [asdict(one) for one in found]
                    json_file.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(found))
    console.print(compared(found))
    for words in missed(found):
        console.print(f"[red]{words}")
    raise typer.Exit(1 if missed(found) else 0)


if __name__ == "__main__":
    typer.run(main)
