"""How alike neighbouring windows of output lengths are: Past-Future's premise, on two traces."""

from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.tables import load_items

WORKLOADS = Path(__file__).parents[2] / "bench" / "workloads"
TRACES = {"conversation": "azure2023_conv.csv", "code": "azure2023_code.csv"}
BINS = 50
CAP_PERCENTILE = 99.9

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LikenessTask:
    """One trace, cut into windows of so many requests."""

    trace: str
    window: int


@dataclass(frozen=True, slots=True)
class Likeness:
    """Of the windows of one trace. Cosine: 1 is alike; KS: 0 is."""

    adjacent_mean: float
    adjacent_min: float
    all_mean: float
    all_min: float
    ks_mean: float
    ks_max: float


@dataclass(frozen=True, slots=True)
class WindowLikeness:
    """One row."""

    task: LikenessTask
    value: Likeness


def of_window(task: LikenessTask) -> WindowLikeness:
    """Read and compare."""
    return WindowLikeness(task, likeness(outputs_of(task.trace), task.window))


def outputs_of(trace: str) -> Ints:
    """Output lengths in order of arrival."""
    items = load_items(WORKLOADS / TRACES[trace])
    return np.array([item.output_tokens for item in items], dtype=np.int64)


def likeness(lengths: Ints, window: int) -> Likeness:
    """Whole windows of `window` requests one after the other: cosine of 50-bin histograms up to
    the 99.9th percentile, and the largest distance of their distributions."""
    top = float(np.percentile(lengths, CAP_PERCENTILE))
    count = len(lengths) // window
    windows = [np.minimum(lengths[i * window : (i + 1) * window], top) for i in range(count)]
    edges = np.linspace(0.0, top, BINS + 1)
    shapes = [_unit(np.histogram(part, bins=edges)[0].astype(np.float64)) for part in windows]
    adjacent = [float(a @ b) for a, b in pairwise(shapes)]
    everyone = [float(a @ b) for a, b in combinations(shapes, 2)]
    distances = [ks_distance(a, b) for a, b in pairwise(windows)]
    return Likeness(
        adjacent_mean=float(np.mean(adjacent)),
        adjacent_min=min(adjacent),
        all_mean=float(np.mean(everyone)),
        all_min=min(everyone),
        ks_mean=float(np.mean(distances)),
        ks_max=max(distances),
    )


def _unit(counts: Floats) -> Floats:
    unit: Floats = counts / np.linalg.norm(counts)
    return unit


def ks_distance(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """The largest difference of the two empirical distribution functions."""
    points = np.concatenate((one, other))
    first = np.searchsorted(np.sort(one), points, side="right") / len(one)
    second = np.searchsorted(np.sort(other), points, side="right") / len(other)
    return float(np.abs(first - second).max())
