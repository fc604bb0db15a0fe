"""SCLS's part of the reproduction: it runs, and its verdicts follow from the results."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from sim.reproduction import scls
from sim.reproduction.scls_fit import FitFigures
from sim.reproduction.scls_runs import LADDER, SEEDS, Figures, Task, tasks as all_tasks
from sim.reproduction.section import Check, Section
from sim.reproduction.svg_chart import Line, bar_chart, line_chart

Results = list[Figures | FitFigures]
Change = Callable[[Figures], Figures]

LADDER_RPS = {"sls": 4.0, "so": 6.0, "pm": 8.0, "ab": 18.0, "lb": 18.5, "scls": 21.0}
LADDER_END_STD_S = {"sls": 30.0, "so": 10.0, "pm": 9.0, "ab": 6.0, "lb": 3.0, "scls": 5.0}


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def quick() -> Results:
    """The part in quick mode."""
    return [scls.run(task, quiet) for task in scls.tasks(quick=True)]


@pytest.fixture(scope="module")
def planted(quick: Results) -> Results:
    """Results that the paper could have had, in the places of the quick ones."""
    made: Results = [r for r in quick if isinstance(r, FitFigures) or r.task.study != "ladder"]
    sample = next(r for r in quick if isinstance(r, Figures) and r.task.policy == "sls")
    for seed in SEEDS:
        for policy in LADDER:
            task = Task("ladder", policy, seed=seed)
            rps, std = LADDER_RPS[policy], LADDER_END_STD_S[policy]
            made.append(
                replace(sample, task=task, rps=rps, end_std_s=std, mean_s=1 / rps, p95_s=2 / rps)
            )
    return made


def check_of(section: Section, start: str) -> Check:
    """The one statement that begins so."""
    (found,) = [check for check in section.checks if check.claim.startswith(start)]
    return found


def changed(results: Sequence[Figures | FitFigures], policy: str, change: Change) -> Results:
    """The results with one policy's ablation runs changed."""
    return [
        change(r)
        if isinstance(r, Figures) and (r.task.study, r.task.policy) == ("ladder", policy)
        else r
        for r in results
    ]


def test_quick_runs_serve_everybody_and_make_a_section(quick: Results) -> None:
    runs = [result for result in quick if isinstance(result, Figures)]
    assert {run.task.policy for run in runs} > set(LADDER)
    assert all(run.completed == run.task.requests for run in runs)
    section = scls.section(quick)
    assert len(section.checks) > 20
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    for _, picture in section.pictures:
        ElementTree.fromstring(picture)


def test_the_serving_time_model_holds_in_quick_mode(quick: Results) -> None:
    section = scls.section(quick)
    fits = [check for check in section.checks if check.claim.startswith("Serving-time model")]
    assert [check.holds for check in fits] == [True, True]


BREAKS = (
    ("Throughput SCLS / SLS", "scls", "rps", 15.9),
    ("Throughput SLS < SO", "pm", "rps", 5.9),
    ("Throughput SLS < SO", "lb", "rps", 17.0),
    ("STD of the workers' completion times, LB", "lb", "end_std_s", 6.1),
    ("STD of the workers' completion times, SCLS", "scls", "end_std_s", 6.1),
    ("Mean and 95 % response", "so", "p95_s", 9.0),
    ("Sliced variants end closer", "so", "end_std_s", 16.0),
    ("LB below AB", "lb", "end_std_s", 7.0),
)


@pytest.mark.parametrize(("claim", "policy", "figure", "value"), BREAKS)
def test_verdicts_follow_the_results(
    planted: Results, claim: str, policy: str, figure: str, value: float
) -> None:
    busy = changed(planted, "lb", lambda run: replace(run, busy_std_s=0.0))
    busy = changed(busy, "ab", lambda run: replace(run, busy_std_s=1.0))
    assert check_of(scls.section(busy), claim).holds is True
    worse = changed(busy, policy, lambda run: replace(run, **{figure: value}))
    assert check_of(scls.section(worse), claim).holds is False


def test_a_bad_fit_is_told(planted: Results) -> None:
    def spoil(result: Figures | FitFigures) -> Figures | FitFigures:
        if not isinstance(result, FitFigures):
            return result
        return replace(result, errors=tuple(replace(e, p95=0.11) for e in result.errors))

    section = scls.section([spoil(result) for result in planted])
    fits = [check for check in section.checks if check.claim.startswith("Serving-time model")]
    assert [check.holds for check in fits] == [False, False]


def test_policies_are_compared_on_equal_requests() -> None:
    ladder = [task for task in all_tasks(quick=False) if task.study == "ladder"]
    assert len(ladder) == len(LADDER) * len(SEEDS)
    assert {(t.requests, t.rate, t.workers) for t in ladder} == {(10_000, 60.0, 8)}


def test_charts_put_values_where_they_belong() -> None:
    chart = line_chart("t", "x", "y", [Line("a", [(1, 0), (10, 5), (100, 10)])])
    root = ElementTree.fromstring(chart)
    line = next(e for e in root.iter() if e.tag.endswith("polyline"))
    points = [p.split(",") for p in line.attrib["points"].split()]
    xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    bars = ElementTree.fromstring(bar_chart("t", "y", ["g", "h"], [("s", [1.0, 2.0])]))
    heights = [
        float(e.attrib["height"])
        for e in bars.iter()
        if e.tag.endswith("rect") and e.attrib.get("fill") == "#1f6fb2"
    ][:2]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
