"""The survey part: its bound, small runs, and statements that fail when they should."""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from xml.etree import ElementTree

import pytest

from services.scheduler.core.presets import preset_named
from shared.profiles import load_profile
from sim.items import Item
from sim.reproduction import survey
from sim.reproduction.section import Check
from sim.reproduction.survey_claims import checks
from sim.reproduction.survey_load import (
    CONV,
    DEC,
    PROFILE,
    bound_of,
    fluid_bound,
    workload_of,
)
from sim.reproduction.survey_predictions import Prediction, predictions
from sim.reproduction.survey_results import Results
from sim.reproduction.survey_rows import (
    FCFS,
    LEAST_REQUESTS,
    MAX_UTILIZATION,
    NO_EVICT,
    OWN,
    PAIR,
    SAL,
    SPF,
)
from sim.reproduction.survey_runs import Figures, Task, run


def nothing(done: int, total: int) -> None:
    """Nobody watches."""


# ----------------------------------------------------------------------------------------- load


@pytest.mark.parametrize(("trace", "rps"), [(CONV, 2.60), (DEC, 2.40)])
def test_the_bounds_are_the_notes(trace: str, rps: float) -> None:
    assert bound_of(trace, 3_000, 1).rps == pytest.approx(rps, rel=0.06)


def test_the_bound_is_what_a_full_batch_and_its_prefills_take() -> None:
    profile = load_profile(PROFILE)
    bound = fluid_bound([Item(None, 512, 512)], profile)
    assert bound.batch == pytest.approx(profile.kv_tokens / 768)
    step_s = profile.iteration_s([], 86, profile.kv_tokens)
    both_s = profile.iteration_s([(512, 0)], 86, profile.kv_tokens)
    assert 1 / bound.rps == pytest.approx(both_s - step_s + 512 * step_s / bound.batch)
    assert bound.tps == pytest.approx(512 * bound.rps)


def test_a_load_is_a_share_of_all_workers_bounds() -> None:
    workload = workload_of(DEC, 400, 1, 0.5, 4, None)
    rate = 399 / (workload.items[-1].arrival_s or 0.0)
    assert rate == pytest.approx(0.5 * 4 * bound_of(DEC, 400, 1).rps, rel=0.15)
    items = workload_of(DEC, 3_000, 1, 0.5, 4, None).items
    assert fmean(item.prompt_tokens for item in items) == pytest.approx(221, rel=0.06)
    assert fmean(item.output_tokens for item in items) == pytest.approx(477, rel=0.06)
    assert max(item.output_tokens for item in items) <= 4_000


# ----------------------------------------------------------------------------------------- runs


def test_equal_tasks_give_equal_figures() -> None:
    task = Task("balance", SAL, "vllm+offloading=sal-a", workers=2, requests=60)
    figures = run(task, nothing)
    assert figures.completed == 60
    assert 0 < figures.ttft_p50_s <= figures.ttft_p99_s
    assert figures.bound_tps == pytest.approx(2 * bound_of(CONV, 60, 1).tps)
    assert figures.evictions == figures.recomputed == 0
    assert run(task, nothing) == figures


def test_a_saturated_run_ends_with_the_arrivals_and_counts_what_was_preempted() -> None:
    task = Task("s", "0 %", "vllm", {}, DEC, load=3.0, workers=1, requests=420, saturated=True)
    figures = run(task, nothing)
    assert 0 < figures.completed < 420
    assert figures.evictions > 0
    assert figures.recomputed > 0
    assert 0.5 < figures.tps / figures.bound_tps < 1.5


def test_every_row_is_a_policy_under_equal_limits() -> None:
    tasks = survey.tasks(quick=False)
    assert all(preset_named(task.policy).form == "leased" for task in tasks)
    limits = ("iteration_tokens", "running_max")
    assert not any(name in task.constants for task in tasks for name in limits)
    assert len({(t.study, t.label, t.seed) for t in tasks}) == len(tasks)
    assert {t.seed for t in survey.tasks(quick=True)} == {1}


