"""The table of many runs: rows in order, means over seeds, the best of each load."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from sim.comparison import best_of, comparison_table
from sim.metrics import averaged, metric_named
from sim.report import summarise
from sim.runs import Load, Run, groups_of, loads_of, offered_at
from sim.slo import Slo
from tests.sim.finished_runs import toy_run


def shown(runs: list[Run], width: int) -> str:
    """The table as text."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(groups_of(runs), "toy", width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 200])
def test_rows_go_from_light_to_heavy_load_with_all_policies(width: int) -> None:
    long = "trtllm-max-utilization"
    runs = [toy_run(name, rate) for rate in (60.0, 4.0) for name in ("slow", long)]
    text = shown(runs, width)
    names = ("4 requests/s", "60 requests/s", "slow", long)
    rows = [line.strip() for line in text.splitlines()]
    firsts = [next(n for n in names if row.startswith(n)) for row in rows if row.startswith(names)]
    assert firsts == ["4 requests/s", "slow", long, "60 requests/s", "slow", long]
    assert "tions" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_figures_are_means_over_the_seeds() -> None:
    runs = [toy_run("slow", 8.0, seed) for seed in (0, 1, 2)]
    (group,) = groups_of(runs)
    mean = averaged(group.reports, metric_named("goodput_rps"))
    assert mean is not None
    values = [run.report.goodput_rps for run in runs]
    assert (mean.low, mean.high) == (min(values), max(values))
    text = shown(runs, 200)
    assert f"{sum(values) / 3:.2f}" in text
    assert "means over 3 seeds" in text


def test_the_share_within_the_objectives_is_of_all_that_were_sent() -> None:
    run = toy_run("slow", 60.0, count=1500)
    slo = Slo(**run.report.slo)
    good = sum(
        record.outcome == "completed"
        and slo.met(record.ttft_s, record.tpot_s, record.gap_max_s, record.e2e_s)
        for record in run.records
    )
    assert run.report.good_share == good / 1500
    text = shown([run], 80)
    assert f"{good / 1500:.1%}" in text
    assert "offered: 60 req/s" in text
    aimless = summarise(run.records, policy="p", workers=1, slo=Slo())
    assert aimless.good_share is None


def test_what_was_offered_is_a_mean_over_the_seeds() -> None:
    runs = [
        replace(toy_run("slow", 4.0, seed), load=Load("rate", 4.0, offered))
        for seed, offered in enumerate((3.0, 4.5))
    ]
    assert offered_at(Load("rate", 4.0), groups_of(runs)) == 3.75
    assert offered_at(Load("clients", 4.0), groups_of(runs)) is None
    assert "offered: 3.75 req/s" in shown(runs, 80)


def test_lost_requests_are_told() -> None:
    run = toy_run("slow", 60.0, count=1500)
    lost = run.report.rejected / 1500
    assert lost > 0
    assert f"{lost:.1%}" in shown([run], 80)


def test_the_best_is_the_highest_or_the_lowest_as_the_metric_says() -> None:
    groups = groups_of([toy_run("slow", 12.0), toy_run("fast", 12.0)])
    for name, best in (("goodput_rps", max), ("ttft_s.mean", min)):
        metric = metric_named(name)
        values = [metric.value(group.reports[0]) or 0.0 for group in groups]
        assert best_of(groups, metric) == best(values)
    assert best_of(groups, metric_named("requests")) is None
    assert best_of(groups[:1], metric_named("goodput_rps")) is None


def test_loads_have_names_and_places_on_an_axis() -> None:
    loads = [
        Load("rate", 5.0, 4.9),
        Load("rate-scale", 2.0, 11.06),
        Load("clients", 40.0),
        Load(offered_rps=5.53),
    ]
    assert [load.label for load in loads] == [
        "5 requests/s",
        "2 x recorded speed (11.1 requests/s)",
        "40 clients",
        "recorded arrivals (5.53 requests/s)",
    ]
    assert [load.position for load in loads] == [5.0, 11.06, 40.0, 5.53]
    runs = [Run(toy_run("slow", 4.0).report, load=load) for load in loads[:3]]
    assert [load.position for load in loads_of(groups_of(runs))] == [5.0, 11.06, 40.0]
