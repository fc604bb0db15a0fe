"""Queues that keep accounts of tenants: who is served, who stands behind, who passes whom."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from services.scheduler.core.policies.fair import ACCOUNTS_MAX, Accounts
from services.scheduler.core.policies.order import Queue
from services.scheduler.core.state import Request
from tests.core.queueing import CONSTANTS, make, request_of, served


def busy(queue: Queue, rng: Random, tenants: str, count: int) -> Iterator[Request]:
    """Serve so many; every tenant always has something waiting."""
    number = 0
    for tenant in tenants * 2:
        number += 1
        queue.push(request_of(number, rng.randint(1, 400), tenant=tenant), 0.0)
    for _ in range(count):
        head = queue.head(0.0)
        assert head is not None
        queue.remove(head)
        number += 1
        queue.push(request_of(number, rng.randint(1, 400), tenant=head.spec.tenant), 0.0)
        yield head


@given(seed=st.integers(0, 2**32), running=st.integers(1, 8))
@settings(max_examples=20)
def test_backlogged_tenants_are_served_alike(seed: int, running: int) -> None:
    """However different their requests: a tenant is ahead by what `running` requests and one
    prompt cost at most, since output is charged when it is there."""
    rng, queue = Random(seed), make("fair")
    given = dict.fromkeys("abc", 0.0)
    open_ones: list[tuple[Request, int]] = []
    longest = {"a": 10, "b": 60, "c": 300}
    for head in busy(queue, rng, "abc", 300):
        queue.charge(head, head.input_tokens, 0)
        given[head.spec.tenant] += head.input_tokens
        open_ones.append((head, rng.randint(1, longest[head.spec.tenant])))
        if len(open_ones) >= running:
            ended, made = open_ones.pop(rng.randrange(len(open_ones)))
            queue.charge(ended, 0, made)
            given[ended.spec.tenant] += 2 * made
        assert max(given.values()) - min(given.values()) <= 400 + running * (400 + 2 * 300)


def test_near_the_head_a_newcomer_passes_larger_ones_that_are_passed() -> None:
    queue = make("volume", backfill_max=3, overtaken_max=32)
    sizes = (4_000, 100, 4_000)
    waiting = [request_of(number, size) for number, size in enumerate(sizes, 1)]
    for request in waiting:
        queue.push(request, 0.0)
    small, large = request_of(9, 200, arrived_at=60.0), request_of(9, 5_000, arrived_at=60.0)
    assert queue.ahead_tokens(small, 60.0) == 8_100
    waiting[0].overtaken = 1
    assert queue.ahead_tokens(small, 60.0) == 4_100
    assert queue.ahead_tokens(large, 60.0) == 8_100
    waiting[0].overtaken = 32
    assert queue.ahead_tokens(small, 60.0) == 8_100, "nobody may pass it again"
    queue.push(request_of(4, 50), 0.0)
    waiting[0].overtaken = 1
    assert queue.ahead_tokens(small, 60.0) == 8_150, "too far back to be tried"


def test_idleness_is_not_saved_up() -> None:
    queue = make("fair")
    for number in (1, 2):
        queue.push(request_of(number, tenant="a"), 0.0)
    queue.charge(request_of(9, tenant="a"), 1000, 500)
    queue.push(request_of(3, tenant="b"), 0.0)
    assert served(queue, 0.0) == [1, 2, 3]
    # Nobody waits: who comes is as well off as the one that was last to leave.
    queue.charge(request_of(9, tenant="b"), 10, 0)
    queue.push(request_of(5, tenant="c"), 0.0)
    queue.push(request_of(4, tenant="b"), 0.0)
    assert served(queue, 0.0) == [4, 5]


def test_accounts_of_tenants_that_are_gone_are_forgotten() -> None:
    accounts = Accounts(CONSTANTS)
    accounts.enter("waits")
    for number in range(3 * ACCOUNTS_MAX):
        accounts.charge(f"t{number}", number + 1, 0)
    kept = sum(accounts.given(f"t{number}") > 0 for number in range(3 * ACCOUNTS_MAX))
    assert 0 < kept <= ACCOUNTS_MAX
    assert accounts.given(f"t{3 * ACCOUNTS_MAX - 1}") == 3 * ACCOUNTS_MAX


@pytest.mark.parametrize("name", ["fair", "volume"])
def test_who_stands_behind_comes_after_everybody_else_and_back_again(name: str) -> None:
    queue = make(name)
    for number, tenant in enumerate("aabbc"):
        queue.push(request_of(number, tenant=tenant), 0.0)
    assert dict(queue.waiting_tenants) == {"a": 2, "b": 2, "c": 1}
    queue.stand_behind(frozenset("ab"))
    assert [r.spec.tenant for r in queue.first(5, 0.0)] == ["c", "a", "b", "a", "b"]
    queue.stand_behind(frozenset("b"))
    assert served(queue, 0.0) == [0, 1, 4, 2, 3]
