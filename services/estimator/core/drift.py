"""Drift: how alike are two windows of output lengths? What was measured must still be so.

Predictions from a window hold if the next window looks like it. The measure is the cosine of two
histograms (50 bins up to the 99.9th percentile), the one by which Past-Future's premise was checked
on traces: 0.95 to 0.99 between neighbours of 200 to 1000 requests, 0.3 to 0.5 between the most
distant ones of a chat trace.
"""

from collections.abc import Sequence
from math import sqrt

BINS = 50
TOP_SHARE = 0.999
REQUESTS_MIN = 200
"""In each window; fewer make histograms that differ by chance alone."""


def similarity(older: Sequence[int], newer: Sequence[int]) -> float | None:
    """1 for equal shapes, 0 for lengths that never coincide; None for too few requests."""
    if min(len(older), len(newer)) < REQUESTS_MIN:
        return None
    ordered = sorted((*older, *newer))
    top = ordered[min(len(ordered) - 1, int(TOP_SHARE * len(ordered)))]
    a, b = _histogram(older, top), _histogram(newer, top)
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _histogram(lengths: Sequence[int], top: int) -> list[int]:
    counts = [0] * BINS
    for length in lengths:
        counts[min(BINS - 1, length * BINS // max(1, top))] += 1
    return counts
