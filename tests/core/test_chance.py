"""Chance: survival of outputs by class, the gate's margin, and its steering by evictions."""

from random import Random

import numpy as np
import pytest

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.chance import ChanceGate, Margin
from services.scheduler.core.policies.lengths import LengthModel, prepare_lengths
from services.scheduler.core.policies.members import Member, View
from services.scheduler.core.policies.survival import kind_of
from services.scheduler.core.settings import Constants
from sim.memory_chance import Rules, simulate_chance

CONSTANTS = Constants(count_last_token=True)


def model(lengths: list[int], prompts: list[int] | None = None) -> LengthModel:
    kinds = np.array([kind_of(prompt) for prompt in prompts]) if prompts else None
    return prepare_lengths(np.array(lengths, dtype=np.int64), None, CONSTANTS, kinds)


def gate(capacity: int, z: float, members: list[Member], lengths: LengthModel) -> ChanceGate:
    return ChanceGate(View(capacity, 1, members, lengths, CONSTANTS, Draws(0), z))


def test_what_is_left_is_the_mean_of_the_longer_outputs() -> None:
    """Half end at 100, half at 300: 200 on average, and 150 for who has made 150."""
    known = model([100, 300] * 250)
    assert known.left_tokens(0, 1000, 3) == pytest.approx(200, rel=0.03)
    assert known.left_tokens(150, 1000, 3) == pytest.approx(150, rel=0.03)
    assert known.left_tokens(0, 50, 3) <= 50


def test_classes_know_better_than_the_whole() -> None:
    known = model([50, 500] * 300, prompts=[10, 2000] * 300)
    assert known.left_tokens(0, 1000, kind_of(10)) < 90
    assert known.left_tokens(0, 1000, kind_of(2000)) > 440
    assert known.left_tokens(0, 1000, kind_of(100)) == pytest.approx(275, rel=0.05)


def test_more_deviations_need_more_memory() -> None:
    known = model([100, 300] * 250)
    members = [Member(100, 0, 1000)] * 20
    needs = [gate(1, z, members, known).need(Member(100, 0, 1000)) for z in (-1.0, 0.0, 2.0, 5.0)]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]


def test_candidates_that_join_count_like_members() -> None:
    known, new = model([100, 300] * 250), Member(40, 0, 1000)
    whole = gate(10_000, 2.0, [Member(100, 30, 500), Member(70, 0, 1000)], known)
    grown = gate(10_000, 2.0, [Member(100, 30, 500)], known)
    grown.add(Member(70, 0, 1000))
    assert grown.need(new) == pytest.approx(whole.need(new))


@pytest.mark.parametrize("target", [0.01, 0.03, 0.1])
def test_the_margin_stands_still_at_the_target(target: float) -> None:
    """Evictions come with a chance that falls with z; their share ends up at the target."""
    rng, margin = Random(1), Margin()
    for _ in range(20_000):
        if rng.random() < 0.5 * 10**-margin.z:
            margin.saw_eviction(CONSTANTS, target)
        margin.saw_finish(CONSTANTS, target)
    ends = margin.evicted + margin.finished
    assert margin.evicted / ends == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("lease", [0, 16])
def test_memory_only_runs_keep_their_promises(lease: int) -> None:
    """Everybody is served, nobody is overtaken too often, and with credits no allocation fails
    (which the run asserts at every step)."""
    rng = Random(2)
    source = [(rng.randint(20, 400), rng.randint(10, 300)) for _ in range(250)]
    told = simulate_chance(source, Rules(lease_tokens=lease), capacity_tokens=6_000)
    assert told.plain.finished > 200
    assert told.unfair <= 32
    again = simulate_chance(source, Rules(lease_tokens=lease), capacity_tokens=6_000)
    assert again == told


def test_the_margin_finds_its_place_in_a_history_and_not_in_ten() -> None:
    """With nobody evicted it goes from 2 to below 0 while the history fills, and slower later."""
    margin = Margin()
    for _ in range(1_000):
        margin.saw_finish(CONSTANTS, 0.03)
    early = margin.z
    for _ in range(1_000):
        margin.saw_finish(CONSTANTS, 0.03)
    assert early < 0.0
    assert margin.z == pytest.approx(max(-1.5, early - 1_000 * 0.05 * 0.03))


def test_dear_evictions_are_wanted_less_and_cheap_ones_not_more() -> None:
    def target(return_s: float) -> float:
        margin = Margin()
        for number in range(200):
            margin.saw_finish(CONSTANTS, 0.03, now=number * 0.1)
        margin.saw_eviction(CONSTANTS, 0.03, return_s)
        return margin.target(CONSTANTS, workers=4)

    targets = [target(return_s) for return_s in (0.01, 0.1, 1.0, 10.0)]
    assert targets == sorted(targets, reverse=True)
    assert targets[0] == CONSTANTS.chance_target
    assert targets[-1] < CONSTANTS.chance_target / 2
