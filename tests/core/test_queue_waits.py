"""Waiting queues over time: who waits how long, that nobody starves, and what a call costs."""

import gc
from collections.abc import Iterator
from random import Random
from time import thread_time

import pytest

from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.state import Request
from tests.core.queueing import PREFILL_TOKEN_S, make, request_of, work_s


def waits_of(name: str, load: float, count: int, seed: int = 1) -> list[tuple[float, float]]:
    """(work, wait) in seconds of requests to one server that does prefills one by one."""
    rng, queue = Random(seed), make(name)
    requests, at = [], 0.0
    for number in range(count):
        prompt_tokens = max(8, min(8192, round(rng.lognormvariate(6.8, 0.8))))
        requests.append(request_of(number, prompt_tokens, arrived_at=at))
        at += rng.expovariate(load / (1230 * PREFILL_TOKEN_S))
    waits, now, come = [], 0.0, 0
    while len(waits) < count:
        while come < count and requests[come].arrived_at <= now:
            queue.push(requests[come], now)
            come += 1
        head = queue.head(now)
        if head is None:
            now = requests[come].arrived_at
            continue
        queue.remove(head)
        waits.append((work_s(head), now - head.arrived_at))
        now += work_s(head)
    return waits


def test_short_first_with_ageing_is_quicker_on_average_and_starves_nobody() -> None:
    """One server at 0.95 of its capacity. `sjf` here knows lengths that go with the work, so it is
    the unaged rule whose price is the longest wait."""
    waits = {name: waits_of(name, 0.95, 4000) for name in ("fcfs", "hrrn", "larry", "srpt", "sjf")}
    mean = {name: sum(w for _, w in pairs) / len(pairs) for name, pairs in waits.items()}
    longest = {name: max(w for _, w in pairs) for name, pairs in waits.items()}
    assert mean["larry"] < 0.75 * mean["fcfs"]
    assert mean["hrrn"] < 0.75 * mean["fcfs"]
    assert mean["sjf"] < mean["larry"]
    for name in ("hrrn", "larry", "srpt"):
        assert longest[name] < 0.75 * longest["sjf"], (name, longest)


@pytest.mark.parametrize("name", ["srpt", "mlfq", "edf", "hrrn", "larry", "fair", "fcfs"])
def test_a_long_request_is_served_in_a_stream_of_short_ones(name: str) -> None:
    queue, now = make(name), 0.0
    queue.push(request_of(0, prompt_tokens=16_384, tenant="a", arrived_at=0.0), now)
    for number in range(1, 4000):
        queue.push(request_of(2 * number, 16, tenant="b", arrived_at=now), now)
        queue.push(request_of(2 * number + 1, 16, tenant="b", arrived_at=now), now)
        head = queue.head(now)
        assert head is not None
        if head.number == 0:
            return
        queue.remove(head)
        queue.charge(head, head.input_tokens, 0)
        now += 1.0
    pytest.fail("it starves")


# ------------------------------------------------------------------------------------------ speed


@pytest.fixture
def no_collections() -> Iterator[None]:
    """The collector's pauses depend on what else the process holds."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("name", QUEUES)
def test_the_head_is_cheap_with_ten_thousand_waiting(name: str) -> None:
    """While they come and go and time passes. CPU time of this thread."""
    rng, queue = Random(1), make(name)

    def newcomer(number: int, now: float) -> Request:
        tenant, deadline_ms = f"t{rng.randrange(300)}", rng.choice((None, 500, 5000))
        return request_of(
            number,
            rng.randint(1, 4000),
            priority=int(rng.random() < 0.1),
            tenant=tenant,
            ttft_deadline_ms=deadline_ms,
            arrived_at=now,
        )

    for number in range(10_000):
        queue.push(newcomer(number, number / 1000), number / 1000)
    heads, calls = 0.0, []
    for number in range(10_000, 11_000):
        now = number / 1000
        request = newcomer(number, now)
        began = thread_time()
        head = queue.head(now)
        heads += thread_time() - began
        calls.append(thread_time() - began)
        assert head is not None
        for call in (
            lambda: queue.remove(head),  # noqa: B023
            lambda: queue.charge(head, head.input_tokens, 0),  # noqa: B023
            lambda: queue.push(request, now),  # noqa: B023
        ):
            began = thread_time()
            call()
            calls.append(thread_time() - began)
    assert heads / 1000 < 50e-6
    assert max(calls) < 20e-3
