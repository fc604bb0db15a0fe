"""The report as a table for a terminal, one column per run."""

from collections.abc import Callable, Sequence

from rich.table import Table

from sim.report import Report, Spread


def report_table(reports: Sequence[Report]) -> Table:
    """Rows are measures with their units, columns are runs."""
    table = Table(title=reports[0].workload if reports else None)
    table.add_column("measure")
    for report in reports:
        table.add_column(report.policy, justify="right")
    for label, cell in _ROWS:
        cells = [cell(report) for report in reports]
        if any(text != "-" for text in cells):
            table.add_row(label, *cells)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _seconds(times: Spread) -> str:
    if times.mean is None:
        return "-"
    parts = (times.mean, times.p50, times.p95, times.p99)
    return " / ".join("-" if part is None else short(part) for part in parts)


def short(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


_ROWS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("requests", lambda r: str(r.requests)),
    ("completed / rejected / failed", lambda r: f"{r.completed} / {r.rejected} / {r.failed}"),
    ("duration, s", lambda r: _number(r.duration_s, 1)),
    ("throughput, requests/s", lambda r: _number(r.throughput_rps)),
    ("goodput, requests/s", lambda r: _number(r.goodput_rps) if r.slo else "-"),
    ("share within objectives", lambda r: "-" if r.good_share is None else f"{r.good_share:.2%}"),
    ("offered, requests/s", lambda r: r.notes.get("offered_rps", "-")),
    ("output, tokens/s", lambda r: _number(r.output_tps, 1)),
    ("TTFT, s: mean / p50 / p95 / p99", lambda r: _seconds(r.ttft_s)),
    ("TPOT, s: mean / p50 / p95 / p99", lambda r: _seconds(r.tpot_s)),
    ("longest gap, s: mean / p50 / p95 / p99", lambda r: _seconds(r.max_tpot_s)),
    ("end to end, s: mean / p50 / p95 / p99", lambda r: _seconds(r.e2e_s)),
    ("prompt tokens", lambda r: f"{r.prompt_tokens:,}"),
    ("output tokens", lambda r: f"{r.output_tokens:,}"),
    ("slices per request", lambda r: _number(r.slices_per_request)),
    ("batch size, mean", lambda r: _number(r.batch_size_mean)),
    ("invalid tokens", lambda r: _number(r.invalid_tokens, 0)),
    ("pad tokens", lambda r: _number(r.pad_tokens, 0)),
    ("early returns, share", lambda r: _number(r.early_return_ratio)),
    ("KV in use, mean share", lambda r: _number(r.kv_util_mean)),
    ("evictions", lambda r: _number(r.evictions, 0)),
    ("scheduler CPU, s", lambda r: _number(r.scheduler_cpu_s)),
    ("decisions", lambda r: _number(r.decisions, 0)),
)
