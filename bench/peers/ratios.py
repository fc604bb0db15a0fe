"""Ratios of ours to a peer over interleaved rounds, with their interval; and what is owed."""

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from bench.peers.cell import Cell, percentile

CONFIDENCE = 0.95
TRANSFORMERS = "transformers"
OWED_OF_TRANSFORMERS = 3.0


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A median over pairs, and between which order statistics it lies."""

    measure: str
    clients: int
    ours: str
    peer: str
    pairs: int
    median: float
    low: float
    high: float
    coverage: float
    """Chance that the interval covers the true median; under 0.95 there were too few pairs."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of what the comparison has to show."""

    text: str
    ratio: Ratio
    owed: float
    at_least: bool = True
    """Otherwise: at most."""

    @property
    def met(self) -> bool:
        """The median is on the right side."""
        value = self.ratio.median
        return value >= self.owed if self.at_least else value <= self.owed

    @property
    def sure(self) -> bool:
        """The whole interval is on one side, with the wanted confidence."""
        ratio = self.ratio
        one_side = not ratio.low < self.owed < ratio.high
        return one_side and ratio.coverage >= CONFIDENCE


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The narrowest symmetric pair of order statistics that covers the median with 95 %, and its
    coverage: no shape of the distribution is assumed. With fewer than 6 values, all of them."""
    ordered, count = sorted(values), len(values)
    if not ordered:
        return math.nan, math.nan, 0.0
    rank = 0
    while rank + 1 < (count + 1) // 2 and _coverage(count, rank + 1) >= CONFIDENCE:
        rank += 1
    return ordered[rank], ordered[count - 1 - rank], _coverage(count, rank)


def _coverage(count: int, cut: int) -> float:
    """Of the interval that leaves out `cut` values at each end: 1 - 2 P(Binomial <= cut)."""
    tail: float = sum(math.comb(count, k) for k in range(cut + 1)) / 2.0**count
    return max(0.0, 1 - 2 * tail)


def by_place(cells: Iterable[Cell]) -> dict[tuple[str, int, int], Cell]:
    """Cells by (system, clients, round)."""
    return {(cell.system, cell.clients, cell.round): cell for cell in cells}


def ratio(
    cells: Iterable[Cell],
    measure: str,
    clients: int,
    ours: str,
    peer: str,
    of: Callable[[Cell], float],
) -> Ratio | None:
    """Ours over the peer's, round by round; None without a common round."""
    placed = by_place(cells)
    rounds = sorted(number for name, at, number in placed if name == ours and at == clients)
    pairs = [
        (of(placed[ours, clients, number]), of(placed[peer, clients, number]))
        for number in rounds
        if (peer, clients, number) in placed
    ]
    values = [mine / theirs for mine, theirs in pairs if theirs > 0 and not math.isnan(mine)]
    if not values:
        return None
    low, high, coverage = median_interval(values)
    return Ratio(
        measure=measure,
        clients=clients,
        ours=ours,
        peer=peer,
        pairs=len(values),
        median=percentile(values, 0.5),
        low=low,
        high=high,
        coverage=coverage,
    )


def output_tps(cell: Cell) -> float:
    """Output tokens per second."""
    return cell.output_tps


def ttft_p50(cell: Cell) -> float:
    """Median time to first token, ms."""
    return cell.ttft_p50


def median_of(
    cells: Iterable[Cell], system: str, clients: int, of: Callable[[Cell], float]
) -> float:
    """The median over the rounds; NaN without any."""
    chosen = [of(cell) for cell in cells if cell.system == system and cell.clients == clients]
    return percentile([value for value in chosen if not math.isnan(value)], 0.5)


def best_peer(
    cells: Sequence[Cell],
    peers: Iterable[str],
    clients: int,
    of: Callable[[Cell], float],
    *,
    largest: bool,
) -> str | None:
    """The peer with the best median at a level."""
    medians = {peer: median_of(cells, peer, clients, of) for peer in peers}
    known = {peer: value for peer, value in medians.items() if not math.isnan(value)}
    if not known:
        return None
    return (max if largest else min)(known, key=lambda peer: known[peer])


def all_ratios(cells: Sequence[Cell], ours: Sequence[str], peers: Sequence[str]) -> list[Ratio]:
    """Output tokens per second and TTFT p50 of each of ours against each peer, at each level."""
    levels = sorted({cell.clients for cell in cells})
    measures = (("output tok/s", output_tps), ("TTFT p50", ttft_p50))
    found = [
        ratio(cells, name, level, mine, peer, of)
        for mine in ours
        for name, of in measures
        for level in levels
        for peer in peers
    ]
    return [one for one in found if one is not None]


def owed_rows(cells: Sequence[Cell], ours: str, peers: Sequence[str]) -> list[Row]:
    """The lines that have to be shown, as far as there are cells for them."""
    rows = []
    for level in sorted({cell.clients for cell in cells}):
        best = best_peer(cells, peers, level, output_tps, largest=True)
        if best is None:
            continue
        owed = 0.9 if level == 1 else 1.0
        found = ratio(cells, "output tok/s", level, ours, best, output_tps)
        if found is not None:
            text = f"output tokens/s at {_clients(level)} over the best peer ({best})"
            rows.append(Row(text=text, ratio=found, owed=owed))
        if level != 32:
            continue
        found = ratio(cells, "output tok/s", level, ours, TRANSFORMERS, output_tps)
        if found is not None:
            text = f"output tokens/s at {_clients(level)} over transformers serve"
            rows.append(Row(text=text, ratio=found, owed=OWED_OF_TRANSFORMERS))
        quickest = best_peer(cells, peers, level, ttft_p50, largest=False)
        if quickest is not None:
            found = ratio(cells, "TTFT p50", level, ours, quickest, ttft_p50)
            if found is not None:
                text = f"TTFT p50 at {_clients(level)} over the best peer's ({quickest})"
                rows.append(Row(text=text, ratio=found, owed=1.0, at_least=False))
    return rows


def _clients(level: int) -> str:
    return "1 client" if level == 1 else f"{level} clients"
