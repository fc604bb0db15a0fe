"""Policies on small inputs, against brute force and hand-made oracles."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, strategies as st

from services.scheduler.core.policies.admission import Footprint, Room, fits, slice_bound
from services.scheduler.core.policies.batching import (
    BATCHINGS,
    Batches,
    Waiting,
    cheapest_cuts,
    run_through,
)
from services.scheduler.core.policies.offloading import max_min, round_robin
from services.scheduler.core.policies.pacing import PACINGS, Clock
from services.scheduler.core.settings import Constants
from shared.costs import PRIOR, Bilinear, SliceCost

coefficients = st.floats(0, 1)
costs = st.builds(Bilinear, coefficients, coefficients, coefficients, coefficients)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to divide the items into sets."""
    if not items:
        yield []
        return
    first, *rest = items
    for partition in partitions(rest):
        yield [[first], *partition]
        for place in range(len(partition)):
            yield [*partition[:place], [first, *partition[place]], *partition[place + 1 :]]


def price_of(batch: list[int], cost: Bilinear) -> float:
    rows, longest = len(batch), max(batch)
    return (
        cost.per_row_token * rows * longest
        + cost.per_row * rows
        + cost.per_token * longest
        + cost.fixed
    )


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7),
    costs,
    st.integers(1, 400),
    st.integers(0, 40),
)
def test_dp_is_the_best_of_all_partitions(
    lengths: list[int], cost: Bilinear, budget: int, iterations: int
) -> None:
    """Not only of those that are contiguous in sorted order."""
    lengths.sort()
    limits = [budget // (length + iterations) for length in lengths]
    cuts = cheapest_cuts(lengths, limits, cost)
    assert [i for start, end in cuts for i in range(start, end)] == list(range(len(lengths)))
    for start, end in cuts:
        assert end - start == 1 or (end - start) * (lengths[end - 1] + iterations) <= budget
    found = sum(price_of(lengths[start:end], cost) for start, end in cuts)
    best = min(
        sum(price_of(batch, cost) for batch in partition)
        for partition in partitions(lengths)
        if all(len(b) == 1 or len(b) * (max(b) + iterations) <= budget for b in partition)
    )
    assert found == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_dp_is_the_best_of_all_partitions_of_eight() -> None:
    rng = Random(3)
    for _ in range(3):
        lengths = sorted(rng.randint(1, 300) for _ in range(8))
        cost = Bilinear(rng.random() * 1e-2, rng.random(), rng.random() * 1e-2, rng.random() * 3)
        limits = [rng.randint(2, 8)] * 8
        cuts = cheapest_cuts(lengths, limits, cost)
        found = sum(price_of(lengths[start:end], cost) for start, end in cuts)
        best = min(
            sum(price_of(batch, cost) for batch in partition)
            for partition in partitions(lengths)
            if max(len(batch) for batch in partition) <= limits[0]
        )
        assert found == pytest.approx(best)


def slow_dp(lengths: list[int], limits: list[int], cost: Bilinear) -> float:
    """The recurrence as it is written down, every start tried."""
    best = [0.0]
    for end in range(1, len(lengths) + 1):
        rows = range(1, min(max(1, limits[end - 1]), end) + 1)
        best.append(min(best[end - n] + price_of(lengths[end - n : end], cost) for n in rows))
    return best[-1]


@given(st.integers(0, 2**32), st.integers(1, 300), costs)
def test_the_fast_programme_equals_the_plain_one(seed: int, count: int, cost: Bilinear) -> None:
    rng = Random(seed)
    lengths = sorted(rng.randint(1, rng.choice((5, 1000))) for _ in range(count))
    budget = rng.choice((50, 3000, 10**7))
    limits = [min(budget // (length + 16), rng.choice((1000,))) for length in lengths]
    cuts = cheapest_cuts(lengths, limits, cost)
    found = sum(price_of(lengths[start:end], cost) for start, end in cuts)
    assert found == pytest.approx(slow_dp(lengths, limits, cost), rel=1e-9, abs=1e-12)


def waiting(inputs: list[int], **changes: object) -> Waiting:
    values: dict[str, object] = {
        "order": list(range(len(inputs))),
        "lengths": sorted((tokens, number) for number, tokens in enumerate(inputs)),
        "inputs": inputs.__getitem__,
        "leases": lambda number: 16,
        "cost": PRIOR,
        "slice_tokens": 16,
        "size_limit": lambda longest, iterations: 600 // (longest + iterations),
        "batch_size": 4,
        "batches_max": 100,
        "batches_wanted": 0,
    }
    return Waiting(**{**values, **changes})  # type: ignore[arg-type]


def batches_of(name: str, given_: Waiting) -> Batches:
    return run_through(BATCHINGS[name](given_))


@pytest.mark.parametrize("name", BATCHINGS)
@given(st.lists(st.integers(1, 700), max_size=30), st.integers(1, 6), st.integers(0, 8))
def test_batches_hold_each_request_once_and_fit(
    name: str, inputs: list[int], batches_max: int, wanted: int
) -> None:
    if name == "dp":
        inputs.sort()
    given_ = waiting(inputs, batches_max=batches_max, batches_wanted=wanted)
    batches = batches_of(name, given_)
    placed = [index for batch in batches for index in batch]
    assert len(placed) == len(set(placed))
    for batch in batches:
        longest = max(inputs[index] for index in batch)
        assert len(batch) == 1 or len(batch) * (longest + 16) <= 600
        assert name == "dp" or len(batch) <= 4
    if name == "dp":
        assert sorted(placed) == list(range(len(inputs)))
        assert len(batches) >= min(wanted, len(inputs))
    else:
        assert len(batches) <= batches_max


def test_fixed_takes_requests_in_their_order() -> None:
    assert batches_of("fixed", waiting([5] * 6, batches_max=1)) == [[0, 1, 2, 3]]
    assert batches_of("fixed", waiting([100] * 6)) == [[0, 1, 2, 3], [4, 5]]


def test_sorted_takes_the_oldest_with_its_likes() -> None:
    """Number 0 is the oldest: a long one. Its batch holds the longest, not the shortest."""
    batches = batches_of("sorted", waiting([90, 10, 85, 11, 80, 12, 84, 9], batches_max=1))
    assert [sorted(batch) for batch in batches] == [[0, 2, 4, 6]]


def test_spreading_halves_the_work_and_not_the_count() -> None:
    """One long request against many short ones: the cut balances time."""
    cost = Bilinear(per_row_token=1.0, per_row=0.0, per_token=0.0, fixed=1000.0)
    batches = batches_of(
        "dp",
        waiting(
            [10] * 9 + [90],
            cost=SliceCost(prefill=cost, decode=Bilinear(0, 0, 0, 0)),
            size_limit=lambda longest, iterations: 100,
            batches_wanted=2,
        ),
    )
    assert batches == [list(range(9)), [9]]


@given(
    st.lists(st.floats(0.01, 10), max_size=20),
    st.lists(st.floats(0, 10), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_max_min_gives_the_longest_to_the_least_loaded(
    estimates: list[float], loads: list[float], turn: int
) -> None:
    everyone = [list(range(len(loads)))] * len(estimates)
    assignment = list(max_min(estimates, everyone, loads, turn % len(loads)))
    assert sorted(batch for batch, _ in assignment) == list(range(len(estimates)))
    placed = [estimates[batch] for batch, _ in assignment]
    assert placed == sorted(placed, reverse=True)
    now = list(loads)
    for batch, worker in assignment:
        assert now[worker] == min(now)
        now[worker] += estimates[batch]


@given(
    st.lists(
        st.tuples(st.floats(0.01, 10), st.sets(st.integers(0, 3), max_size=4)),
        min_size=1,
        max_size=20,
    ),
    st.lists(st.floats(0, 10), min_size=4, max_size=4),
)
def test_max_min_respects_what_fits_where(
    batches: list[tuple[float, set[int]]], loads: list[float]
) -> None:
    estimates = [estimate for estimate, _ in batches]
    allowed = [sorted(where) for _, where in batches]
    now = list(loads)
    placed = list(max_min(estimates, allowed, loads, 0))
    assert {batch for batch, _ in placed} == {b for b, where in enumerate(allowed) if where}
    for batch, worker in placed:
        assert worker in allowed[batch]
        assert now[worker] == min(now[w] for w in allowed[batch])
        now[worker] += estimates[batch]


def test_ties_rotate() -> None:
    """A light batch per round: every worker gets its share, not only the first."""
    counts = [0] * 4
    turn = 0
    for _ in range(20):
        ((_, worker),) = max_min([1.0], [range(4)], [0.0] * 4, turn)
        counts[worker] += 1
        turn = worker + 1
    assert counts == [5] * 4
    assert [w for _, w in max_min([1.0] * 4, [range(4)] * 4, [0.0] * 4, 2)] == [2, 3, 0, 1]


def test_round_robin_ignores_load() -> None:
    placed = round_robin([1.0] * 5, [range(3)] * 5, [9.0, 0.0, 0.0], 1)
    assert [worker for _, worker in placed] == [1, 2, 0, 1, 2]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100), st.floats(0, 5), st.floats(0, 1))
def test_an_interval_is_never_below_its_floor(
    gathered: float, last: float, load: float, floor: float, share: float
) -> None:
    constants = Constants(interval_floor_s=floor, interval_share=share)
    clock = Clock(
        gathered_at=gathered, last_round_at=last, least_load_s=load, idle_workers=3, waiting=1
    )
    at = PACINGS["adaptive"].next_round_at(clock, constants)
    assert at is not None
    assert at - last >= floor - 1e-9
    assert at == max(gathered, last + max(share * load, floor))


def test_pacing_of_the_others() -> None:
    constants = Constants(interval_s=2.0, slice_tokens=64, round_on_idle=True, interval_floor_s=0.5)
    busy = Clock(gathered_at=5.0, last_round_at=4.0, least_load_s=10.0, idle_workers=0, waiting=11)
    idle, twelve = replace(busy, idle_workers=1), replace(busy, waiting=12)
    assert PACINGS["whole"].next_round_at(busy, constants) is None
    assert PACINGS["whole"].next_round_at(idle, constants) == 5.0
    assert PACINGS["whole"].next_round_at(twelve, constants) == 5.0
    fetching = replace(constants, deal_ahead=False)
    assert PACINGS["whole"].next_round_at(twelve, fetching) is None
    assert PACINGS["ticked"].next_round_at(idle, constants) == 6.0
    assert PACINGS["adaptive"].next_round_at(idle, constants) == 5.0
    assert PACINGS["adaptive"].next_round_at(busy, constants) == 9.0
    assert PACINGS["whole"].lease_tokens(500, constants) == 500
    assert PACINGS["ticked"].lease_tokens(500, constants) == 64
    assert PACINGS["ticked"].lease_tokens(5, constants) == 5


@given(
    st.integers(0, 5000),
    st.integers(0, 20),
    st.integers(1, 30),
    st.integers(1, 500),
    st.integers(1, 128),
)
def test_memory_predicate(budget: int, most: int, rows: int, longest: int, iterations: int) -> None:
    room = Room(budget_tokens=budget, batch_size_max=most, context_tokens_max=1000)
    need = Footprint(
        batch_size=rows, input_tokens_max=longest, iterations=iterations, context_tokens=700
    )
    truth = rows * (longest + iterations) <= budget and (most == 0 or rows <= most)
    assert fits(room, need) == truth
    assert (rows <= slice_bound(room, longest, iterations)) == truth
