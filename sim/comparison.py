"""The comparison: several runs as one table for a terminal, a row for each policy and load."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from sim.metrics import Metric, averaged, metric_named
from sim.report_table import short
from sim.runs import Group, loads_of, offered_at

WIDE = 110
"""Columns of characters from which all figures find room."""
COLUMNS = (
    ("goodput_rps", "good\nreq/s", True),
    ("good_share", "in\nSLO", True),
    ("throughput_rps", "done\nreq/s", True),
    ("output_tps", "output\ntok/s", False),
    ("ttft_s.mean", "TTFT\nmean s", True),
    ("ttft_s.p99", "TTFT\np99 s", True),
    ("tpot_s.mean", "TPOT\nmean s", True),
    ("max_tpot_s.p99", "gap\np99 s", True),
    ("e2e_s.mean", "end to end\nmean s", False),
    ("kv_util_mean", "KV used\nmean", False),
    ("evictions", "evic-\ntions", True),
)
"""Metric, heading, and whether a narrow terminal shows it too."""


def comparison_table(groups: Sequence[Group], title: str, width: int = WIDE) -> Table:
    """Rows are policies, by load from light to heavy; figures are means over the seeds. The best
    of a load is bold."""
    seeds = max((len(group.runs) for group in groups), default=1)
    shown = [
        (name, heading)
        for name, heading, narrow in COLUMNS
        if (narrow or width >= WIDE)
        and (name != "good_share" or any(report.slo for g in groups for report in g.reports))
    ]
    table = Table(
        title=title,
        caption=_caption(groups, seeds),
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    lossy = any(_lost(group) for group in groups)
    table.add_column("policy", min_width=max(len(group.policy) for group in groups) + 1)
    if lossy:
        table.add_column("lost", justify="right", no_wrap=True)
    for _, heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for load in loads_of(groups):
        rows = [group for group in groups if group.load.label == load.label]
        table.add_row(f"[bold]{load.label}[/]")
        best = {name: best_of(rows, metric_named(name)) for name, _ in shown}
        for at, group in enumerate(rows):
            cells = [_cell(group, metric_named(name), best[name]) for name, _ in shown]
            end = at == len(rows) - 1
            lost = [_lost(group) or "0"] if lossy else []
            table.add_row(f" {group.policy}", *lost, *cells, end_section=end)
    return table


def best_of(groups: Sequence[Group], metric: Metric) -> float | None:
    """The best mean among these policies; None if there is nothing to compare."""
    found = [mean.mean for group in groups if (mean := averaged(group.reports, metric))]
    if len(found) < 2 or not metric.better or min(found) == max(found):
        return None
    return max(found) if metric.better == "higher" else min(found)


def _caption(groups: Sequence[Group], seeds: int) -> str | None:
    lines = [f"means over {seeds} seeds"] if seeds > 1 else []
    found = (offered_at(load, groups) for load in loads_of(groups))
    rates = [rate for rate in found if rate is not None]
    if rates:
        told = ", ".join(f"{rate:.3g}" for rate in rates)
        lines += [f"offered: {told} req/s", "(good and done count the drain at the end too)"]
    return "\n".join(lines) or None


def _lost(group: Group) -> str:
    lost = sum(report.rejected + report.failed for report in group.reports)
    sent = sum(report.requests for report in group.reports)
    return f"{lost / sent:.1%}" if lost else ""


def _cell(group: Group, metric: Metric, best: float | None) -> str:
    value = averaged(group.reports, metric)
    if value is None:
        return "-"
    text = metric.text(value.mean) if metric.digits == 0 else short(value.mean)
    if metric.unit == "share":
        text = f"{value.mean:.1%}"
    return f"[bold green]{text}[/]" if best is not None and value.mean == best else text
