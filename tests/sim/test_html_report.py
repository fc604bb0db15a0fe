"""The HTML report: what it shows is what the runs say, in one file that needs nothing else."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from sim.html_charts import COLOURS, cumulative
from sim.html_report import Heading, NoPlotly, html_page, plotly_script, write_html
from sim.metrics import METRICS
from sim.report import Report
from sim.runs import Run
from tests.sim.finished_runs import WORKERS, toy_run

FIGURE = re.compile(r"<script type='application/json'>(.*?)</script>", re.DOTALL)
HEADING = Heading("Toys", (("workload", "toy <b>"),))


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [
        toy_run(name, rate, seed)
        for name in ("slow", "fast")
        for rate in (4.0, 16.0)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def page(runs: list[Run]) -> str:
    return html_page(runs, HEADING, "/* plotly.js */")


def figures(page: str) -> list[dict[str, Any]]:
    """All figures of a page."""
    return [json.loads(found.replace("<\\/", "</")) for found in FIGURE.findall(page)]


def titles(page: str) -> list[str]:
    """All headings of figures."""
    return [html.unescape(found) for found in re.findall(r"<h3>(.*?)</h3>", page)]


def test_the_file_holds_plotly_once_and_asks_for_nothing_outside(
    runs: list[Run], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "report.html"
    write_html(path, runs[:1], HEADING)
    text = path.read_text(encoding="utf-8")
    script = plotly_script()
    assert text.count(script) == 1
    assert not re.findall(r"(?:src|href)\s*=", text.replace(script, ""))
    assert len(text) - len(script) < 400_000


def test_every_figure_is_one_that_plotly_takes_with_units_on_its_axes(page: str) -> None:
    shown = figures(page)
    assert len(shown) == len(titles(page)) > 20
    for figure in shown:
        built = go.Figure(figure)
        assert built.data
        assert built.layout.xaxis.title.text
        assert built.layout.yaxis.title.text or built.data[0].type in ("heatmap", "bar")


def test_pictures_say_what_they_show_and_in_which_unit(page: str) -> None:
    joined = "\n".join(titles(page))
    for words in ("Time to first token", "Time per output token", "End-to-end", "Longest gap"):
        assert re.search(rf"{words}.*seconds", joined), words
    for words in ("Goodput against the load, requests/s", "Throughput against the load"):
        assert words in joined
    for words in ("KV cache in use", "run and that wait", "Timeline of each worker"):
        assert words in joined


def test_curves_against_the_load_hold_the_reports_figures(runs: list[Run], page: str) -> None:
    goodput = figures(page)[titles(page).index("Goodput against the load, requests/s")]
    slow = next(trace for trace in goodput["data"] if trace["name"] == "slow")
    assert slow["x"] == [4.0, 16.0]
    own = [r.report.goodput_rps for r in runs if r.policy == "slow" and r.load.value == 16.0]
    assert slow["y"][1] == pytest.approx(sum(own) / 2, rel=1e-4)
    assert slow["y"][1] + slow["error_y"]["array"][1] == pytest.approx(max(own), rel=1e-4)


def test_a_policy_has_the_same_line_in_all_pictures(page: str) -> None:
    colours = {
        trace["line"]["color"]
        for figure in figures(page)
        for trace in figure["data"]
        if trace.get("name") == "fast"
    }
    assert colours == {COLOURS[1]}


def test_a_distribution_counts_those_who_never_got_there() -> None:
    x, y = cumulative([3.0, 1.0, 2.0, 0.0], of=8)
    assert x == [1e-4, 1.0, 2.0, 3.0]
    assert y == [12.5, 25.0, 37.5, 50.0]
    x, y = cumulative([float(value) for value in range(10_000)], of=10_000)
    assert len(x) < 500
    assert (x[-1], y[-1]) == (9999.0, 100.0)


def test_timelines_have_a_row_for_each_worker(page: str) -> None:
    timeline = figures(page)[titles(page).index("Timeline of each worker")]
    assert {name for trace in timeline["data"] for name in trace["y"]} == {
        f"worker-{at}" for at in range(WORKERS)
    }


def test_all_metrics_of_the_report_are_explained_and_shown(runs: list[Run], page: str) -> None:
    named = {metric.name.partition(".")[0] for metric in METRICS}
    other = {"policy", "workers", "slo", "workload", "errors", "notes"}
    assert named == set(Report.__struct_fields__) - other
    told = html.unescape(page)
    for metric in METRICS:
        if metric.value(runs[0].report) is not None and metric.meaning:
            assert metric.meaning in told, metric.name


def test_names_cannot_break_the_page(page: str) -> None:
    assert "toy &lt;b&gt;" in page
    odd = html_page([toy_run("</script><b>", 4.0)], HEADING, "")
    assert "</script><b>" not in odd


def test_a_run_without_series_has_no_inside(runs: list[Run]) -> None:
    bench = Run(runs[0].report, runs[0].records)
    page = html_page([bench], HEADING, "")
    assert "Inside the workers" not in page
    assert "Against the load" not in page
    assert "Time to first token (TTFT), seconds" in titles(page)


def test_refusals_are_told(page: str) -> None:
    assert "429: the queue is full" in html_page([toy_run("slow", 60.0, count=1500)], HEADING, "")


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(NoPlotly, match=r"pip install .*plotly"):
        plotly_script()
