"""Ratios: one preset against another, seed by seed, and what several seeds say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard deviation over the seeds."""

    value: float
    spread: float
    seeds: int

    def told(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} ± {self.spread:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Of one figure over the seeds."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return Mean(fmean(values), spread, len(values))


def ratio_of(values: Sequence[float], base: Sequence[float]) -> Mean:
    """Of the means, as a wait of 10 s counts ten times one of 1 s; spread: that of the seeds' own
    ratios."""
    each = [value / max(other, 1e-9) for value, other in zip(values, base, strict=True)]
    spread = stdev(each) if len(each) > 1 else 0.0
    return Mean(fmean(values) / max(fmean(base), 1e-9), spread, len(each))
