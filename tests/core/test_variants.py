"""Variants: presets with other answers, by name; what is refused says what there is."""

from dataclasses import fields

import pytest

from services.scheduler.core.policies.balancing import BALANCERS
from services.scheduler.core.policies.gates import GATES
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.presets import PRESETS, Preset, UnknownPreset, preset_named
from services.scheduler.core.variants import QUESTIONS
from services.scheduler.settings import SchedulerSettings
from tests.sim.worlds import items, judged, setup


def changed(variant: Preset, row: Preset) -> set[str]:
    """In what two presets differ."""
    names = [item.name for item in fields(Preset)]
    return {name for name in names if getattr(variant, name) != getattr(row, name)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_is_the_preset(name: str) -> None:
    assert preset_named(name) is PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_answers_its_questions_with_known_answers(name: str) -> None:
    row = PRESETS[name]
    for question, answers in QUESTIONS[row.form].items():
        assert getattr(row, question) in answers, question


def test_answers_replace_a_presets_and_nothing_else_changes() -> None:
    variant = preset_named("vllm+offloading=sal-a+binding=late")
    assert (variant.offloading, variant.binding) == ("sal-a", "late")
    assert changed(variant, PRESETS["vllm"]) == {"name", "offloading", "binding"}


def test_a_plus_in_a_presets_own_name() -> None:
    variant = preset_named("sal+larry+order=hrrn+admission=larry-a")
    assert (variant.order, variant.admission) == ("hrrn", "larry-a")
    assert variant.constants == PRESETS["sal+larry"].constants


def test_a_name_is_the_same_however_its_changes_are_ordered() -> None:
    one = preset_named("vllm+binding=late+order=spf")
    assert one == preset_named("vllm+order=spf+binding=late")
    assert preset_named(one.name) == one


def test_truth_goes_with_the_gate_that_needs_it() -> None:
    assert preset_named("vllm+admission=oracle").needs_truth
    assert not preset_named("oracle+admission=past-future").needs_truth
    with pytest.raises(ValueError, match="true output lengths"):
        SchedulerSettings(policy="vllm+admission=oracle")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nobody+order=fcfs", "unknown policy 'nobody'; known are: sls"),
        ("past-futur", "unknown policy 'past-futur', did you mean 'past-future'"),
        ("vllm+ordr=fcfs", "no question 'ordr', did you mean 'order'"),
        ("vllm+offloading=sal", "no such offloading as 'sal', did you mean 'sal-"),
        ("vllm+", "'' is not question=answer"),
        ("vllm+sal-a", "'sal-a' is not question=answer"),
        ("vllm+colour=red", "no question 'colour'; questions are order, admission"),
        ("vllm+order=alphabetical", "no such order as 'alphabetical'; known are fcfs"),
        ("vllm+order=spf+order=fcfs", "answers order twice"),
        ("vllm+batching=dp", "batching 'dp' is one for closed presets"),
        ("scls+offloading=sal-a", "offloading 'sal-a' is one for leased presets"),
        ("scls+binding=early", "closed presets are not asked for binding"),
    ],
)
def test_refusals_say_what_there_is(name: str, says: str) -> None:
    with pytest.raises(UnknownPreset, match=says):
        preset_named(name)


@pytest.mark.parametrize(
    "change",
    [
        *(f"order={name}" for name in QUEUES),
        *(f"admission={name}" for name in GATES if name != "oracle"),
        *(f"offloading={name}" for name in BALANCERS),
        *(f"victim={name}" for name in VICTIMS),
        "pacing=growing",
        "batching=prefill-first",
        "binding=late",
    ],
)
def test_every_answer_runs(change: str) -> None:
    requests = items(12)
    outcome, violations = judged(setup(f"vllm+{change}", requests))
    assert outcome.report.completed == len(requests)
    assert violations == []
