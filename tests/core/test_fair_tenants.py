"""Tenants under the real core: weighted service of those that always wait, checked at every step;
and one that crowds out the others makes way."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from services.scheduler.core.settings import Constants, UnknownConstant, weights_of, with_overrides
from services.scheduler.core.shares import hoards
from tests.core.mill import PROMPT_MAX, Mill

OUTPUT_MAX = 40


@pytest.mark.parametrize("policy", ["tranche", "past-future+order=fair"])
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 3), places=st.integers(1, 4))
@settings(max_examples=5, deadline=None)
def test_backlogged_tenants_are_apart_by_what_runs_at_most(
    policy: str, seed: int, workers: int, places: int
) -> None:
    """The bound: a tenant is placed when it was given least, so it is ahead of another that waits
    by one prompt and by what its leases make until they end, over its weight."""
    rng, weights = Random(seed), {"a": 1.0, "b": 2.0, "c": 1.0}
    mill = Mill(policy, workers, places, 10_000, tenant_weights="b=2")
    bound = PROMPT_MAX + 2 * OUTPUT_MAX * workers * places
    longest = {"a": OUTPUT_MAX, "b": OUTPUT_MAX // 2, "c": 2}
    for _ in range(60):
        for tenant in weights:
            while mill.waiting(tenant) < 3:
                mill.send(tenant, rng.randint(1, PROMPT_MAX), rng.randint(1, longest[tenant]))
        mill.turn(f"w{rng.randrange(workers)}")
        given_ = [mill.given(tenant) for tenant in weights if mill.waiting(tenant)]
        assert max(given_) - min(given_) <= bound


def test_a_tenant_of_weight_two_is_given_twice_as_much() -> None:
    rng = Random(5)
    mill = Mill("tranche", 1, 2, 10_000, tenant_weights="b=2")
    for _ in range(600):
        for tenant in "ab":
            while mill.waiting(tenant) < 3:
                mill.send(tenant, rng.randint(1, PROMPT_MAX), rng.randint(1, OUTPUT_MAX))
        mill.turn("w0")
    placed = Counter(name[0] for name in mill.placed)
    assert placed["b"] / placed["a"] == pytest.approx(2, rel=0.15)


def test_who_crowds_out_the_others_makes_way_and_loses_nothing() -> None:
    mill = Mill("tranche", 1, 0, 400, hoard_deviations=2.0, hoard_look_s=0.0)
    for _ in range(12):
        mill.send("flood", 20, OUTPUT_MAX)
    mill.turn("w0")
    late = mill.send("other", 40, 5)
    for _ in range(8):
        mill.turn("w0")
    assert mill.parks
    assert {name.split("-")[0] for name in mill.parks} == {"flood"}
    assert late in mill.placed
    assert mill.bench.core.books.evictions == 0
    for _ in range(200):
        mill.turn("w0")
    assert not mill.bench.core.books.requests.open
    assert all(mill.made[name] == output for name, output in mill.outputs.items())
    shares = mill.bench.core.books.shares
    assert (shares.running, shares.total, shares.crowd) == ({}, 0, frozenset())


def test_nobody_makes_way_within_a_tenant_or_if_it_is_off() -> None:
    for tenant, deviations in (("flood", 2.0), ("other", 0.0)):
        mill = Mill("tranche", 1, 0, 400, hoard_deviations=deviations, hoard_look_s=0.0)
        for _ in range(12):
            mill.send("flood", 20, OUTPUT_MAX)
        mill.turn("w0")
        mill.send(tenant, 40, 5)
        for _ in range(4):
            mill.turn("w0")
        parked = [name for name in mill.parks if name in mill.bench.core.books.requests.open]
        yields = [r.yields for r in mill.bench.core.books.requests.open.values()]
        assert not any(yields), parked


def test_hoarding_is_more_than_chance_explains() -> None:
    assert not hoards(10, 100, 0.1, 2.0)
    assert not hoards(16, 100, 0.1, 2.0)
    assert hoards(17, 100, 0.1, 2.0)
    assert not hoards(3, 3, 0.5, 2.0)
    assert hoards(10, 10, 0.5, 2.0)
    assert not hoards(5, 5, 1.0, 2.0)


def test_weights_are_named_and_checked() -> None:
    assert weights_of("a=2, team-b=0.5") == {"a": 2.0, "team-b": 0.5}
    assert weights_of("") == {}
    assert with_overrides(Constants(), {"tenant_weights": "a=2"}).tenant_weights == "a=2"
    for wrong in ("a", "a=0", "a=-1", "a=x", "=2", "a=inf"):
        with pytest.raises(UnknownConstant, match="NAME=WEIGHT"):
            weights_of(wrong)


@pytest.mark.parametrize("deviations", [0.0, 2.0])
def test_a_flood_prefills_only_where_nothing_is_queued_and_the_others_pass_it(
    deviations: float,
) -> None:
    mill = Mill("tranche", 1, 0, 4000, hoard_deviations=deviations, hoard_look_s=0.0)
    mill.send("other", 20, 30)
    for _ in range(30):
        mill.send("flood", 20, 30)
    placed = [name for name in mill.placed if name.startswith("flood")]
    assert (len(placed) == 30) == (deviations == 0.0)
    late = mill.send("other", 20, 30)
    assert late in mill.placed
    for _ in range(300):
        mill.turn("w0")
    assert all(mill.made[name] == output for name, output in mill.outputs.items())
