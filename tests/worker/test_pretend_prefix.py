"""The pretend worker's prefix cache against single blocks, and composing one iteration ahead."""

from collections import deque
from random import Random

import pytest

from services.worker.core.pretend import LeasedEngine
from services.worker.core.pretend_prefix import FreedBlocks
from tests.worker.test_pretend import Plain, add, run_out


class SingleBlocks:
    """A queue of free blocks, each with what it still holds: (request, which block of it)."""

    def __init__(self, most: int) -> None:
        self.queue: deque[tuple[str, int] | None] = deque([None] * most)

    def take(self, blocks: int) -> None:
        for _ in range(blocks):
            self.queue.popleft()

    def free(self, request_id: str, blocks: int, full: int) -> None:
        self.queue = deque(None if b and b[0] == request_id else b for b in self.queue)
        for block in reversed(range(blocks)):
            self.queue.append((request_id, block) if block < full else None)

    def reuse(self, request_id: str, most: int) -> int:
        found = 0
        while found < most and (request_id, found) in self.queue:
            self.queue.remove((request_id, found))
            found += 1
        self.queue = deque(None if b and b[0] == request_id else b for b in self.queue)
        return found


@pytest.mark.parametrize("seed", range(40))
def test_counts_of_free_blocks_equal_single_ones(seed: int) -> None:
    draws, most = Random(seed), 60
    counted, single = FreedBlocks(most), SingleBlocks(most)
    held: dict[str, int] = {}
    for step in range(200):
        name = draws.choice("abcdef")
        if name in held and draws.random() < 0.5:
            blocks = held.pop(name)
            full = draws.randint(max(0, blocks - 1), blocks)
            counted.free(name, blocks, full)
            single.free(name, blocks, full)
        else:
            found = 0
            if name not in held:
                wish = draws.randint(0, 12)
                found = counted.reuse(name, wish)
                assert found == single.reuse(name, wish), step
            new = draws.randint(0, min(8, len(counted)))
            counted.take(new)
            single.take(new)
            held[name] = held.get(name, 0) + found + new
        assert len(counted) == len(single.queue) == most - sum(held.values())


def parked_and_back(*, prefix_cache: bool, others: int) -> tuple[LeasedEngine, int]:
    """`a` prefills 64 tokens in blocks of 16 and is parked; others take blocks; `a` is back."""
    engine = LeasedEngine(Plain(), kv_tokens=160, block_tokens=16, prefix_cache=prefix_cache)
    engine.configure(margin_tokens=2, iteration_tokens=100, prefill_first=False)
    add(engine, "a", 0.0, prompt_tokens=64, lease_tokens=8)
    told = engine.advance(engine.next_at() or 0.0)
    engine.park("a", 1, told[0].at)
    told = run_out(engine)
    made = sum(report.tokens for report in told) + 1
    now = told[-1].at
    for number in range(others):
        add(engine, f"b{number}", now, prompt_tokens=32, lease_tokens=1, true_length=1)
        now = run_out(engine)[-1].at
    add(engine, "a", now, attempt=2, prompt_tokens=64, made=made, lease_tokens=4)
    before = engine.tally.prefill_tokens
    first = engine.advance(engine.next_at() or 0.0)[0]
    assert first.first
    assert engine.tally.prefill_tokens - before == 64 + made - first.cached_tokens
    return engine, first.cached_tokens


def test_who_comes_back_computes_only_what_is_gone() -> None:
    assert parked_and_back(prefix_cache=False, others=0)[1] == 0
    assert parked_and_back(prefix_cache=True, others=0)[1] == 64
    # 10 blocks; `a` freed 5 of them after 5 that nobody had used. Three others take two each, and
    # give them back behind `a`'s: the last of them has taken one of `a`'s, its newest.
    assert parked_and_back(prefix_cache=True, others=3)[1] == 64
    assert parked_and_back(prefix_cache=True, others=4)[1] == 32
    assert parked_and_back(prefix_cache=True, others=5)[1] == 0


def test_what_was_found_is_in_use_again() -> None:
    engine, found = parked_and_back(prefix_cache=True, others=0)
    assert found == 64
    assert engine.pool.used == 5
    run_out(engine)
    engine.drop("a", 2, 1e6)
    assert engine.pool.used == 0
    assert engine.pool.freed is not None
    assert len(engine.pool.freed) == engine.pool.most


@pytest.mark.parametrize(("after_s", "joins_at"), [(None, 1), (0.004, 2)])
def test_who_comes_after_an_iteration_was_composed_sits_it_out(
    after_s: float | None, joins_at: int
) -> None:
    engine = LeasedEngine(Plain(), kv_tokens=1600, block_tokens=16, composes_after_s=after_s)
    engine.configure(margin_tokens=1, iteration_tokens=100, prefill_first=False)
    add(engine, "a", 0.0, prompt_tokens=10, lease_tokens=100)
    ends = [engine.next_at() or 0.0]
    add(engine, "b", 0.003, prompt_tokens=10)  # in time: the iteration began at 0
    add(engine, "c", 0.005, prompt_tokens=10)
    firsts: dict[str, float] = {}
    while len(firsts) < 3:
        at = engine.next_at()
        assert at is not None
        firsts |= {told.request_id: told.at for told in engine.advance(at) if told.first}
        ends.append(engine.next_at() or 0.0)
    assert firsts["b"] == ends[1]
    assert firsts["c"] == ends[joins_at]


def test_an_engine_without_work_lets_nobody_sit_out() -> None:
    engine = LeasedEngine(Plain(), kv_tokens=1600, block_tokens=16, composes_after_s=0.0)
    engine.configure(margin_tokens=1, iteration_tokens=100, prefill_first=False)
    add(engine, "a", 0.0, true_length=1)
    add(engine, "b", 0.005, true_length=1)
    told = {report.request_id: report.at for report in run_out(engine)}
    assert told == pytest.approx({"a": 0.02, "b": 0.04})
