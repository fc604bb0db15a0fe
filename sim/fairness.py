"""`python -m sim.fairness`: does a tenant that floods make the others wait? In virtual time.

Ten tenants send alike; then one of them sends ten times as much, and the others the very same
requests as before. What counts is the others' 99th percentile of the time to first token with the
flood, over that without it; and, at every step, how far tenants that wait are apart in weighted
service, over the bound of `leads` (sim/gaps.py).
"""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from services.scheduler.core.presets import preset_named
from shared.profiles import load_profile
from sim.gaps import Gaps
from sim.items import Workload
from sim.mesh import SimMesh
from sim.options import constants as parsed_constants
from sim.reproduction.survey_load import CAPS, CONV, PROFILE, SOURCES, bound_of
from sim.run import run_out
from sim.setup import Setup, Value
from sim.workload import make_workload

WORKERS = 4
TENANTS = 10
FLOOD = 10
"""Times as much as before."""
FLOODER = "t0"
WARM_UP = 0.1
"""Of the others' requests, at the beginning: they do not count."""
LIMIT = 1.10
POLICIES = ("tranche", "past-future")


@dataclass(frozen=True, slots=True)
class Found:
    """One policy: means over seeds, in seconds; ratios are of each seed's pair."""

    policy: str
    load: float
    flooded_load: float
    alone_p99_s: float
    flooded_p99_s: float
    ratio: float
    low: float
    high: float
    mean_ratio: float
    """Of mean times to first token."""
    flooder_p99_s: float
    """What the flooder's own requests then waited."""
    lead_tokens: float
    """The most that one tenant was ahead of another that waited too, in weighted tokens,"""
    lead: float
    """and the most over its bound. By the accounts; nothing where nobody keeps any."""
    gap_tokens: float
    """The most that one was given more than another since both waited,"""
    gap: float
    """and the most over the bounds of both. By what went in and out."""

    @property
    def held(self) -> bool:
        return self.ratio <= LIMIT and self.lead <= 1 and self.gap <= 1


def calm(load: float, requests: int, seed: int) -> Workload:
    """All tenants alike."""
    rate = load * WORKERS * bound_of(CONV, 3_000, seed).rps
    workload = make_workload(SOURCES[CONV], limit=requests, shuffle=True, rate=rate, seed=seed)
    rng = Random(f"tenants {seed}")
    items = [replace(item, tenant=f"t{rng.randrange(TENANTS)}") for item in workload.items]
    return replace(workload, items=tuple(items))


def flooded(workload: Workload, seed: int) -> Workload:
    """The same requests, and nine times those of one tenant again: like lengths, at times of their
    own."""
    rng = Random(f"flood {seed}")
    last_s = max(item.arrival_s or 0.0 for item in workload.items)
    own = sum(item.tenant == FLOODER for item in workload.items)
    more = [
        replace(rng.choice(workload.items), tenant=FLOODER, arrival_s=rng.uniform(0.0, last_s))
        for _ in range((FLOOD - 1) * own)
    ]
    items = sorted([*workload.items, *more], key=lambda item: item.arrival_s or 0.0)
    return replace(workload, items=tuple(items))


def waits(
    policy: str, workload: Workload, seed: int, constants: Mapping[str, Value]
) -> tuple[list[float], list[float], Gaps]:
    """Times to first token: the others', and the flooder's; and how far tenants were apart."""
    setup = Setup(
        policy=policy,
        workload=workload,
        profile=load_profile(PROFILE),
        workers=WORKERS,
        constants=constants,
        seed=seed,
        max_tokens=CAPS[CONV],
    )
    gaps = Gaps(setup.all_constants(), lambda tenant: _given(mesh, tenant), setup.block_tokens_each)
    mesh = SimMesh(setup, journal=gaps)
    mesh.start()
    run_out(mesh)
    others: list[float] = []
    own: list[float] = []
    for call in mesh.clients.calls:
        assert call.first_at is not None, "a request got no token"
        wait_s = call.first_at - call.sent_at
        (own if call.item.tenant == FLOODER else others).append(wait_s)
    gc.collect()
    return others[round(WARM_UP * len(others)) :], own, gaps


def _given(mesh: SimMesh, tenant: str) -> float:
    core = mesh.leader.core
    return core.books.lines.central.given(tenant) if core is not None else 0.0


def measure(
    policy: str, load: float, requests: int, seeds: int, constants: Mapping[str, Value]
) -> Found:
    """Both runs with each seed."""
    rows = []
    seen: list[Gaps] = []
    for seed in range(seeds):
        alone = calm(load, requests, seed)
        before, _, apart = waits(policy, alone, seed, constants)
        after, own, far_apart = waits(policy, flooded(alone, seed), seed, constants)
        seen += [apart, far_apart]
        p99s = [float(np.percentile(values, 99)) for values in (before, after, own)]
        rows.append((*p99s, fmean(after) / fmean(before)))
    ratios = [after / before for before, after, _, _ in rows]
    before_s, after_s, own_s, mean_ratio = (fmean(column) for column in zip(*rows, strict=True))
    return Found(
        policy=policy,
        load=load,
        flooded_load=load * (1 + (FLOOD - 1) / TENANTS),
        alone_p99_s=before_s,
        flooded_p99_s=after_s,
        ratio=fmean(ratios),
        low=min(ratios),
        high=max(ratios),
        mean_ratio=mean_ratio,
        flooder_p99_s=own_s,
        lead_tokens=max(gaps.lead for gaps in seen),
        lead=max(gaps.lead_worst for gaps in seen),
        gap_tokens=max(gaps.gap for gaps in seen),
        gap=max(gaps.gap_worst for gaps in seen),
    )


def table(found: Sequence[Found]) -> Table:
    """For the terminal."""
    shown = Table(title=f"{TENANTS} tenants, one sends {FLOOD} times as much: the others' TTFT")
    for name in ("policy", "load", "p99 without", "p99 with", "ratio", "over seeds", "mean's"):
        shown.add_column(name)
    shown.add_column("flooder's p99")
    shown.add_column("lead / bound")
    shown.add_column("gap / bound")
    for one in found:
        shown.add_row(
            one.policy,
            f"{one.load:g} to {one.flooded_load:.2f}",
            f"{one.alone_p99_s:.3f} s",
            f"{one.flooded_p99_s:.3f} s",
            f"{one.ratio:.2f}",
            f"{one.low:.2f} to {one.high:.2f}",
            f"{one.mean_ratio:.2f}",
            f"{one.flooder_p99_s:.1f} s",
            f"{one.lead:.2f}",
            f"{one.gap:.2f}",
        )
    return shown


def main(
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    load: Annotated[float, typer.Option(help="Without the flood, of what the workers do.")] = 0.8,
    requests: Annotated[int, typer.Option(help="Without the flood.")] = 3_000,
    seeds: int = 3,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Exit code 1 if `tranche` does not hold the limit, or a tenant got too far ahead."""
    changed, found = parsed_constants(changes or (), None), []
    for name in policy or POLICIES:
        preset_named(name)
        found.append(measure(name, load, requests, seeds, changed))
    Console(width=130).print(table(found))
    if json_file is not None:
        result = [{**asdict(one), "requests": requests, "seeds": seeds} for one in found]
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if not all(one.held for one in found if one.policy.startswith("tranche")):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
