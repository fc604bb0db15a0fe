"""The HTML report: one file with everything in it, that opens offline, on a phone and in print."""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path

from sim.comparison import best_of
from sim.html_charts import Chart, against_load, latency_curves
from sim.html_inside import inside_charts
from sim.html_page import SCRIPT, STYLE
from sim.metrics import METRICS, Metric, averaged, metric_named
from sim.runs import Group, Run, groups_of, loads_of, offered_at

INSIDE_MAX = 40
"""Runs whose inside is shown; each adds about 60 KB to the file."""
GLANCE = {
    "goodput_rps": ("goodput", "requests/s"),
    "good_share": ("within objectives", "share of sent"),
    "throughput_rps": ("throughput", "requests/s"),
    "ttft_s.p50": ("TTFT", "median, s"),
    "ttft_s.p99": ("TTFT", "p99, s"),
    "tpot_s.mean": ("TPOT", "mean, s"),
    "max_tpot_s.p99": ("longest gap", "p99, s"),
    "kv_util_mean": ("KV in use", "mean share"),
    "evictions": ("evictions", "in all"),
}
"""Short headings; the section of all figures has the long ones."""
OBJECTIVES = {
    "ttft": "time to first token (TTFT)",
    "tpot": "mean time per further token (TPOT)",
    "gap": "longest gap between two tokens",
    "e2e": "end-to-end time",
}


class NoPlotly(Exception):
    """plotly is not installed; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands at the top: the title and facts about the set-up."""

    title: str
    facts: tuple[tuple[str, str], ...]


def write_html(path: Path, runs: Sequence[Run], heading: Heading) -> None:
    """Write the report. Raises NoPlotly, and OSError for a file that cannot be written."""
    page = html_page(runs, heading, plotly_script())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def plotly_script() -> str:
    """plotly.js, minified. Raises NoPlotly."""
    try:
        return files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise NoPlotly(
            "--html needs plotly: .venv/bin/pip install -c constraints.txt plotly"
        ) from error


def html_page(runs: Sequence[Run], heading: Heading, script: str) -> str:
    """The whole report as a page; `script` is plotly.js."""
    groups = groups_of(runs)
    page = _Page()
    page.add(f"<h1>{_text(heading.title)}</h1>")
    facts = "".join(f"<dt>{_text(n)}</dt><dd>{_text(v)}</dd>" for n, v in heading.facts)
    page.add(f"<dl class='facts'>{facts}</dl>")
    _glance(page, groups)
    _against_load(page, groups)
    _latencies(page, groups)
    _inside(page, groups)
    _all_metrics(page, groups)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(heading.title)}</title><style>{STYLE}</style>"
        f"<script>{script}</script></head><body><main>{page.body()}</main>"
        f"<script>{SCRIPT}</script></body></html>"
    )


