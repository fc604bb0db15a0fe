"""Storms: real cores under faults keep every promise, and planted bugs are caught."""

import pytest

from sim.storm.plan import KINDS, plan_of
from sim.storm.runs import chunks, run_chunk, run_one, summed
from sim.storm.storm import Storm
from tests.sim.sabotage import SABOTAGES, Sabotage

SEEDS = range(1, 31)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_promise_is_broken(seed: int) -> None:
    outcome = run_one(seed)
    again = f"python -m sim.storm --worlds 1 --seed {seed}"
    assert outcome.violations == [], f"again: {again}"


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.name)
def test_a_planted_bug_is_caught(sabotage: Sabotage) -> None:
    """In one of the worlds that the real cores pass; the first rule that it breaks counts."""
    for seed in sabotage.worlds:
        violations = Storm(plan_of(seed), sabotage.parts).run().violations
        if violations and violations[0].rule in sabotage.rules:
            print(f"{sabotage.name}: seed {seed}, {violations[0].rule}, {violations[0].detail}")
            return
    pytest.fail(f"{sabotage.name} was not caught in seeds {list(sabotage.worlds)}")


def test_one_seed_makes_one_world() -> None:
    outcomes = [run_one(17) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].events > 500


def test_all_kinds_of_faults_happen_and_are_counted() -> None:
    planned = {fault.kind for seed in range(200) for fault in plan_of(seed).faults}
    assert planned == set(KINDS)
    (task,) = chunks(5, 2)
    summary = summed(5, [run_chunk(task, lambda done, total: None)])
    assert (summary.worlds, summary.first_seed, summary.last_seed) == (2, 5, 6)
    assert sum(summary.faults.values()) > 0
    assert summary.failed == []
