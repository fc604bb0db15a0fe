"""Leads: how far a tenant gets ahead of another that waits, at every step of the real core."""

from random import Random

import pytest
from hypothesis import example, given, settings, strategies as st

from services.scheduler.core.presets import preset_named
from shared.messages import GatewayBeat
from tests.core.mill import LEASE, OUTPUT_WEIGHT, PROMPT_MAX, Ledger, Mill
from tests.core.seam import beat_of, submit

OUTPUT_MAX = 200
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.5}
LONGEST = {"a": OUTPUT_MAX, "b": 60, "c": 2, "d": 120}


def constants(**changes: object) -> dict[str, object]:
    return {**preset_named("tranche").constants, "hoard_look_s": 0.0, **changes}


def crowded(
    seed: int, workers: int, places: int, capacity: int, held: float = 2.0, **changes: object
) -> Ledger:
    """Tenants of which now some, now all have more to do than they are given; then all of it."""
    rng = Random(seed)
    shape = (workers, places, capacity, OUTPUT_MAX)
    rules = constants(**changes)
    ledger = Ledger("tranche", *shape, weights=WEIGHTS, held_prompts=held, **rules)
    wants = dict.fromkeys(WEIGHTS, 0)
    for turn in range(120):
        if turn % 10 == 0:
            wants = {tenant: rng.choice((0, 1, 3, 12)) for tenant in WEIGHTS}
        for tenant, want in wants.items():
            while ledger.waiting(tenant) < want:
                ledger.send(tenant, rng.randint(1, PROMPT_MAX), rng.randint(1, LONGEST[tenant]))
        ledger.turn(f"w{rng.randrange(workers)}", rng.choice((1, 6, 16)))
    for turn in range(100_000):
        if not ledger.bench.core.books.requests.open:
            break
        if turn % 1_000 == 0:
            ledger.say(GatewayBeat(gateway="g1"))
        ledger.turn(f"w{turn % workers}")
    return ledger


@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 3),
    places=st.integers(0, 6),
    capacity=st.integers(300, 3_000),
    prompts=st.sampled_from((1.0, 2.0)),
)
@example(seed=7, workers=1, places=0, capacity=300, prompts=1.0)
@example(seed=10, workers=1, places=0, capacity=300, prompts=2.0)
@settings(max_examples=10, deadline=None)
def test_nobody_is_ahead_of_a_tenant_that_waits_by_more_than_prompts_and_its_leases(
    seed: int, workers: int, places: int, capacity: int, prompts: float
) -> None:
    """The ledger asserts it after each call of the core; and all get all that they asked for."""
    ledger = crowded(seed, workers, places, capacity, prompts, lead_prompts=prompts)
    assert not ledger.bench.core.books.requests.open
    assert all(ledger.made[name] == output for name, output in ledger.outputs.items())
    shares = ledger.bench.core.books.shares
    assert (shares.leased, shares.resting, shares.most) == ({}, {}, {})


@pytest.mark.parametrize("prompts", [0.0, 6.0])
def test_the_ledger_finds_a_core_that_lets_tenants_get_further_ahead(prompts: float) -> None:
    with pytest.raises(AssertionError, match="one that waits"):
        crowded(1, 1, 4, 2_000, lead_prompts=prompts)


def test_the_bound_is_used_and_not_only_kept() -> None:
    assert crowded(1, 1, 4, 2_000).gaps.lead_worst > 0.5


def test_with_one_tenant_nothing_is_decided_otherwise() -> None:
    said: list[list[str]] = []
    for prompts in (0.0, 2.0):
        rng = Random(3)
        mill = Mill("tranche", 2, 0, 700, OUTPUT_MAX, **constants(lead_prompts=prompts))
        for _ in range(40):
            mill.send("a", rng.randint(1, PROMPT_MAX), rng.randint(1, OUTPUT_MAX))
            mill.turn(f"w{rng.randrange(2)}")
        for turn in range(400):
            mill.turn(f"w{turn % 2}")
        said.append([repr(command) for command in mill.said])
    assert len(said[0]) > 100
    assert said[0] == said[1]


def long_and_late(**late: object) -> Mill:
    """One tenant has all places, for long; another comes."""
    mill = Mill("tranche", 1, 3, 5_000, OUTPUT_MAX, **constants(overtaken_max=1))
    for _ in range(6):
        mill.send("a", 10, OUTPUT_MAX)
    mill.turn("w0")
    mill.outputs["late"] = 4
    mill.say(submit("late", tenant="b", max_tokens=OUTPUT_MAX, **late))
    return mill


def test_who_is_too_far_ahead_rests_and_makes_way_and_loses_nothing() -> None:
    mill = long_and_late()
    made, most = sum(mill.made.values()), 10 + OUTPUT_WEIGHT * 3 * LEASE
    for _ in range(20):
        mill.turn("w0")
        if "late" in mill.placed:
            break
    assert "late" in mill.placed
    assert OUTPUT_WEIGHT * (sum(mill.made.values()) - made) <= most
    assert len(mill.parks) == 1
    assert mill.bench.core.books.evictions == 0
    for _ in range(300):
        mill.turn("w0")
    assert all(mill.made[name] == output for name, output in mill.outputs.items())


def test_who_is_more_urgent_does_not_rest_for_others() -> None:
    mill = long_and_late(priority=1)
    for _ in range(12):
        mill.turn("w0")
    assert not mill.parks
    assert "late" not in mill.placed


def test_nobody_rests_for_one_that_no_worker_can_hold() -> None:
    mill = Mill("tranche", 1, 3, 300, OUTPUT_MAX, **constants())
    mill.say(beat_of("large", forms=("leased",), capacity=5_000))
    mill.leases["large"] = {}
    mill.say(submit("late", tenant="b", max_tokens=900))
    mill.say(beat_of("large", forms=("leased",), capacity=5_000, leaving=True))
    for _ in range(3):
        mill.send("a", 10, 80)
    for _ in range(40):
        mill.turn("w0")
    assert sum(mill.made[name] == 80 for name in mill.outputs) == 3
