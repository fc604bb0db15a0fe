"""Gates: each one's rule at its edge, in tokens and in blocks, and that none ever raises."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.future import peak
from services.scheduler.core.policies.gates import GATES, Gate
from services.scheduler.core.policies.lengths import LengthModel, prepare_lengths
from services.scheduler.core.policies.members import Columns, Member, View, columns
from services.scheduler.core.settings import Constants

PLAIN = Constants(count_last_token=True, cold_start_share=0.0)
"""Tokens as the sources count them."""
RUNNING = [Member(100, 50, 200, 120), Member(300, 10, 100, 100)]
"""Hold 460; at worst 700. With true lengths: (150, 70), (310, 90) -> M* = max(310 + 90,
460 + 2 x 70) = 600."""


def history(lengths: Sequence[int] = (100,), constants: Constants = PLAIN) -> LengthModel:
    return prepare_lengths(np.array(lengths, dtype=np.int64), None, constants)


def gate(
    name: str,
    capacity: int,
    constants: Constants = PLAIN,
    members: Sequence[Member] = RUNNING,
    block: int = 1,
    lengths: LengthModel | None = None,
) -> Gate:
    model = lengths or history(constants=constants)
    return GATES[name](View(capacity, block, members, model, constants, Draws(1)))


def least_capacity(name: str, candidate: Member, **how: object) -> int:
    """The smallest memory in which the gate lets the candidate in; it has to be monotone."""
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        if gate(name, middle, **how).admits(candidate):  # type: ignore[arg-type]
            high = middle
        else:
            low = middle
    return high


NEW = Member(40, 0, 100, 80)
AGAIN = Member(40, 30, 100, 80)


@pytest.mark.parametrize(
    ("name", "constants", "new", "again"),
    [
        ("aggressive", replace(PLAIN, aggressive_watermark=1.0), 500, 530),
        ("aggressive", replace(PLAIN, aggressive_watermark=0.5), 1000, 1060),
        (
            "aggressive",
            replace(PLAIN, aggressive_watermark=1.0, aggressive_counts_made=False),
            500,
            500,
        ),
        (
            "aggressive",
            replace(PLAIN, aggressive_watermark=1.0, aggressive_full_at=0.5),
            921,
            921,
        ),
        ("conservative", PLAIN, 840, 840),
        ("conservative", replace(PLAIN, conservative_overcommit=2.0), 420, 420),
        ("conservative", replace(PLAIN, conservative_output_tokens=1000), 3440, 3440),
        ("reserve-all", PLAIN, 837, 837),
        ("prompt-fits", PLAIN, 500, 530),
        ("prompt-fits", replace(PLAIN, prompt_watermark=0.5), 1000, 1060),
        ("prompt-fits", replace(PLAIN, count_last_token=False), 498, 528),
        ("next-step", PLAIN, 503, 533),
        ("larry-a", replace(PLAIN, larry_reserve=0.5), 1000, 1060),
        # Three alive when the first ends: 460 + 40 + 3 x 70 = 710; again: its own end is first,
        # (460 + 70) + 3 x 50 = 680, then (150 + 310) + 2 x 70. Below the limit, so one more.
        ("oracle", PLAIN, 711, 681),
        ("oracle", replace(PLAIN, oracle_reserve=0.5), 1421, 1361),
        ("oracle", replace(PLAIN, count_last_token=False), 708, 678),
    ],
)
def test_each_rule_at_its_edge(name: str, constants: Constants, new: int, again: int) -> None:
    assert least_capacity(name, NEW, constants=constants) == new
    assert least_capacity(name, AGAIN, constants=constants) == again


def test_past_future_with_a_certain_history_is_the_exact_peak() -> None:
    """All of history is 100 tokens, and nobody may be longer: r = 50, 90 and 100."""
    constants = replace(PLAIN, future_reserve=0.0, lengths_interpolated=False)
    expected = peak([150, 310, 40], [50, 90, 100])
    assert least_capacity("past-future", NEW, constants=constants) == expected + 1
    reserved = replace(constants, future_reserve=0.2)
    assert least_capacity("past-future", NEW, constants=reserved) == int(expected / 0.8) + 1


def test_past_future_takes_the_largest_of_its_samples() -> None:
    """Of histories with two lengths more lists see the longer one more often."""
    model = history([10] * 50 + [1000] * 50)
    shares = {}
    for lists in (1, 5):
        constants = replace(PLAIN, future_lists_max=lists, future_reserve=0.0)
        members = [Member(10, 0, 1000)]
        admitted = [
            GATES["past-future"](View(1500, 1, members, model, constants, Draws(seed))).admits(
                Member(10, 0, 1000)
            )
            for seed in range(400)
        ]
        shares[lists] = sum(admitted) / 400
    assert 0.65 < shares[1] < 0.9
    assert shares[5] < 0.35


def test_what_it_was_admitted_with_stays() -> None:
    """The length drawn for `admits` is the one with which it joins. The second one will surely
    make 990 more: it fits exactly if the first is going to end before."""
    constants = replace(PLAIN, lengths_interpolated=False, future_reserve=0.0, future_lists_max=1)
    model = history([10, 1000], constants)
    first, second = Member(10, 0, 1000), Member(95, 10, 1000)
    drawn = set()
    for seed in range(30):
        view = View(1100, 1, [Member(1, 1, 1)], model, constants, Draws(seed))
        entry = GATES["past-future"](view)
        assert entry.admits(first)
        entry.add(first if seed % 2 else replace(first, made=5))  # as it is, or with a lease
        length = int(model.candidate(0, 1000, Draws(seed, drawn=1), 1)[0])
        assert entry.admits(second) == (length == 10)
        drawn.add(length)
    assert drawn == {10, 1000}


@pytest.mark.parametrize("name", GATES)
def test_in_blocks_every_request_is_rounded_up(name: str) -> None:
    """Blocks of 16 need at least as much memory as tokens, and at most 15 a request more."""
    constants = replace(Constants(cold_start_share=0.0), lengths_interpolated=False)
    exact = least_capacity(name, NEW, constants=constants)
    rounded = least_capacity(name, NEW, constants=constants, block=16)
    factor = {"larry-a": 1 / 0.95}.get(name, 1.0)
    assert exact <= rounded <= exact + 16 + 45 * factor * 1.04


@pytest.mark.parametrize("name", GATES)
def test_joining_counts(name: str) -> None:
    """One after the other, a worker fills up, and is then as full as if all had been there."""
    constants = replace(PLAIN, lengths_interpolated=False)
    entry, joined = gate(name, 5000, constants), list(RUNNING)
    while entry.admits(NEW):
        entry.add(NEW)
        joined.append(NEW)
        assert len(joined) < 200
    assert len(joined) > 10
    assert not gate(name, 5000, constants, joined).admits(NEW)
    assert gate(name, 5000, constants, joined[:-1]).admits(NEW)


@pytest.mark.parametrize("name", GATES)
def test_an_empty_worker_takes_whoever_it_can_hold(name: str) -> None:
    big = Member(990, 5, 4000, 4000)
    assert gate(name, 1000, members=[]).admits(big)
    assert not gate(name, 994, members=[]).admits(big)
    entry = gate(name, 1000, members=[])
    entry.add(big)
    assert not entry.admits(big)


@pytest.mark.parametrize("name", GATES)
def test_columns_are_members(name: str) -> None:
    as_columns = columns(RUNNING)
    assert list(as_columns) == RUNNING
    assert list(as_columns[1:]) == RUNNING[1:]
    assert isinstance(as_columns[:1], Columns)
    for capacity in range(400, 1200, 7):
        answers = {gate(name, capacity, members=m).admits(NEW) for m in (RUNNING, as_columns)}
        assert len(answers) == 1


odd = st.sampled_from((-(2**40), -5, -1, 0, 1, 15, 16, 17, 4096, 2**40))
members = st.builds(Member, odd, odd, odd, odd)


@given(
    st.sampled_from(sorted(GATES)),
    odd,
    odd,
    st.lists(members, max_size=4),
    st.lists(members, min_size=1, max_size=3),
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
    st.booleans(),
)
def test_nothing_makes_a_gate_raise(
    name: str,
    capacity: int,
    block: int,
    running: list[Member],
    candidates: list[Member],
    lengths: list[int],
    quirks: bool,
) -> None:
    constants = Constants(
        history_window=4,
        lengths_within_cap=not quirks,
        lengths_interpolated=not quirks,
        requeued_conditioned=not quirks,
        cold_start_tokens=512 * quirks,
        future_lists_max=0,
        future_lists_budget=0,
    )
    view = View(capacity, block, running, history(lengths, constants), constants, Draws(0))
    entry = GATES[name](view)
    for candidate in candidates:
        assert entry.admits(candidate) in (True, False)
        entry.add(candidate)
