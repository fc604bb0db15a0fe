"""The pretend engines against a loop over iterations, against arithmetic, and at their edges."""

from dataclasses import dataclass
from random import Random

import pytest

from services.worker.core.pretend import LeasedEngine
from services.worker.core.pretend_closed import ClosedEngine, Row
from services.worker.core.pretend_parts import GapLog, Progress, noise_of
from tests.worker.slow_engine import Sequence, SlowEngine


@dataclass(frozen=True)
class Plain:
    """Costs in round numbers: prefill 1 ms a token, decodes 10 ms and 1 us a context token."""

    def iteration_s(self, prefill: object, decodes: int, kv_tokens: int) -> float:
        tokens = sum(chunk for chunk, _ in prefill)  # type: ignore[attr-defined]
        return 0.01 + 0.001 * tokens + 1e-6 * kv_tokens

    def decode_steps_s(self, decodes: int, kv_tokens: int, steps: int) -> float:
        return steps * (0.01 + 1e-6 * (kv_tokens + decodes * (steps - 1) / 2))

    def decode_steps_within(self, decodes: int, kv_tokens: int, seconds: float) -> int:
        steps = 0
        while self.decode_steps_s(decodes, kv_tokens, steps + 1) <= seconds + 1e-12:
            steps += 1
        return steps

    def padded_s(self, batch: int, input_tokens_max: int, iterations: int) -> float:
        prefill = 0.01 + 0.001 * batch * input_tokens_max
        context = batch * (input_tokens_max + 1)
        return prefill + self.decode_steps_s(batch, context, iterations - 1)


def add(engine: LeasedEngine, request_id: str, now: float, **changes: int) -> None:
    given = {"attempt": 1, "prompt_tokens": 10, "made": 0, "lease_tokens": 8}
    given |= {"true_length": 100, "max_tokens": 200} | changes
    attempt = given.pop("attempt")
    engine.add(request_id, attempt, now=now, **given)


def run_out(engine: LeasedEngine, until: float = 1e9) -> list[Progress]:
    told = []
    while (at := engine.next_at()) is not None and at <= until:
        told += engine.advance(at)
    return told


def test_a_request_alone_step_by_step() -> None:
    engine = LeasedEngine(Plain(), kv_tokens=160, block_tokens=16)
    engine.configure(margin_tokens=2, iteration_tokens=100, prefill_first=False)
    add(engine, "a", 5.0, true_length=12)
    told = run_out(engine)
    assert [(t.position, t.tokens, t.first, t.resident) for t in told] == [
        (0, 1, True, True),
        (1, 5, False, True),
        (6, 2, False, True),
    ]
    assert told[0].at == pytest.approx(5.02)
    assert engine.kv_tokens == 32
    assert engine.running == 0
    engine.renew("a", 1, 20, now=9.0)
    (end,) = run_out(engine)
    assert (end.position, end.tokens, end.finish_reason, end.resident) == (8, 4, "stop", False)
    assert end.gap_s == pytest.approx(9.0 + 0.010018 - told[2].at, abs=1e-6)
    assert (engine.kv_tokens, engine.seats, engine.next_at()) == (0, 0, None)


def random_history(seed: int) -> None:
    """The same orders to both engines, one event at a time."""
    rng = Random(seed)
    block, margin = rng.choice((1, 4, 16)), rng.randint(0, 6)
    budget, first = rng.choice((20, 64, 1000)), rng.random() < 0.3
    fast = LeasedEngine(Plain(), kv_tokens=1_000_000, block_tokens=block)
    fast.configure(margin, budget, first)
    slow = SlowEngine(Plain(), block, margin, budget, first)
    told: list[Progress] = []
    now, count = 0.0, 0
    for _ in range(60):
        now += rng.choice((0.0, 0.003, 0.05, 0.4)) * rng.random()
        told += run_out(fast, now)
        slow.run_to(now)
        known = sorted(s.request_id for s in slow.sequences)
        kind = rng.choice(("add", "renew", "renew", "renew", "park", "drop")) if known else "add"
        if kind == "add":
            count += 1
            prompt, made = rng.randint(1, 150), rng.choice((0, 0, 7))
            length, lease = made + rng.randint(1, 60), rng.randint(1, 20)
            cap = length + rng.choice((0, 50))
            name = f"r{count}"
            slow.say("add", Sequence(name, 1, prompt, made, length, made + lease, cap), now)
            fast.add(
                name,
                1,
                prompt_tokens=prompt,
                made=made,
                lease_tokens=lease,
                true_length=length,
                max_tokens=cap,
                now=now,
            )
            continue
        name = rng.choice(known)
        until = next(s.until for s in slow.sequences if s.request_id == name) + rng.randint(1, 20)
        slow.say(kind, (name, until), now)
        if kind == "renew":
            fast.renew(name, 1, until, now)
        else:
            getattr(fast, kind)(name, 1, now)
        assert {(i, p) for i, _, p in fast.positions(now)} == {
            (s.request_id, s.made) for s in slow.sequences
        } or slow.inbox
    told += run_out(fast, now + 50)
    slow.run_to(now + 50)
    assert fast.tally.kv_blocks_peak == slow.blocks_peak
    assert_same(told, slow)


