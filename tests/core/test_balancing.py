"""Balancers against their definitions, worker by worker in plain Python."""

from collections.abc import Callable
from time import thread_time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.balancing import BALANCERS, Gauges
from services.scheduler.core.settings import Constants

CONSTANTS = Constants()
GAUGES = tuple(Gauges.__slots__)
Row = dict[str, float]


def gauges_of(rows: list[Row]) -> Gauges:
    return Gauges(*(np.array([row.get(name, 0.0) for row in rows]) for name in GAUGES))


def choose(
    name: str,
    rows: list[Row],
    need: int = 100,
    eligible: list[int] | None = None,
    turn: int = 0,
    draws: Draws | None = None,
) -> int:
    places = np.array(list(range(len(rows))) if eligible is None else eligible, dtype=np.intp)
    return BALANCERS[name](gauges_of(rows), need, places, turn, draws or Draws(1), CONSTANTS)


# ------------------------------------------------------------------------------------ definitions


def queued(row: Row) -> float:
    return row["backlog"] + row["waiting_tokens"]


def deficit(row: Row, need: int) -> float:
    return max(0.0, need + row["waiting_tokens"] - (row["kv_total"] - row["kv_used"]))


def freeness(row: Row) -> float:
    requests = row["running"] + row["waiting"]
    free = row["kv_total"] - row["kv_used"] - row["waiting_tokens"]
    return free if requests == 0 else free / requests


def sal_b(row: Row, need: int) -> float:
    missing = deficit(row, need)
    if missing == 0 or row["kv_used"] == 0:
        waiting_s = missing * row["mean_output"] * row["iteration_s"]
    else:
        waiting_s = missing / (row["kv_used"] / (row["mean_output"] * row["iteration_s"]))
    return max(queued(row) * row["prefill_token_s"], waiting_s)


def sal_c(row: Row, need: int) -> tuple[float, ...]:
    missing = deficit(row, need)
    return (0, queued(row), row["kv_used"]) if missing == 0 else (1, missing, row["kv_used"])


DEFINITIONS: dict[str, Callable[[Row, int], object]] = {
    "least-requests": lambda r, need: r["running"] + r["waiting"],
    "least-kv": lambda r, need: r["kv_used"] / r["kv_total"],
    "kv-queued": lambda r, need: (r["kv_used"] + r["waiting_tokens"]) / r["kv_total"],
    "freeness": lambda r, need: -freeness(r),
    "least-queued-prefill": lambda r, need: queued(r),
    "vllm-dp": lambda r, need: 4 * r["waiting"] + r["running"],
    "sal-a": lambda r, need: (queued(r) + deficit(r, need), r["kv_used"]),
    "sal-b": lambda r, need: (sal_b(r, need), r["kv_used"]),
    "sal-c": sal_c,
    "lmetric": lambda r, need: (need + queued(r)) * (r["running"] + r["waiting"] + 1),
    "late-binding": lambda r, need: (r["backlog"], r["kv_used"] / r["kv_total"]),
    "least-predicted-peak": lambda r, need: (
        (r["peak"] + r["waiting_tokens"] + need) / r["kv_total"],
        r["kv_used"],
    ),
    "max-min": lambda r, need: r["busy_s"],
}

# Few values and powers of two: many ties, and sums and quotients that are exact.
few = st.sampled_from((0.0, 1.0, 2.0, 4.0))
rows_of = st.fixed_dictionaries(
    {
        "running": few,
        "waiting": few,
        "kv_used": st.sampled_from((0.0, 512.0, 1024.0, 2048.0)),
        "kv_total": st.sampled_from((1024.0, 2048.0, 4096.0)),
        "backlog": st.sampled_from((0.0, 64.0, 256.0)),
        "waiting_tokens": st.sampled_from((0.0, 64.0, 1024.0)),
        "mean_output": st.sampled_from((64.0, 256.0)),
        "busy_s": few,
        "peak": st.sampled_from((0.0, 1024.0, 4096.0)),
        "prefill_token_s": st.just(1 / 1024),
        "iteration_s": st.sampled_from((1 / 16, 1 / 32)),
    }
)


def test_every_balancer_is_tried() -> None:
    assert set(DEFINITIONS) | {"random", "round-robin", "power-of-two"} == set(BALANCERS)


@pytest.mark.parametrize("name", DEFINITIONS)
@given(
    rows=st.lists(rows_of, min_size=1, max_size=6),
    need=st.sampled_from((64, 1024)),
    turn=st.integers(0, 1 << 40),
    data=st.data(),
)
@settings(max_examples=60)
def test_the_least_is_chosen_and_equals_take_turns(
    name: str, rows: list[Row], need: int, turn: int, data: st.DataObject
) -> None:
    places = st.sets(st.integers(0, len(rows) - 1), min_size=1)
    eligible = sorted(data.draw(places))
    scores = {place: DEFINITIONS[name](rows[place], need) for place in eligible}
    least = min(scores.values())  # type: ignore[type-var]
    best = {place for place, score in scores.items() if score == least}
    gauges, at = gauges_of(rows), np.array(eligible, dtype=np.intp)
    turns = range(turn, turn + len(best))
    assert {BALANCERS[name](gauges, need, at, t, Draws(1), CONSTANTS) for t in turns} == best


