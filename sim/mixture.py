"""Mixtures: one stream of requests from several tables and synthetic sets.

A source is written `[TENANT=]FILE_OR_SET[*WEIGHT]`, and several are joined by `+`, such as
`alice=sharegpt.csv*3+bob=dist-1*1`: three of four requests are the next row of the table.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from sim.items import Item, WorkloadError
from sim.synthetic import COUNT, HOW, draw_items, is_synthetic
from sim.tables import load_items

PART = re.compile(r"(?:(?P<tenant>[\w.-]+)=)?(?P<name>.*?)(?:\*(?P<weight>[^*]+))?")


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture. `weight` None: none was given."""

    name: str
    tenant: str = ""
    weight: float | None = None

    @property
    def synthetic(self) -> bool:
        """Drawn, not read."""
        return is_synthetic(self.name) and not Path(self.name).is_file()


def parts_of(text: str) -> list[Part]:
    """The sources that a text names. Raises WorkloadError for one that cannot be read so."""
    if Path(text).is_file():
        return [Part(text)]
    return [_part(piece.strip(), text) for piece in text.split("+")]


def mixed_items(
    parts: Sequence[Part], limit: int | None, rng: Random, *, shuffle: bool = False
) -> list[Item]:
    """The requests of these sources, at most `limit`; of synthetic sets alone, COUNT by default.

    Several sources are drawn by weight (default 1), each in its own order, until one ends; traces
    without weights are laid over each other by their arrivals. With `shuffle` the rows of each
    table come in random order. Raises WorkloadError.
    """
    pools = [_items(part, limit, rng, shuffle) for part in parts]
    if len(pools) == 1:
        return pools[0][:limit]
    weighted = any(part.weight is not None for part in parts)
    recorded = all(item.arrival_s is not None for pool in pools for item in pool)
    if recorded and not weighted:
        merged = [item for pool in pools for item in pool]
        return sorted(merged, key=lambda item: item.arrival_s or 0.0)[:limit]
    weights = [1.0 if part.weight is None else part.weight for part in parts]
    return list(_drawn(pools, weights, limit, rng))


def with_tenants(items: Sequence[Item], shares: str, rng: Random) -> list[Item]:
    """The items that have no tenant, divided among tenants: `3` for three with equal shares,
    `8:1:1` for three with these shares. Raises WorkloadError."""
    try:
        numbers = [float(share) for share in shares.split(":")]
        weights = [1.0] * int(shares) if len(numbers) == 1 else numbers
    except ValueError:
        weights = []
    if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise WorkloadError(f"--tenants {shares}: give a number such as 3, or shares such as 8:1:1")
    names = [f"tenant-{number}" for number in range(1, len(weights) + 1)]
    drawn = rng.choices(names, weights, k=len(items))
    return [
        item if item.tenant else replace(item, tenant=name)
        for item, name in zip(items, drawn, strict=True)
    ]


def _part(piece: str, text: str) -> Part:
    if Path(piece).is_file():
        return Part(piece)
    match = PART.fullmatch(piece)
    if match is None or not match["name"]:
        raise WorkloadError(
            f"{text!r}: write sources as [TENANT=]FILE_OR_SET[*WEIGHT] with + between"
        )
    part = Part(match["name"], match["tenant"] or "", _weight(match["weight"], piece))
    if not part.synthetic and not Path(part.name).exists():
        raise WorkloadError(
            f"{part.name}: no such file; give a .csv, .parquet or .jsonl file; {HOW}"
        )
    return part


def _weight(text: str | None, piece: str) -> float | None:
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise WorkloadError(f"{piece!r}: the weight after * must be a number above 0")
    return weight


def _items(part: Part, limit: int | None, rng: Random, shuffle: bool) -> list[Item]:
    if part.synthetic:
        items = draw_items(part.name, COUNT if limit is None else limit, rng)
    else:
        items = load_items(Path(part.name), None if shuffle else limit)
        if shuffle:
            rng.shuffle(items)
    if part.tenant:
        items = [replace(item, tenant=part.tenant) for item in items]
    return items


def _drawn(
    pools: Sequence[Sequence[Item]], weights: Sequence[float], limit: int | None, rng: Random
) -> Iterator[Item]:
    taken = [0] * len(pools)
    for _ in range(sum(map(len, pools)) if limit is None else limit):
        chosen = rng.choices(range(len(pools)), weights)[0]
        if taken[chosen] == len(pools[chosen]):
            return
        yield pools[chosen][taken[chosen]]
        taken[chosen] += 1
