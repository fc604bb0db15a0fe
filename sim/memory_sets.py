"""The sets of lengths for memory-only runs: requests, memory, and predictions where there are any.

Those of the notes on `tranche`: the four of the Past-Future table, Azure conversations, ShareGPT
with a real predictor's outputs, and two mixes. A seed draws what is drawn: uniform lengths, the
order of ShareGPT-o1 (seed 0: the file's), where in a longer file to begin, and who of a mix comes.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sim.memory_only import CAPACITY_TOKENS, Lengths
from sim.past_future_source import FILE_SET, REQUESTS, UNIFORM, requests_of

_WORKLOADS = Path(__file__).parents[1] / "bench" / "workloads"
CONV, CHAT = _WORKLOADS / "azure2023_conv.csv", _WORKLOADS / "sharegpt_predicted.csv"
CONV_CAPACITY_TOKENS = 66_144
"""What a 13B model leaves on a GPU of 80 GB for KV (0.82 MB a token)."""
CHAT_CAPACITY_TOKENS = 24_000
"""So that its short requests fill it: about fifty at a time."""
LONG_SHARE = 0.25
"""Of ShareGPT-o1 in the mix with conversations."""


@dataclass(frozen=True, slots=True)
class MemorySet:
    """What a memory-only run takes."""

    requests: list[Lengths]
    capacity_tokens: int = CAPACITY_TOKENS
    predicted: list[int] | None = None
    """Outputs that a real predictor foretold; None: it has none."""

    def first(self, count: int) -> "MemorySet":
        """Shorter."""
        return self._of(range(min(count, len(self.requests))))

    def long(self, count: int, seed: int) -> "MemorySet":
        """As long as wanted: after its end it begins again, each time in another order."""
        rng, size = np.random.default_rng((seed, 78)), len(self.requests)
        places = list(range(min(count, size)))
        while len(places) < count:
            places += rng.permutation(size)[: count - len(places)].tolist()
        return self._of(places)

    def _of(self, places: Sequence[int]) -> "MemorySet":
        requests = [self.requests[place] for place in places]
        told = self.predicted
        told = [told[place] for place in places] if told is not None else None
        return MemorySet(requests, self.capacity_tokens, told)


def memory_set(name: str, seed: int) -> MemorySet:
    """The set of this name (MEMORY_SETS). Raises KeyError for others."""
    return MEMORY_SETS[name](name, seed)


@cache
def _rows(path: Path) -> list[tuple[int, int, int]]:
    """Prompt, output and predicted output of each row that has an output."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            (int(row["prompt_tokens"]), int(row["output_tokens"]), int(row.get(_TOLD) or 0))
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row[1] > 0]


_TOLD = "predicted_output_tokens"


def _some(path: Path, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """So many in a row from anywhere."""
    rows = _rows(path)
    begin = int(rng.integers(0, len(rows) - REQUESTS))
    return rows[begin : begin + REQUESTS]


def _table(name: str, seed: int) -> MemorySet:
    found = requests_of(name, seed)
    if name == FILE_SET and seed:
        found = [found[place] for place in np.random.default_rng(seed).permutation(len(found))]
    return MemorySet(found)


def _conv(name: str, seed: int) -> MemorySet:
    rows = _some(CONV, np.random.default_rng((seed, 77)))
    return MemorySet([row[:2] for row in rows], CONV_CAPACITY_TOKENS)


def _chat(name: str, seed: int) -> MemorySet:
    rows = _some(CHAT, np.random.default_rng((seed, 77)))
    return MemorySet([row[:2] for row in rows], CHAT_CAPACITY_TOKENS, [row[2] for row in rows])


def _uniforms(name: str, seed: int) -> MemorySet:
    """Half Dist-1, half Dist-3."""
    one, other = requests_of("Dist-1", seed), requests_of("Dist-3", seed)
    which = np.random.default_rng((seed, 77)).random(REQUESTS) < 0.5
    return MemorySet([a if first else b for a, b, first in zip(one, other, which, strict=True)])


def _long_and_short(name: str, seed: int) -> MemorySet:
    """A quarter ShareGPT-o1, the rest conversations."""
    rng = np.random.default_rng((seed, 77))
    long, conv = requests_of(FILE_SET, 0), _some(CONV, rng)
    found = [
        long[int(rng.integers(len(long)))] if rng.random() < LONG_SHARE else row[:2] for row in conv
    ]
    return MemorySet(found)


MEMORY_SETS: dict[str, Callable[[str, int], MemorySet]] = {
    **dict.fromkeys(UNIFORM, _table),
    FILE_SET: _table,
    "Azure conv": _conv,
    "ShareGPT": _chat,
    "Dist-1 + Dist-3": _uniforms,
    "o1 + conv": _long_and_short,
}
