"""Victims: who is parked when memory does not last."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from services.scheduler.core.policies.lengths import prepare_lengths
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request
from shared import tokens
from tests.core.seam import spec_of

CONSTANTS = Constants()
SHORT_AND_LONG = prepare_lengths(
    np.array([10] * 50 + [100] * 50), None, Constants(history_window=100)
)
"""Of requests that have made more than 10 tokens all make 100 (or go on to their limit)."""


def running(number: int, prompt: int = 10, made: int = 0, **changes: object) -> Request:
    """A request on a worker; its prefill is over if it made tokens."""
    spec = {name: changes.pop(name) for name in ("priority", "max_tokens") if name in changes}
    changes.setdefault("first_token", made > 0)
    return Request(
        spec=spec_of(f"r{number}", **{"max_tokens": 100, **spec}),
        number=number,
        prompt_tokens=prompt,
        tokens=tokens.pack(range(made)),
        **changes,  # type: ignore[arg-type]
    )


def parked(
    name: str,
    requests: list[Request],
    constants: Constants = CONSTANTS,
    return_tokens: float = 0.0,
) -> list[int]:
    """Numbers in the order in which they would be parked."""
    rest, numbers = list(requests), []
    while rest:
        victim = VICTIMS[name](rest, SHORT_AND_LONG, constants, return_tokens)
        rest.remove(victim)
        numbers.append(victim.number)
    return numbers


THREE = [
    running(7, prompt=50, made=20, priority=0),
    running(3, prompt=80, made=5, priority=1),
    running(5, prompt=40, made=40, priority=0),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last-admitted", [5, 3, 7]),
        ("latest-arrival", [7, 5, 3]),
        ("least-computed", [7, 5, 3]),
        ("largest-kv", [3, 5, 7]),
        ("lowest-priority", [3, 7, 5]),
    ],
)
def test_orders_of_parking(name: str, expected: list[int]) -> None:
    assert parked(name, THREE) == expected


def test_who_has_made_much_may_be_nearer_its_end_or_farther() -> None:
    """5 tokens made: half of those end at 10. 20 made: about 80 are left."""
    requests = [running(1, made=5), running(2, made=20), running(3, made=90)]
    assert parked("most-remaining", requests) == [2, 1, 3]


def test_memory_and_time_are_weighed_against_what_coming_back_costs() -> None:
    """Of 80 and 60 that are left, who holds twenty times as much is parked first where coming back
    is free, and spared where it has to be computed anew."""
    requests = [running(1, prompt=1000, made=20), running(2, made=40)]
    assert parked("farthest-end", requests) == [1, 2]
    assert parked("farthest-end", requests, return_tokens=0.01) == [2, 1]


def test_a_prefill_that_runs_is_cheap_to_park() -> None:
    requests = [running(1, made=1), running(2, prompt=900), running(3, made=2)]
    assert parked("least-computed", requests) == [2, 1, 3]


def test_who_has_made_much_is_spared_unless_all_have() -> None:
    spare = Constants(victim_spared_tokens=16)
    requests = [running(1, prompt=500, made=16), running(2, prompt=5, made=17)]
    assert parked("least-computed", requests) == [2, 1]
    assert parked("least-computed", requests, spare) == [1, 2]


@pytest.mark.parametrize("name", VICTIMS)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=8
    ),
    st.integers(0, 3),
)
def test_everybody_can_be_parked_and_equals_from_the_last_admitted_on(
    name: str, shapes: list[tuple[int, int, int]], spared: int
) -> None:
    constants = Constants(victim_spared_tokens=spared)
    requests = [
        running(number, prompt, made, priority=priority)
        for number, (prompt, made, priority) in enumerate(shapes)
    ]
    assert sorted(parked(name, requests, constants)) == list(range(len(shapes)))
    alike = [running(number, 4, 2) for number in range(len(shapes))]
    assert parked(name, alike, constants) == list(range(len(shapes)))[::-1]
