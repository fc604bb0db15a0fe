"""Waiting queues against their definitions: plain lists, sorted anew for every question."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings, strategies as st

from services.scheduler.core.policies.levels import level
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.state import Request
from tests.core.queueing import (
    CONSTANTS,
    ESTIMATES,
    PREFILL_TOKEN_S,
    TOKEN_S,
    expected_output,
    make,
    request_of,
    served,
    work_s,
)

# ------------------------------------------------------------------------------------ definitions


def age(request: Request, now: float) -> float:
    return now - (request.since if request.output_tokens else request.arrived_at)


def due(request: Request) -> float:
    dues = []
    if request.output_tokens == 0 and request.spec.ttft_deadline_ms is not None:
        dues.append(request.arrived_at + request.spec.ttft_deadline_ms / 1000)
    if request.spec.deadline_ms is not None:
        dues.append(request.arrived_at + request.spec.deadline_ms / 1000)
    began = request.since if request.output_tokens else request.arrived_at
    return min(dues) if dues else began + CONSTANTS.edf_default_s


def queue_level(request: Request) -> int:
    """With all quanta from the joined level on added up."""
    quanta = [CONSTANTS.mlfq_quantum_s * 2**q for q in range(CONSTANTS.mlfq_levels)]
    last = len(quanta) - 1
    prefill_s = request.input_tokens * PREFILL_TOKEN_S
    service_s = prefill_s + request.output_tokens * TOKEN_S
    joined = next((q for q in range(last) if quanta[q] >= prefill_s), last)
    sums = [sum(quanta[joined : q + 1]) for q in range(joined, last)]
    return joined + sum(service_s > used for used in sums)


def level_key(request: Request, now: float) -> tuple[float, float]:
    """Levels in turn, first in, first out; promoted ones entered the first when they were."""
    place, waited = queue_level(request), age(request, now)
    if place and waited >= CONSTANTS.mlfq_idle_s:
        return 0, -(waited - CONSTANTS.mlfq_idle_s)
    return place, -waited


def response_ratio(request: Request, now: float) -> float:
    return age(request, now) / (request.input_tokens * PREFILL_TOKEN_S)


def latest_start(request: Request) -> float | None:
    """By what is expected of it, when it has to begin to keep its deadlines."""
    prefill_s, spec = request.input_tokens * PREFILL_TOKEN_S, request.spec
    decode_s = (expected_output(request) - request.output_tokens) * TOKEN_S
    dues = []
    if request.output_tokens == 0 and spec.ttft_deadline_ms is not None:
        dues.append(spec.ttft_deadline_ms / 1000 - prefill_s)
    if spec.deadline_ms is not None:
        dues.append(spec.deadline_ms / 1000 - prefill_s - decode_s)
    return request.arrived_at + min(dues) if dues else None


def is_late(request: Request, now: float) -> bool:
    latest = latest_start(request)
    return latest is not None and latest < now


def volume_key(request: Request) -> float:
    """Arrival and at most 10 s, or when it has to begin."""
    left = expected_output(request) - request.output_tokens
    share = min(1.0, (request.input_tokens * left + left**2 / 2) / (3 * 1e5))
    began = request.since if request.output_tokens else request.arrived_at
    latest = latest_start(request)
    return min(began + 10 * share, latest if latest is not None else float("inf"))


DEFINITIONS: dict[str, Callable[[Request, float, int], object]] = {
    "fcfs": lambda r, now, count: 0,
    "sjf": lambda r, now, count: expected_output(r),
    "spf": lambda r, now, count: r.input_tokens,
    "srpt": lambda r, now, count: expected_output(r) - r.output_tokens - 16 * age(r, now),
    "mlfq": lambda r, now, count: level_key(r, now),
    "edf": lambda r, now, count: due(r),
    "hrrn": lambda r, now, count: -response_ratio(r, now),
    "larry": lambda r, now, count: -(age(r, now) - min(count, 100) * work_s(r)),
}


@dataclass
class Plain:
    """Waiting requests as a list, sorted by the definition."""

    name: str
    victims_first: bool
    waiting: dict[str, Request] = field(default_factory=dict)
    given: dict[str, float] = field(default_factory=dict)
    last: str = ""

    def push(self, request: Request) -> None:
        tenant = request.spec.tenant
        backlogged = {r.spec.tenant for r in self.waiting.values()}
        if tenant not in backlogged:
            lift = [self.given.get(t, 0.0) for t in backlogged or {self.last}]
            self.given[tenant] = max(self.given.get(tenant, 0.0), min(lift))
        self.waiting[request.request_id] = request

    def remove(self, request: Request) -> None:
        if self.waiting.pop(request.request_id, None) is not None:
            self.last = request.spec.tenant

    def ordered(self, now: float) -> list[Request]:
        ranks: dict[tuple[int, bool, bool], list[Request]] = {}
        for request in self.waiting.values():
            victim = self.victims_first and request.evicted_at > 0
            late = self.name == "volume" and not victim and is_late(request, now)
            ranks.setdefault((request.spec.priority, not victim, late), []).append(request)
        ordered: list[Request] = []
        for (_, other, _), members in sorted(ranks.items()):
            if not other:
                ordered += sorted(members, key=lambda r: (-r.evicted_at, r.number))
            elif self.name in ("fair", "volume"):
                ordered += self._by_turns(members)
            else:
                key = DEFINITIONS[self.name]
                count = len(members)
                ordered += sorted(members, key=lambda r: (key(r, now, count), r.number))
        return ordered

    def _by_turns(self, members: list[Request]) -> list[Request]:
        given, rest, ordered = dict(self.given), list(members), []
        key = volume_key if self.name == "volume" else lambda request: 0.0
        while rest:
            least = min(given[r.spec.tenant] for r in rest)
            tenants = {r.spec.tenant for r in rest if given[r.spec.tenant] == least}
            heads = [
                min((r for r in rest if r.spec.tenant == t), key=lambda r: (key(r), r.number))
                for t in tenants
            ]
            chosen = min(heads, key=lambda r: r.number)
            rest.remove(chosen)
            ordered.append(chosen)
            given[chosen.spec.tenant] += chosen.input_tokens
        return ordered


quarters = st.integers(0, 40).map(lambda n: n / 4)
newcomers = st.builds(
    dict,
    prompt_tokens=st.integers(1, 6).map(lambda n: 64 * n),
    made=st.sampled_from((0, 0, 1, 8, 40)),
    priority=st.sampled_from((0, 0, 0, 1, -1)),
    tenant=st.sampled_from("abc"),
    ttft_deadline_ms=st.sampled_from((None, 250, 4000)),
    deadline_ms=st.sampled_from((None, 8000)),
    before=quarters,
    evicted_at=st.sampled_from((0.0, 0.0, 0.0, 1.0, 2.0)),
)
steps = st.one_of(
    st.tuples(st.just("push"), newcomers),
    st.tuples(st.just("pass"), quarters),
    st.tuples(st.just("serve"), st.integers(0, 60)),
    st.tuples(st.just("remove"), st.integers(0, 1000)),
    st.tuples(st.just("again"), st.integers(0, 1000)),
)


@pytest.mark.parametrize("name", QUEUES)
@given(script=st.lists(steps, min_size=1, max_size=40), victims_first=st.booleans())
@settings(max_examples=40)
def test_a_queue_is_in_the_order_of_its_definition(
    name: str, script: list[tuple[str, object]], victims_first: bool
) -> None:
    queue, plain = make(name, victims_first=victims_first), Plain(name, victims_first)
    now, number = 10.0, 0
    for step, what in script:
        some = list(plain.waiting.values())
        head = queue.head(now)
        if step == "push":
            assert isinstance(what, dict)
            number += 1
            changes = dict(what)
            since = now - changes.pop("before")
            request = request_of(number, arrived_at=since, since=since, **changes)
            queue.push(request, now)
            plain.push(request)
        elif step == "pass":
            assert isinstance(what, float)
            now += what
        elif step == "serve" and head is not None:
            assert isinstance(what, int)
            queue.remove(head)
            plain.remove(head)
            queue.charge(head, head.input_tokens, what)
            plain.given[head.spec.tenant] += head.input_tokens + 2 * what
        elif step in ("remove", "again") and some:
            assert isinstance(what, int)
            request = some[what % len(some)]
            if step == "remove":
                plain.remove(request)
                queue.remove(request)
                queue.remove(request)
            else:
                queue.push(request, now)
        expected = plain.ordered(now)
        assert [r.number for r in queue.ordered(now)] == [r.number for r in expected]
        few = [r.number for r in queue.first(3, now)]
        assert few == [r.number for r in expected[:3]]
        assert queue.head(now) is (expected[0] if expected else None)
        assert len(queue) == len(expected)


# --------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", QUEUES)
def test_priorities_come_first_and_victims_lead_theirs(name: str) -> None:
    queue = make(name)
    for number, priority, evicted_at in ((1, 1, 0), (2, 0, 0), (3, 0, 5.0), (4, 1, 9.0), (5, 0, 6)):
        queue.push(request_of(number, priority=priority, evicted_at=float(evicted_at)), 10.0)
    assert served(queue, 10.0) == [5, 3, 2, 4, 1]


def test_victims_wait_like_others_where_a_policy_wants_it() -> None:
    queue = make("fcfs", victims_first=False)
    for number, evicted_at in ((1, 0.0), (2, 5.0)):
        queue.push(request_of(number, evicted_at=evicted_at), 10.0)
    assert served(queue, 10.0) == [1, 2]


def test_a_pushed_request_that_changed_is_ranked_anew() -> None:
    queue = make("fcfs")
    first, second = request_of(1), request_of(2)
    queue.push(first, 0.0)
    queue.push(second, 0.0)
    second.evicted_at = 1.0
    queue.push(second, 1.0)
    assert served(queue, 1.0) == [2, 1]


def test_deadlines_of_the_first_token_count_until_there_is_one() -> None:
    queue = make("edf")
    queue.push(request_of(1, ttft_deadline_ms=500, arrived_at=0.0), 0.0)
    queue.push(request_of(2, ttft_deadline_ms=400, arrived_at=0.0, made=1, since=1.0), 1.0)
    queue.push(request_of(3, arrived_at=0.0), 0.0)
    queue.push(request_of(4, deadline_ms=20_000, ttft_deadline_ms=900, arrived_at=0.0), 0.0)
    assert served(queue, 1.0) == [1, 4, 3, 2]


@pytest.mark.parametrize(
    ("prompt_tokens", "made", "expected"),
    [
        (64, 0, 0),  # 1/16 s of prefill, quantum 1/8 s
        (129, 0, 1),  # skips a level whose quantum is below its prefill
        (1000, 0, 3),
        (64, 1, 1),  # 1/16 s of prefill and as much of output, and the new token to be prefilled
        (63, 1, 0),
        (64, 4, 1),
        (64, 5, 2),
        (9000, 500, 4),  # the last one is never left
    ],
)
def test_levels(prompt_tokens: int, made: int, expected: int) -> None:
    assert level(request_of(1, prompt_tokens, made), CONSTANTS, ESTIMATES) == expected


def test_who_idles_long_enough_moves_to_the_first_level() -> None:
    queue = make("mlfq")
    queue.push(request_of(1, prompt_tokens=1000, arrived_at=0.0), 0.0)
    queue.push(request_of(2, arrived_at=2.75), 2.75)
    queue.push(request_of(3, prompt_tokens=129, arrived_at=2.75), 2.75)
    assert [r.number for r in queue.ordered(2.9)] == [2, 3, 1]
    assert [r.number for r in queue.ordered(3.0)] == [2, 1, 3]
    queue.push(request_of(4, arrived_at=3.25), 3.25)
    assert served(queue, 3.5) == [2, 1, 4, 3]


def test_the_response_ratio_of_short_requests_grows_faster() -> None:
    queue = make("hrrn")
    long, short = request_of(1, prompt_tokens=1000, arrived_at=0.0), request_of(2, arrived_at=4.0)
    for request in (long, short):
        queue.push(request, 4.0)
    assert [queue.head(now) for now in (4.0, 4.25, 4.5)] == [long, long, short]


def test_larry_is_first_come_first_served_while_few_wait() -> None:
    """One second of work more is worth as many seconds of waiting as there are requests."""
    pair = [request_of(1, prompt_tokens=1024, arrived_at=0.0), request_of(2, arrived_at=2.0)]
    queue = make("larry")
    for request in pair:
        queue.push(request, 2.0)
    assert queue.head(2.0) is pair[0]
    for number in range(3, 8):
        queue.push(request_of(number, arrived_at=2.0), 2.0)
    assert queue.head(2.0) is pair[1]


def test_like_requests_of_a_burst_keep_their_order_while_the_mean_volume_follows_them() -> None:
    """The least that is needed of a scale: it stands still until the mean is a quarter off."""
    mean = [1e4]
    estimates = replace(ESTIMATES, mean_volume=lambda: mean[0])
    queue = QUEUES["volume"](CONSTANTS, estimates)
    for number in range(20):
        queue.push(request_of(number, arrived_at=number / 1000), number / 1000)
        mean[0] *= 1.01
    assert served(queue, 1.0) == list(range(20))
    queue.push(request_of(20, arrived_at=2.0), 2.0)
    mean[0] *= 1.3  # a boost is worth less now
    queue.push(request_of(21, arrived_at=2.001), 2.001)
    assert served(queue, 3.0) == [21, 20]


def test_a_newcomer_stands_behind_equals_that_came_before_it() -> None:
    """Tenants that come while others wait are lifted to the same account."""
    queue = make("volume", volume_boost_s=0.0)
    for number in range(5):
        queue.push(request_of(number, 100, tenant=f"t{number}"), 0.0)
    newcomer = request_of(5, 50, tenant="new")
    assert queue.ahead_tokens(newcomer, 0.0) == 500
    queue.charge(request_of(9, 100, tenant="t4"), 1_000, 0)
    assert queue.ahead_tokens(newcomer, 0.0) == 400