class _Page:
    """The body, piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._numbers = count(1)

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    def body(self) -> str:
        return "\n".join(self._pieces)

    def charts(self, charts: Iterable[Chart]) -> None:
        for chart in charts:
            # A figure in a script element must not end it.
            data = json.dumps(chart.figure, separators=(",", ":")).replace("</", "<\\/")
            self.add(
                f"<figure><figcaption><h3>{_text(chart.title)}</h3><p>{_text(chart.caption)}</p>"
                f"</figcaption><div class='chart' id='chart-{next(self._numbers)}' role='img' "
                f"aria-label='{_text(chart.title)}' "
                f"style='height:{chart.figure['layout']['height']}px'>"
                f"<script type='application/json'>{data}</script></div></figure>"
            )

    def choice(self, label: str, options: Sequence[str], chosen: int) -> None:
        """A list to choose from, if there is a choice; `panel` encloses what each one shows."""
        if len(options) < 2:
            return
        listed = "".join(
            f"<option value='{at}'{' selected' if at == chosen else ''}>{_text(option)}</option>"
            for at, option in enumerate(options)
        )
        self.add(f"<label class='choice'>{_text(label)} <select>{listed}</select></label>")

    def panel(self, at: int, chosen: int, charts: Iterable[Chart]) -> None:
        hidden = "" if at == chosen else " hidden"
        self.add(f"<div class='panel' data-option='{at}'{hidden}>")
        self.charts(charts)
        self.add("</div>")

    def panel_of(self, at: int, chosen: int, table: str) -> None:
        hidden = "" if at == chosen else " hidden"
        self.add(f"<div class='panel' data-option='{at}'{hidden}>{table}</div>")


def _glance(page: _Page, groups: Sequence[Group]) -> None:
    page.add("<section><h2>At a glance</h2>")
    page.add("".join(f"<p>{_text(sentence)}</p>" for sentence in _sentences(groups)))
    metrics = [metric_named(name) for name in GLANCE]
    shown = [m for m in metrics if any(averaged(g.reports, m) for g in groups)]
    names = "".join(
        f"<th>{GLANCE[m.name][0]}<small>{GLANCE[m.name][1]}</small></th>" for m in shown
    )
    page.add("<div class='wide'><table class='glance'><thead><tr><th>policy</th>")
    page.add(f"<th>completed<small>of sent</small></th>{names}</tr></thead>")
    for load in loads_of(groups):
        own = [group for group in groups if group.load.label == load.label]
        page.add(f"<tbody><tr class='load'><th>{_text(load.label)}</th>")
        rate = offered_at(load, groups)
        offered = "" if rate is None else f"{rate:.3g} requests/s offered"
        page.add(f"<td colspan='{len(shown) + 1}'>{offered}</td></tr>")
        for group in own:
            cells = "".join(_cell(group, m, best_of(own, m)) for m in shown)
            page.add(f"<tr><th>{_text(group.policy)}</th><td>{_completed(group)}</td>{cells}</tr>")
        page.add("</tbody>")
    page.add("</table></div></section>")


def _sentences(groups: Sequence[Group]) -> list[str]:
    """What the figures say, in words."""
    lines = []
    metric = metric_named("goodput_rps")
    slo = next((report.slo for group in groups for report in group.reports), {})
    limits = ", ".join(f"{OBJECTIVES[name]} at most {limit:g} s" for name, limit in slo.items())
    if slo:
        lines.append(f"Goodput counts completed requests within every objective: {limits}.")
    else:
        lines.append("No service-level objective was set, so goodput equals throughput.")
    if any(load.kind != "clients" for load in loads_of(groups)):
        lines.append(
            "Goodput and throughput divide by the whole duration, with the drain after the last "
            "arrival: in a short run both lie below the offered rate even if nothing is late."
        )
    for load in loads_of(groups)[-3:]:
        own = [group for group in groups if group.load.label == load.label]
        ranked = sorted(
            ((mean.mean, g.policy) for g in own if (mean := averaged(g.reports, metric))),
            key=lambda pair: -pair[0],
        )
        if len(ranked) > 1:
            (best, first), (_, last) = ranked[0], ranked[-1]
            ratio = f", {best / ranked[-1][0]:.2f} times that of {last}" if ranked[-1][0] else ""
            lines.append(
                f"{load.label}: {first} has the highest goodput, {metric.text(best)} "
                f"requests/s{ratio}."
            )
    lost = sum(report.rejected + report.failed for group in groups for report in group.reports)
    sent = sum(report.requests for group in groups for report in group.reports)
    if lost:
        lines.append(
            f"{lost:,} of {sent:,} requests were refused or failed; latencies are those of the "
            "completed ones, so look at both."
        )
    return lines


def _against_load(page: _Page, groups: Sequence[Group]) -> None:
    if len(loads_of(groups)) < 2:
        return
    page.add("<section><h2>Against the load</h2>")
    if any(report.slo for group in groups for report in group.reports):
        title = "Share within the objectives against the load"
        caption = "Of all requests that were sent; it does not depend on the drain."
        page.charts((against_load(groups, "good_share", "share of requests", title, caption),))
    page.charts(
        (
            against_load(
                groups,
                "goodput_rps",
                "requests/s",
                "Goodput against the load, requests/s",
                "Requests a second that were completed within the objectives. A policy is good for "
                "as long as its line stays near what is offered; the drain after the last arrival "
                "counts, so in short runs it lies somewhat below.",
            ),
            against_load(
                groups,
                "throughput_rps",
                "requests/s",
                "Throughput against the load, requests/s",
                "All completed requests a second, in time or not. Where a line turns flat the "
                "workers can do no more.",
            ),
            against_load(
                groups,
                "ttft_s.p99",
                "seconds",
                "TTFT against the load, 99th percentile, seconds",
                "Ninety-nine of a hundred completed requests had their first token within this.",
            ),
            against_load(
                groups,
                "tpot_s.mean",
                "seconds",
                "TPOT against the load, mean, seconds",
                "How fast answers are written, once they have begun.",
            ),
        )
    )
    page.add("</section>")


def _latencies(page: _Page, groups: Sequence[Group]) -> None:
    if not any(run.records for group in groups for run in group.runs):
        return
    loads = loads_of(groups)
    page.add("<section class='choosing'><h2>Latencies</h2>")
    page.choice("Load:", [load.label for load in loads], len(loads) - 1)
    for at, load in enumerate(loads):
        page.panel(at, len(loads) - 1, latency_curves(groups, load))
    page.add("</section>")


def _inside(page: _Page, groups: Sequence[Group]) -> None:
    """The first seed of each group; the heaviest load first, for there policies differ."""
    seen = [
        (run, run.series)
        for load in reversed(loads_of(groups))
        for group in groups
        if group.load.label == load.label
        for run in group.runs[:1]
        if run.series is not None
    ]
    if not seen:
        return
    page.add("<section class='choosing'><h2>Inside the workers</h2>")
    page.add("<p>One run at a time: choose which.</p>" if len(seen) > 1 else "")
    options = [f"{run.policy}, {run.load.label}, seed {run.seed}" for run, _ in seen[:INSIDE_MAX]]
    page.choice("Run:", options, 0)
    for at, (_, series) in enumerate(seen[:INSIDE_MAX]):
        page.panel(at, 0, inside_charts(series))
    if len(seen) > INSIDE_MAX:
        page.add(f"<p>{len(seen) - INSIDE_MAX} more runs are left out, for the file's size.</p>")
    page.add("</section>")


def _all_metrics(page: _Page, groups: Sequence[Group]) -> None:
    page.add("<section class='choosing'><h2>All figures</h2>")
    if max((len(group.runs) for group in groups), default=1) > 1:
        page.add("<p>Means over the seeds, with the smallest and the largest below.</p>")
    loads = loads_of(groups)
    page.choice("Load:", [load.label for load in loads], len(loads) - 1)
    for at, load in enumerate(loads):
        own = [group for group in groups if group.load.label == load.label]
        page.panel_of(at, len(loads) - 1, _metrics_table(own))
    page.add("</section>")
    _troubles(page, groups)


def _metrics_table(groups: Sequence[Group]) -> str:
    """A row for each metric that anybody knows, a column for each policy."""
    heads = "".join(f"<th>{_text(group.policy)}</th>" for group in groups)
    rows = []
    for metric in METRICS:
        if not any(averaged(group.reports, metric) for group in groups):
            continue
        label = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
        kind = ""
        if "." in metric.name and not metric.meaning:
            kind, label = " class='part'", f"{metric.label.partition(', ')[2]}, {metric.unit}"
        meaning = f"<small>{_text(metric.meaning)}</small>" if metric.meaning else ""
        cells = "".join(_cell(group, metric, best_of(groups, metric)) for group in groups)
        rows.append(f"<tr{kind}><th>{_text(label)}{meaning}</th>{cells}</tr>")
    return (
        f"<div class='wide'><table class='all'><thead><tr><th>figure</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _troubles(page: _Page, groups: Sequence[Group]) -> None:
    """Why requests were not completed."""
    rows = [
        f"<tr><td>{_text(group.policy)}, {_text(group.load.label)}</td><td>{number:,}</td>"
        f"<td class='words'>{_text(cause)}</td></tr>"
        for group in groups
        for report in group.reports[:1]
        for cause, number in sorted(report.errors.items(), key=lambda pair: -pair[1])[:5]
    ]
    if rows:
        page.add("<section><h2>Why requests were not completed</h2><div class='wide'><table>")
        page.add("<thead><tr><th>run</th><th>requests</th><th>cause</th></tr></thead><tbody>")
        page.add("".join(rows) + "</tbody></table></div></section>")


def _cell(group: Group, metric: Metric, best: float | None) -> str:
    value = averaged(group.reports, metric)
    if value is None:
        return "<td>-</td>"
    text = metric.text(value.mean)
    if best is not None and value.mean == best:
        text = f"<b>{text}</b>"
    if len(group.runs) > 1 and value.low != value.high:
        text += f"<small>{metric.text(value.low)} to {metric.text(value.high)}</small>"
    return f"<td>{text}</td>"


def _completed(group: Group) -> str:
    reports = group.reports
    return f"{sum(r.completed for r in reports):,} / {sum(r.requests for r in reports):,}"


def _text(words: str) -> str:
    return html.escape(words, quote=True)
