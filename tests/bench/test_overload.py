"""The figures of overload and soak, from what clients saw."""

import msgspec
import pytest

from bench.crowd import Visit, read_head
from bench.overload import good, phase_of, truths_of
from bench.small_mesh import Rss, Size
from bench.soak import memory_of
from services.gateway.core.door import Door


def refused(sent_at: float, told_s: float) -> Visit:
    visit = Visit(client=1, tokens=10, sent_at=sent_at, status=429, retry_after_s=told_s)
    visit.outcome, visit.ended_at = "refused", sent_at
    return visit


def served(sent_at: float, first_s: float = 1.0, tokens: int = 11, last_s: float = 2.0) -> Visit:
    visit = Visit(client=1, tokens=tokens, sent_at=sent_at, status=200, got=tokens)
    visit.first_at, visit.last_at = sent_at + first_s, sent_at + last_s
    visit.outcome, visit.ended_at = "complete", visit.last_at
    return visit


def test_the_truth_of_a_refusal_is_when_the_next_one_is_taken_in() -> None:
    visits = [served(0.0), refused(1.0, 4.0), refused(2.0, 3.0), served(5.0), refused(6.0, 1.0)]
    truths = truths_of([v for v in visits if v.outcome == "refused"], visits)
    assert [truth for _, truth in truths] == [4.0, 3.0], "of the last one nothing is known"


def test_a_phase_counts_what_was_in_time() -> None:
    size = Size(rate=10.0)
    late, slow = served(0.0, first_s=16.0, last_s=17.0), served(0.0, last_s=4.0)
    assert [good(v, size) for v in (served(0.0), late, slow)] == [True, False, False]
    visits = [served(0.0), slow, refused(1.0, 2.0), served(3.0)]
    phase = phase_of("thrice", 3.0, 0.0, 10.0, visits, [Rss(at_s=0.0, mb={"gateway": 5.0})], size)
    assert (phase.goodput_rps, phase.completed_rps, phase.refused) == (0.2, 0.3, 1)
    assert phase.retry_error == pytest.approx(0.0)


def test_the_headers_of_a_refusal_are_read() -> None:
    visit = Visit(client=1, tokens=1)
    read_head(visit, b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nretry-after-ms: 2500")
    assert (visit.status, visit.retry_after_s, visit.retry_after_ms) == (429, 3.0, 2500.0)
    assert visit.predicted_start_ms is None


def test_memory_is_compared_between_a_sixth_of_the_run_and_its_end() -> None:
    samples = [
        Rss(at_s=float(at), mb={"gateway": 50.0 if at < 10 else 100.0 + at}) for at in range(60)
    ]
    memory = memory_of(samples, 60.0)["gateway"]
    assert memory.first == pytest.approx(112.5)
    assert memory.last == pytest.approx(157.0)
    assert memory.growth > 0.3
    assert msgspec.json.encode(memory)


def test_a_gateways_door_tells_when_it_opens() -> None:
    door, now = Door(limit=100), 0.0
    assert not door.refuses(99, now)
    while now < 60:
        now += 0.5
        door.left(1, now)
    assert door.refuses(100, now)
    assert door.opens_at == 80, "ten seconds of calls, at two a second"
    told = door.opens_in_s(100, now)
    assert told == pytest.approx(10, rel=0.1)
    assert door.refuses(81, now + 9.5)
    assert not door.refuses(80, now + 10)
