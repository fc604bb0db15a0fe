"""Workloads: which requests arrive when, from traces, length tables, prompts or synthetic sets.

`sim.tables` reads files, `sim.synthetic` draws lengths, `sim.mixture` joins several sources, and
`sim.arrivals` says when they come.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from sim.arrivals import random_arrivals, recorded_arrivals
from sim.items import Item, Workload, WorkloadError
from sim.mixture import mixed_items, parts_of, with_tenants
from sim.tables import load_items

__all__ = ["Item", "Workload", "WorkloadError", "load_items", "make_workload"]
BURST_MAX = 100.0
"""A larger coefficient of variation puts all requests into one moment."""


def make_workload(
    source: Path | str,
    *,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    rate: float | None = None,
    rate_scale: float | None = None,
    clients: int | None = None,
    burst: float | None = None,
    tenants: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Workload:
    """The requests of `source` (a file, a synthetic set or a mixture) with caps and arrivals.

    `rate` (requests/s) replaces the arrivals by random ones: Poisson, or gamma with the
    coefficient of variation `burst`. `rate_scale` speeds a trace's own up, `clients` makes a
    closed loop. Raises WorkloadError if the options contradict each other, or if a source without
    arrivals gets neither rate nor clients.
    """
    _check(limit, rate, rate_scale, clients, burst)
    for name, cap in (("prompt", max_prompt_tokens), ("output", max_output_tokens)):
        if cap is not None and cap < 1:
            raise WorkloadError(f"--max-{name}-tokens must be at least 1")
    # Streams of their own, so that the lengths stay the same when the rate changes.
    lengths, shares = Random(f"lengths {seed}"), Random(f"tenants {seed}")
    parts = parts_of(str(source))
    items = [
        replace(
            item,
            prompt_tokens=_capped(item.prompt_tokens, max_prompt_tokens),
            output_tokens=_capped(item.output_tokens, max_output_tokens),
        )
        for item in mixed_items(parts, limit, lengths, shuffle=shuffle)
    ]
    if tenants is not None:
        items = with_tenants(items, tenants, shares)
    name = "+".join(Path(part.name).name if not part.synthetic else part.name for part in parts)
    if clients is not None:
        return Workload(name, tuple(items), clients)
    if rate is not None:
        return Workload(name, tuple(random_arrivals(items, rate, Random(seed), burst)))
    synthetic = all(part.synthetic for part in parts)
    return Workload(name, tuple(_recorded(str(source), items, rate_scale, synthetic)))


def _check(
    limit: int | None,
    rate: float | None,
    rate_scale: float | None,
    clients: int | None,
    burst: float | None,
) -> None:
    if sum(option is not None for option in (rate, rate_scale, clients)) > 1:
        raise WorkloadError("give one of --rate, --rate-scale and --clients")
    options = {"limit": limit, "rate": rate, "rate-scale": rate_scale, "clients": clients}
    for name, value in (options | {"burst": burst}).items():
        if value is not None and not 0 < value < float("inf"):
            raise WorkloadError(f"--{name} must be above 0")
    if burst is not None and rate is None:
        raise WorkloadError("--burst shapes random arrivals: give --rate too")
    if burst is not None and burst > BURST_MAX:
        raise WorkloadError(
            f"--burst is the gaps' standard deviation over mean, up to {BURST_MAX:g}"
        )


def _recorded(
    source: str, items: Sequence[Item], rate_scale: float | None, synthetic: bool
) -> list[Item]:
    without = sum(item.arrival_s is None for item in items)
    if synthetic:
        raise WorkloadError(f"{source} has no arrivals: give --rate or --clients")
    if without:
        which = "no arrival_s column" if without == len(items) else f"{without} without arrival_s"
        raise WorkloadError(f"{source}: {which}; give --rate or --clients")
    return recorded_arrivals(items, rate_scale or 1.0)


def _capped(value: int, cap: int | None) -> int:
    return value if cap is None else min(value, cap)
