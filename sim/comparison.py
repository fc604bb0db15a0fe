"""The comparison: several runs as one table for a terminal, a row for each policy and load."""

from collections.abc import Sequence

from rich.table import Table

from sim.metrics import Metric, averaged, metric_named
from sim.runs import Group, loads_of

COLUMNS = (
    ("goodput_rps", "goodput\nrequests/s"),
    ("throughput_rps", "throughput\nrequests/s"),
    ("output_tps", "output\ntokens/s"),
    ("ttft_s.mean", "TTFT mean\ns"),
    ("ttft_s.p99", "TTFT p99\ns"),
    ("tpot_s.mean", "TPOT mean\ns"),
    ("max_tpot_s.p99", "longest gap\np99, s"),
    ("e2e_s.mean", "end to end\nmean, s"),
    ("kv_util_mean", "KV in use\nmean share"),
    ("evictions", "evictions"),
)


def comparison_table(groups: Sequence[Group], title: str) -> Table:
    """Rows are policies, by load from light to heavy; figures are means over the seeds, with the
    range of goodput. The best of a load is bold."""
    seeds = max((len(group.runs) for group in groups), default=1)
    table = Table(title=title, caption=f"means over {seeds} seeds" if seeds > 1 else None)
    table.add_column("load")
    table.add_column("policy")
    table.add_column("completed\nof sent", justify="right")
    for _, heading in COLUMNS:
        table.add_column(heading, justify="right")
    for load in loads_of(groups):
        rows = [group for group in groups if group.load.label == load.label]
        best = {name: best_of(rows, metric_named(name)) for name, _ in COLUMNS}
        for at, group in enumerate(rows):
            cells = [_cell(group, metric_named(name), best[name]) for name, _ in COLUMNS]
            label = load.label if at == 0 else ""
            end = at == len(rows) - 1
            table.add_row(label, group.policy, _completed(group), *cells, end_section=end)
    return table


def best_of(groups: Sequence[Group], metric: Metric) -> float | None:
    """The best mean among these policies; None if there is nothing to compare."""
    found = [mean.mean for group in groups if (mean := averaged(group.reports, metric))]
    if len(found) < 2 or not metric.better or min(found) == max(found):
        return None
    return max(found) if metric.better == "higher" else min(found)


def _completed(group: Group) -> str:
    reports = group.reports
    return f"{sum(r.completed for r in reports):,}/{sum(r.requests for r in reports):,}"


def _cell(group: Group, metric: Metric, best: float | None) -> str:
    value = averaged(group.reports, metric)
    if value is None:
        return "-"
    text = metric.text(value.mean)
    if metric.name == "goodput_rps" and len(group.runs) > 1:
        text = f"{text} ({metric.text(value.low)}-{metric.text(value.high)})"
    return f"[bold green]{text}[/]" if best is not None and value.mean == best else text