@pytest.mark.parametrize("name", [name for name in BALANCERS if name != "random"])
def test_equal_workers_get_equal_shares(name: str) -> None:
    row = {"kv_total": 1000.0, "kv_used": 10.0, "mean_output": 10.0}
    draws = Draws(7)
    chosen = [choose(name, [row] * 5, eligible=[0, 2, 4], turn=t, draws=draws) for t in range(300)]
    assert set(chosen) == {0, 2, 4}
    slack = 40 if name == "power-of-two" else 0
    assert all(abs(chosen.count(place) - 100) <= slack for place in (0, 2, 4))


def test_random_is_even_and_repeats_with_its_seed() -> None:
    def run(seed: int) -> list[int]:
        draws = Draws(seed)
        return [choose("random", [{}] * 4, eligible=[1, 3], draws=draws) for _ in range(400)]

    first = run(1)
    assert first == run(1) != run(2)
    assert set(first) == {1, 3}
    assert abs(first.count(1) - 200) < 50


def test_round_robin_ignores_load() -> None:
    rows: list[Row] = [{"running": 9.0}, {"running": 0.0}]
    assert [choose("round-robin", rows, turn=t) for t in range(4)] == [0, 1, 0, 1]


def test_power_of_two_compares_two_different_workers() -> None:
    """So the busiest is never chosen, the idlest of n whenever it is looked at: 2 / n."""
    rows: list[Row] = [{"running": float(load)} for load in (3, 0, 9, 5)]
    draws = Draws(3)
    chosen = [choose("power-of-two", rows, draws=draws) for _ in range(1000)]
    assert 2 not in chosen
    assert abs(chosen.count(1) - 500) < 75
    assert {choose("power-of-two", rows, eligible=[2], draws=draws) for _ in range(3)} == {2}


# --------------------------------------------------------------------------------------- examples


def worker(**changes: float) -> Row:
    usual = {"kv_total": 1000.0, "mean_output": 100.0, "iteration_s": 0.05}
    return {**usual, "prefill_token_s": 0.001, **changes}


@pytest.mark.parametrize("name", ["sal-a", "sal-b", "sal-c"])
def test_sal_is_least_queued_prefill_while_memory_lasts(name: str) -> None:
    rows = [
        worker(backlog=300, kv_used=100),
        worker(waiting_tokens=250, kv_used=600),
        worker(backlog=260, kv_used=0),
    ]
    assert choose(name, rows, need=100) == choose("least-queued-prefill", rows) == 1
    rows[0] = worker(waiting_tokens=250, kv_used=500)
    assert choose(name, rows, need=100) == 0, "of equals the one with less KV in use"


def test_sal_variants_differ_where_memory_binds() -> None:
    """The first lacks 60 tokens, which come free at 960 / (100 x 0.05 s) = 192 a second, so in
    0.31 s; the second has 200 to prefill, 0.2 s."""
    rows = [worker(kv_used=960), worker(backlog=200, kv_used=200)]
    assert choose("sal-a", rows, need=100) == 0
    assert choose("sal-b", rows, need=100) == 1
    assert choose("sal-c", rows, need=100) == 1
    assert choose("sal-b", [rows[0], worker(backlog=312, kv_used=200)], need=100) == 1
    assert choose("sal-b", [rows[0], worker(backlog=313, kv_used=200)], need=100) == 0
    # 10 times faster iterations, and memory comes free in 0.03 s.
    rows[0]["iteration_s"] = 0.005
    assert choose("sal-b", rows, need=100) == 0
    # No worker without a deficit: SAL-C takes the least of them.
    rows[1]["kv_used"] = 930
    assert choose("sal-c", rows, need=100) == 1


def test_gauges_follow_workers_that_come_and_go() -> None:
    gauges = gauges_of([{"running": 1.0}, {"running": 2.0}, {"running": 3.0}])
    gauges.delete(1)
    gauges.append()
    assert len(gauges) == 3
    assert gauges.running.tolist() == [1.0, 3.0, 0.0]
    assert all(len(getattr(gauges, name)) == 3 for name in GAUGES)


@pytest.mark.parametrize("name", BALANCERS)
def test_a_thousand_workers_cost_microseconds(name: str) -> None:
    numbers = np.random.default_rng(1)
    gauges = Gauges()
    for gauge in GAUGES:
        setattr(gauges, gauge, numbers.integers(1, 100_000, 1000).astype(float))
    eligible, draws = np.arange(1000), Draws(1)
    began = thread_time()
    for turn in range(500):
        BALANCERS[name](gauges, 100, eligible, turn, draws, CONSTANTS)
    assert (thread_time() - began) / 500 < 200e-6
