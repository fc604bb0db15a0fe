"""Moving: who goes on elsewhere at the end of a slice, and that it pays."""

from statistics import fmean

import pytest
from msgspec.structs import replace

from services.scheduler.core.moving import worth
from services.scheduler.core.rate import Crowding
from shared.profiles import CostProfile, load_profile
from sim.items import Item, Workload
from sim.mesh import SimMesh
from sim.run import run_out
from sim.setup import Setup

CROWD = 40
GPU = load_profile("opt-13b-a100-swift")
SERIAL = replace(GPU, overhead_per_sequence_s=0.02)
"""An engine whose time is that of its batch: each request makes all tokens 20 ms later."""


def test_worth_is_what_all_gain_over_what_all_pay() -> None:
    """Ten leave together for an empty worker one after the other: the first pays most."""
    first = worth(left=500, here=40, there=0, request_s=0.0005, prefill_s=0.1)
    assert first == pytest.approx(2 * 0.0005 * 500 * 39 / 0.1)
    assert worth(left=500, here=31, there=9, request_s=0.0005, prefill_s=0.1) < first / 10
    assert worth(left=500, here=10, there=9, request_s=0.0005, prefill_s=0.1) == 0.0


def test_crowding_is_the_slope_of_pace_over_company() -> None:
    crowding = Crowding()
    for running in [*range(1, 60), *range(60, 0, -1)] * 5:
        seconds = 64 * (0.02 + 0.0004 * running)
        crowding.saw(running * seconds, 64, seconds)
    assert crowding.request_s == pytest.approx(0.0004, rel=0.05)


def test_sooner_is_a_share_of_a_token() -> None:
    """20 ms and 0.4 for each: 32 ms among 30, 24 among 10. A quarter is 8 of the 32."""
    crowding = Crowding()
    assert crowding.sooner(30, 10) == 0.0
    for running in [*range(1, 60), *range(60, 0, -1)] * 5:
        seconds = 64 * (0.02 + 0.0004 * running)
        crowding.saw(running * seconds, 64, seconds)
    assert crowding.sooner(30, 10) == pytest.approx(0.25, rel=0.05)
    assert crowding.sooner(10, 10) == 0.0


def test_nothing_is_said_of_batches_that_are_all_alike() -> None:
    crowding = Crowding()
    for number in range(1000):
        seconds = 64 * (0.02 + 0.01 * (number % 2))
        crowding.saw((30 + number % 2) * seconds, 64, seconds)
    assert crowding.request_s < 0.001


def crowd(*, move_gain: float, late_worker_s: float | None) -> SimMesh:
    """Many long requests come to one worker; a second one joins when they are all there."""
    items = tuple(Item(number / 4, 100, 600 + 10 * number) for number in range(CROWD))
    return served(GPU, items, move_gain, late_worker_s)


def a_few(profile: CostProfile, move_gain: float) -> SimMesh:
    """Two dozen of many lengths show what company costs; later ten come, and a worker joins."""
    first = (Item(number / 10, 100, 40 + 20 * number) for number in range(24))
    later = (Item(120 + number / 4, 100, 600 + 10 * number) for number in range(10))
    return served(profile, (*first, *later), move_gain, 140.0)


def served(
    profile: CostProfile, items: tuple[Item, ...], move_gain: float, late_worker_s: float | None
) -> SimMesh:
    setup = Setup(
        policy="tranche",
        workload=Workload("crowd", items),
        profile=profile,
        noise_cv=0.0,
        constants={"move_gain": move_gain},
    )
    mesh = SimMesh(setup)
    mesh.start()
    if late_worker_s is not None:
        mesh.world.after(late_worker_s, lambda: (mesh.add_worker(), None)[1])
    run_out(mesh)
    assert all(call.outcome == "completed" for call in mesh.clients.calls)
    return mesh


def moved(mesh: SimMesh) -> int:
    return sum(worker.counts.moves for worker in mesh.all_workers)


def e2e_s(mesh: SimMesh) -> float:
    return fmean(call.record(0.0).e2e_s for call in mesh.clients.calls)


def test_some_move_to_a_worker_that_joins_and_all_are_served_sooner() -> None:
    stay = crowd(move_gain=0.0, late_worker_s=12.0)
    go = crowd(move_gain=2.0, late_worker_s=12.0)
    assert moved(stay) == 0
    assert CROWD / 5 <= moved(go) <= CROWD
    assert e2e_s(go) < 0.95 * e2e_s(stay)
    evictions = [worker.counts.evictions for worker in go.all_workers]
    assert sum(evictions) == 0  # nobody was short of memory
    assert go.leader.core is not None
    assert go.leader.core.books.margin.evicted == 0


def test_nobody_moves_without_a_better_place() -> None:
    assert moved(crowd(move_gain=2.0, late_worker_s=None)) == 0


def test_a_few_stay_where_company_costs_little() -> None:
    assert moved(a_few(GPU, move_gain=2.0)) == 0


def test_a_few_move_where_tokens_are_much_sooner() -> None:
    go, stay = a_few(SERIAL, move_gain=2.0), a_few(SERIAL, move_gain=0.0)
    assert moved(go) > 0
    assert e2e_s(go) < 0.9 * e2e_s(stay)