def assert_same(told: list[Progress], slow: SlowEngine) -> None:
    order = sorted(told, key=lambda t: (round(t.at, 7), t.request_id, t.position))
    expected = sorted(slow.told, key=lambda t: (round(t[2], 7), t[0], t[3]))
    assert [
        (t.request_id, t.attempt, t.position, t.tokens, bool(t.finish_reason), t.resident)
        for t in order
    ] == [(r, a, p, n, bool(reason), resident) for r, a, _, p, n, reason, resident, _ in expected]
    for mine, theirs in zip(order, expected, strict=True):
        assert mine.at == pytest.approx(theirs[2], abs=1e-7)
        assert mine.gap_s == pytest.approx(theirs[7], abs=1e-7), mine


@pytest.mark.parametrize("seed", range(60))
def test_jumps_equal_single_iterations(seed: int) -> None:
    random_history(seed)


def test_decodes_stall_while_prefill_goes_first() -> None:
    engine = LeasedEngine(Plain(), kv_tokens=10_000, block_tokens=1)
    engine.configure(0, 50, prefill_first=True)
    add(engine, "a", 0.0, lease_tokens=50, true_length=9)
    engine.advance(0.02)
    add(engine, "b", 0.025, prompt_tokens=100, true_length=1)
    told = {t.request_id: t for t in run_out(engine)}
    assert told["b"].at == pytest.approx(0.03 + 2 * 0.06, abs=1e-4)
    assert told["a"].gap_s == pytest.approx(0.13, abs=1e-3)


def test_noise_averages_out_over_a_jump() -> None:
    rng = Random(1)
    noise = noise_of(rng.gauss, 0.1)
    one = [noise(1) for _ in range(4000)]
    many = [noise(100) for _ in range(4000)]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return float((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)

    assert deviation(one) == pytest.approx(0.1, rel=0.05)
    assert deviation(many) == pytest.approx(0.01, rel=0.05)


def test_an_overcommitted_pool_evicts_the_newest() -> None:
    engine = LeasedEngine(Plain(), kv_tokens=40, block_tokens=1)
    engine.configure(0, 100, False)
    add(engine, "a", 0.0, lease_tokens=90)
    add(engine, "b", 0.001, lease_tokens=90)
    told = run_out(engine)
    (gone, paused) = [t for t in told if not t.first]
    assert (gone.request_id, gone.evicted, gone.resident) == ("b", True, False)
    assert gone.tokens > 0
    assert engine.tally.evictions == 2
    assert engine.tally.kv_blocks_peak <= 40
    assert (paused.request_id, paused.evicted) == ("a", True)


def test_an_older_attempt_gives_way() -> None:
    engine = LeasedEngine(Plain(), kv_tokens=400)
    add(engine, "a", 0.0, lease_tokens=90)
    engine.advance(0.02)
    add(engine, "a", 0.5, attempt=2, made=3, lease_tokens=10)
    add(engine, "a", 0.6, attempt=1)
    told = run_out(engine)
    assert {t.attempt for t in told} == {2}
    assert [t.position for t in told] == [3, 4]
    assert list(engine.positions(9.0)) == [("a", 2, 13)]
    assert engine.last_token_at("a", 9.0) == told[-1].at


def test_the_gap_log_knows_the_longest_gap_after_any_step() -> None:
    rng = Random(3)
    log, gaps = GapLog(), []
    for step in range(1, 400):
        gaps.append(rng.random())
        log.add(step, gaps[-1])
        since = rng.randint(0, step)
        assert log.longest_after(since) == max(gaps[since:], default=0.0)


def row(request_id: str, prompt: int, true_length: int, lease: int = 10, made: int = 0) -> Row:
    return Row(request_id, 1, prompt, made, lease, true_length, max_tokens=100)


def test_a_closed_batch_ends_together_and_early() -> None:
    engine = ClosedEngine(Plain(), kv_tokens=100)
    rows = [row("a", 30, 4), row("b", 10, 6)]
    assert engine.fits(rows, 10)
    assert not engine.fits([*rows, row("c", 30, 4)], 10)
    engine.start("1", rows, 10, now=0.0)
    engine.start("2", [row("a", 30, 25, made=12)], 10, now=0.0)
    assert engine.kv_tokens == 80
    (over,) = engine.advance(Plain().padded_s(2, 30, 6))
    a, b = over.rows
    assert (a.tokens, a.invalid_tokens, a.pad_tokens, a.finish_reason) == (4, 2, 0, "stop")
    assert (b.tokens, b.invalid_tokens, b.pad_tokens, b.finish_reason) == (6, 0, 20, "stop")
    assert a.last_at == pytest.approx(Plain().padded_s(2, 30, 4))
    assert (over.timings.iterations, over.timings.batch_size) == (6, 2)
    assert over.timings.input_tokens_max == 30
    assert engine.tally.early_returns == 1
    (later,) = engine.advance(99.0)
    assert (later.rows[0].position, later.rows[0].tokens) == (12, 10)
    assert later.rows[0].finish_reason is None
    assert engine.next_at() is None


def test_a_dropped_row_idles_and_the_last_one_ends_the_batch() -> None:
    engine = ClosedEngine(Plain(), kv_tokens=1000)
    engine.start("1", [row("a", 10, 50), row("b", 10, 50)], 10, now=0.0)
    at = Plain().padded_s(2, 10, 3)
    assert {i: p for i, _, p in engine.positions(at)} == {"a": 3, "b": 3}
    engine.drop("a", 1, at)
    assert engine.next_at() == pytest.approx(Plain().padded_s(2, 10, 10))
    engine.drop("b", 1, at + 0.001)
    assert engine.next_at() == pytest.approx(Plain().padded_s(2, 10, 4))
    (over,) = engine.advance(9.0)
    assert [(r.tokens, r.finish_reason) for r in over.rows] == [(3, "cancelled")] * 2
