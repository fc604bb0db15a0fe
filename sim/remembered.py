"""`python -m sim.remembered`: does `chance` evict what it should, on every set of lengths?

Memory only (memory_chance.py), target 3 %. `chance` as it was first measured, with the victim whose
end is farthest; `tranche` with the preset's weights for what coming back costs, and the same with
leases as credits, where no allocation fails (asserted at every step); Past-Future with a reserve of
3 %. Steps are over the oracle's, which never evicts and goes strictly first come, first served.
Results are kept run by run; a command that was stopped goes on.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.scheduler.core.presets import TRANCHE
from services.scheduler.core.settings import Constants
from sim.memory_chance import CHANCE, ChanceTally, Rules, simulate_chance
from sim.memory_only import QUIRKS, Tally, simulate
from sim.memory_sets import MEMORY_SETS, MemorySet, memory_set

RESERVE = 0.03
LEASE_TOKENS = 16
PRESET = replace(
    CHANCE,
    victim_kv_exponent=float(TRANCHE["victim_kv_exponent"]),
    chance_return_less=float(TRANCHE["chance_return_less"]),
)


@dataclass(frozen=True, slots=True)
class Remembered:
    """One run."""

    lengths: str
    seed: int
    variant: str
    steps_over_oracle: float
    evictions_percent: float
    stall_p99_steps: float = 0.0
    """Of each request's longest standstill after its first token; not told of Past-Future."""
    recomputed_per_request: float = 0.0
    margin_z: float = 0.0
    """At the end."""


def _past_future(source: MemorySet, seed: int) -> Tally:
    constants = replace(QUIRKS, future_reserve=RESERVE)
    return simulate(
        source.requests,
        "past-future",
        constants,
        seed=seed,
        capacity_tokens=source.capacity_tokens,
    )


def _chance(constants: Constants, lease_tokens: int = 0) -> Callable[..., ChanceTally]:
    def run(source: MemorySet, seed: int) -> ChanceTally:
        rules = Rules(lease_tokens=lease_tokens)
        return simulate_chance(
            source.requests, rules, constants, capacity_tokens=source.capacity_tokens
        )

    return run


VARIANTS: dict[str, Callable[[MemorySet, int], Tally | ChanceTally]] = {
    "past-future": _past_future,
    "chance": _chance(CHANCE),
    "tranche": _chance(PRESET),
    "tranche, credits": _chance(PRESET, LEASE_TOKENS),
}


def measure(lengths: str, seed: int, variant: str, requests: int, oracle_steps: int) -> Remembered:
    """One run; `oracle_steps` of the same requests."""
    found = VARIANTS[variant](memory_set(lengths, seed).first(requests), seed)
    if isinstance(found, Tally):
        steps = found.steps / oracle_steps
        return Remembered(lengths, seed, variant, steps, found.evictions_percent)
    return Remembered(
        lengths,
        seed,
        variant,
        found.plain.steps / oracle_steps,
        found.plain.evictions_percent,
        found.stall_p99_steps,
        found.recomputed_per_request,
        found.margin_z,
    )


def oracle(lengths: str, seed: int, requests: int) -> int:
    """Steps of the one that knows."""
    source = memory_set(lengths, seed).first(requests)
    return simulate(source.requests, "oracle", QUIRKS, capacity_tokens=source.capacity_tokens).steps


def table(found: list[Remembered]) -> Table:
    """Means over seeds and their spread."""
    shown = Table(title=f"Memory only, target {CHANCE.chance_target:.0%}")
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
            f"{fmean(one.stall_p99_steps for one in runs):.0f}" if pair[1] != "past-future" else "",
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


if __name__ == "__main__":
    typer.run(main)
