"""What plain counts say of Past-Future: strictly, and within what the runs can tell."""

from statistics import median

from sim.reproduction.goodput_claims import ENOUGH
from sim.reproduction.goodput_estimates import Estimates, Point, error_by_seeds, mean_ratio
from sim.reproduction.section import Check

SURE = 2.0
"""Standard errors."""


def claims(estimates: Estimates) -> tuple[Check, ...]:
    """The rules were fixed before the runs were made."""
    low = [point for point in estimates.points if point.ratio < ENOUGH]
    surely = [point for point in low if surely_low(point)]
    return (
        _strictly(estimates, low, surely),
        _within_noise(estimates, surely),
        _how_noisy(estimates),
    )


def surely_low(point: Point) -> bool:
    """Whether the ratio is too small by more than chance."""
    return point.ratio + SURE * point.error < ENOUGH


def _strictly(estimates: Estimates, low: list[Point], surely: list[Point]) -> Check:
    least = min(estimates.points, key=lambda point: point.ratio)
    count = len(estimates.points)
    return Check(
        claim="By plain counts, one Past-Future setting is near or above the best baseline at "
        "every number of clients on every length set",
        source="ours",
        wanted=f">= {ENOUGH}x of the best baseline at all {count} points",
        got=f"least {said(least)}; below {ENOUGH} at {len(low)} of {count}, of which "
        f"{len(low) - len(surely)} by no more than {SURE:.0f} standard errors",
        holds=not low,
        why="; ".join(map(said, low)),
    )


def _within_noise(estimates: Estimates, surely: list[Point]) -> Check:
    points, count = estimates.points, len(estimates.points)
    needed = ENOUGH / (1 + SURE * median(p.error / p.ratio for p in points))
    also, by_seeds = "", error_by_seeds(points)
    if by_seeds is not None:
        smaller = sum(p.ratio * (1 + SURE * by_seeds) < ENOUGH for p in points)
        also = (
            f"; with the error by seeds, {100 * by_seeds:.1f} %, {smaller}, and there a ratio "
            f"below {ENOUGH / (1 + SURE * by_seeds):.2f} would be needed"
        )
    return Check(
        claim=f"The same, but for what chance explains: no point is below {ENOUGH}x by more than "
        f"{SURE:.0f} standard errors of the ratio",
        source="ours",
        wanted=f"none of {count} points",
        got=f"{len(surely)} of {count} (at most points a ratio below {needed:.2f} would be needed)"
        f"{also}",
        holds=not surely,
        why="; ".join(map(said, surely)),
    )


def _how_noisy(estimates: Estimates) -> Check:
    """What the runs can tell, and whether parts of a run and seeds agree on it."""
    points = estimates.points
    mean, error = mean_ratio(points)
    by_seeds = error_by_seeds(points)
    of_seeds = "not known" if by_seeds is None else f"{100 * by_seeds:.1f} % (root mean square)"
    above = sum(point.ratio >= 1 for point in points)
    return Check(
        claim="The mean of these ratios, and the standard error of one",
        source="ours",
        wanted="reported",
        got=f"mean {mean:.3f}x +- {error:.3f}, {above} of {len(points)} at 1 or above; standard "
        f"error of a ratio {100 * median(p.error for p in points):.1f} % in the middle, "
        f"{100 * max(p.error for p in points):.1f} % at most; by the difference of two seeds "
        f"instead: {of_seeds}",
        holds=None,
        why="the best of several baselines is also the luckiest of those that are close, which "
        "makes the mean a little too small",
    )


def said(point: Point) -> str:
    """`0.951x +- 0.020 (Dist-1, N = 40, against aggressive 90 %)`."""
    return f"{point.ratio:.3f}x +- {point.error:.3f} ({point.where}, against {point.best})"
