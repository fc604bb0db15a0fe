"""Arrivals: when the requests of an open loop come.

Poisson arrivals have independent gaps; gamma gaps with a coefficient of variation above 1 come in
bursts with pauses between them (Azure's conversations have about 1.1, its code completions 13).
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from sim.items import Item


def random_arrivals(
    items: Sequence[Item], rate: float, rng: Random, burst: float | None = None
) -> list[Item]:
    """The items at `rate` requests a second on average, in their order.

    `burst` is the coefficient of variation of the gaps (standard deviation over mean); None or 1:
    Poisson, above 1: bursts, below 1: more regular than Poisson.
    """
    now, arriving = 0.0, []
    for item in items:
        now += rng.expovariate(rate) if burst in (None, 1) else _gamma_gap(rng, rate, burst or 1)
        arriving.append(replace(item, arrival_s=now))
    return arriving


def recorded_arrivals(items: Sequence[Item], scale: float) -> list[Item]:
    """The items in order of their recorded arrivals, from 0, `scale` times as fast."""
    ordered = sorted(items, key=lambda item: item.arrival_s or 0.0)
    start = ordered[0].arrival_s or 0.0
    return [replace(item, arrival_s=((item.arrival_s or 0.0) - start) / scale) for item in ordered]


def _gamma_gap(rng: Random, rate: float, burst: float) -> float:
    """A gamma variable with mean 1/rate and standard deviation burst/rate."""
    shape = 1 / burst**2
    return rng.gammavariate(shape, 1 / (rate * shape))
