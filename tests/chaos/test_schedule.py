"""The schedule of faults: the same for the same seed, of every kind, within its limits."""

from collections import Counter

import pytest

from bench.chaos.__main__ import seeds_of
from bench.chaos.schedule import (
    BROKER_RESTARTS_MAX,
    FIRST_S,
    KINDS,
    LAST_QUIET_S,
    MORTAL,
    schedule,
)

SEEDS = range(1, 21)
STORM_S = 180.0


def test_a_seed_makes_one_schedule() -> None:
    assert schedule(7, STORM_S) == schedule(7, STORM_S)
    assert schedule(7, STORM_S) != schedule(8, STORM_S)


def test_twenty_seeds_have_every_kind_on_every_role_and_enough_of_them() -> None:
    faults = [fault for seed in SEEDS for fault in schedule(seed, STORM_S)]
    wanted = {(kind.name, role) for kind in KINDS for role in kind.roles}
    assert {(fault.kind, fault.role) for fault in faults} == wanted
    assert len(faults) >= 360  # of the 300 that are wanted, some may find nobody in their role


@pytest.mark.parametrize("seed", SEEDS)
def test_times_rise_and_leave_room_at_both_ends(seed: int) -> None:
    faults = schedule(seed, STORM_S)
    times = [fault.at_s for fault in faults]
    assert times == sorted(times)
    assert times[0] >= FIRST_S
    assert times[-1] <= STORM_S - LAST_QUIET_S
    assert [fault.number for fault in faults] == list(range(len(faults)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_must_not_happen_does_not(seed: int) -> None:
    faults = schedule(seed, STORM_S)
    kinds = Counter(fault.kind for fault in faults)
    assert kinds["restart"] <= BROKER_RESTARTS_MAX
    for fault in faults:
        if fault.kind in ("kill", "terminate"):
            assert fault.role in MORTAL  # the observed gateway lives
        assert fault.restart_s > 0 or fault.kind not in ("kill", "terminate", "drain", "restart")
        assert (fault.worker > 0) == (fault.role == "worker")


def test_a_short_run_has_a_few_faults() -> None:
    assert 2 <= len(schedule(1, 30.0)) <= 10


def test_seeds_are_said_in_three_ways() -> None:
    assert seeds_of("3") == [1, 2, 3]
    assert seeds_of("7-9") == [7, 8, 9]
    assert seeds_of("5-5,2") == [5, 2]
    with pytest.raises(ValueError, match="no seeds"):
        seeds_of("")
