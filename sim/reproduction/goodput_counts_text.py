"""The words and tables of the part on plain counts."""

from sim.reproduction.goodput_claims import ENOUGH
from sim.reproduction.goodput_counts_claims import surely_low
from sim.reproduction.goodput_estimates import Estimates
from sim.reproduction.section import Table

TEXT = f"""\
The part before measures goodput by work, which we came to on the way. Here is the plain
count of requests within the SLA per second, on the same grid of four length sets and seven numbers
of clients, with the same server, limits and one Past-Future setting. Past-Future is compared with
the best of five baselines; conservative 100 % and 12,000 are left out, since they are nowhere ahead
of the others in the grid. Every run counts twice as many requests as the grid's (120 to 320, after
the same warm-up), with two seeds: four times as many. The seeds draw other requests of the three
synthetic sets, and other orders of ShareGPT-o1's.

**The noise.** Each run's time is cut into five equal parts, and the standard error of a rate is
that of the mean of all ten parts' rates. Parts of a run are not quite independent: long requests
that end just after one part make the next one's count larger, so this is rather too large than too
small. The error of a ratio takes both rates as independent. What the two seeds differ by says the
same thing in another way; that it is smaller was seen afterwards, and the second statement is also
shown with it.

**The rules** were fixed before these runs were made: the first statement asks whether every ratio
is at least {ENOUGH}, as it comes; the second whether any is below that by more than two standard
errors.
"""


def ratios_table(estimates: Estimates) -> Table:
    """All points."""
    return Table(
        title="Past-Future over the best baseline: requests within the SLA per second",
        columns=(
            "lengths",
            "clients",
            "Past-Future",
            "best baseline",
            "its rate",
            "ratio",
            f"below {ENOUGH}",
        ),
        rows=tuple(
            (
                point.lengths,
                str(point.clients),
                f"{point.ours.rps:.4f}",
                point.best,
                f"{point.theirs.rps:.4f}",
                f"{point.ratio:.3f} +- {point.error:.3f}",
                ("by more than chance" if surely_low(point) else "within the noise")
                if point.ratio < ENOUGH
                else "",
            )
            for point in estimates.points
        ),
        note="+- one standard error.",
    )


def rates_table(estimates: Estimates, lengths: str) -> Table:
    """One length set: every policy at every number of clients."""
    rows = []
    for policy in estimates.policies:
        cells = []
        for clients in estimates.clients:
            cell = estimates.at(lengths, clients, policy)
            late = f", {cell.late} late" if cell.late else ""
            cells.append(f"{cell.rps:.4f} +- {cell.error:.4f}{late}")
        rows.append((policy, *cells))
    return Table(
        title=f"Requests within the SLA per second on {lengths}, plain counts",
        columns=("policy", *(f"N = {clients}" for clients in estimates.clients)),
        rows=tuple(rows),
        note="+- one standard error; late: how many of the requests that ended missed the SLA.",
    )