# ----------------------------------------------------------------------------------- statements

TTFT = {
    SAL: 0.5,
    PAIR: 0.5,
    OWN: 0.5,
}
EVICTIONS = {"vllm": 0.5, MAX_UTILIZATION: 0.2}


def figures_of(task: Task) -> Figures:
    """Everybody waits for 1 s but those of whom something is claimed."""
    return Figures(
        task=task,
        bound_rps=2.5,
        bound_tps=500.0,
        completed=task.requests,
        ttft_s=TTFT.get(task.label, 1.0),
        ttft_p50_s=0.5,
        ttft_p99_s=5.0,
        ttft_longest_s={SPF: 60.0}.get(task.label, 6.0 if task.label == FCFS else 12.0),
        tpot_p99_s=0.1,
        stall_p99_s=0.2,
        tps={PAIR: 505.0, NO_EVICT: 200.0}.get(task.label, 490.0),
        good=0.9,
        evictions=EVICTIONS.get(task.label, 0.001),
        recomputed=0.1,
    )


def found(change: Callable[[Figures], Figures] = lambda figures: figures) -> Results:
    return Results([change(figures_of(task)) for task in survey.tasks(quick=False)])


def verdicts(made: tuple[Check, ...]) -> list[bool | None]:
    return [check.holds for check in made]


def changing(study: str, label: str, **values: float) -> Callable[[Figures], Figures]:
    def change(figures: Figures) -> Figures:
        mine = (figures.task.study, figures.task.label) == (study, label)
        return replace(figures, **values) if mine else figures  # type: ignore[arg-type]

    return change


def test_all_hold_if_everything_is_as_claimed() -> None:
    assert verdicts(checks(found())) == [True] * 7


@pytest.mark.parametrize(
    ("study", "label", "values", "fails"),
    [
        ("balance", SAL, {"ttft_s": 0.71}, [0]),
        ("balance", LEAST_REQUESTS, {"ttft_s": 0.4}, [0, 3]),
        ("dec at 1.05", PAIR, {"ttft_s": 1.01}, [1, 2]),
        ("dec at 1.05", PAIR, {"tps": 489.0}, [1]),
        ("conv at 1.05", PAIR, {"evictions": 0.2}, [1, 2]),
        ("eight workers", SAL, {"ttft_s": 1.2}, [3]),
        ("family dec", OWN, {"ttft_s": 1.2}, [4]),
        ("family conv", OWN, {"tps": 400.0}, [4]),
        ("orders", SPF, {"ttft_longest_s": 20.0}, [5]),
        ("saturated dec", NO_EVICT, {"tps": 480.0}, [6]),
    ],
)
def test_each_statement_hangs_on_its_own_figures(
    study: str, label: str, values: dict[str, float], fails: list[int]
) -> None:
    made = verdicts(checks(found(changing(study, label, **values))))
    assert [place for place, holds in enumerate(made) if not holds] == fails


@pytest.mark.parametrize(
    ("predicted", "ours", "agrees"),
    [
        (-0.32, -0.30, "yes"),
        (-0.32, -0.49, "in direction"),
        (-0.32, -0.09, "in direction"),
        (-0.32, -0.05, "no"),
        (-0.32, 0.10, "no"),
        (0.0, 0.0, "yes"),
        (0.0, 0.1, "no"),
    ],
)
def test_verdicts_of_predictions(predicted: float, ours: float, agrees: str) -> None:
    assert Prediction("x", predicted, ours).agrees == agrees


def test_slack_is_agreement_about_little() -> None:
    assert Prediction("x", -0.007, 0.002, slack=0.01).agrees == "yes"


def test_the_section_has_all_tables_and_a_picture() -> None:
    section = survey.section([figures_of(task) for task in survey.tasks(quick=False)])
    assert len(section.tables) == 11
    assert predictions(found()) == section.tables[0]
    assert all(len(row) == len(t.columns) for t in section.tables for row in t.rows)
    picture = ElementTree.fromstring(section.pictures[0][1])
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}rect")) == 1 + 2 + 2 * 9
