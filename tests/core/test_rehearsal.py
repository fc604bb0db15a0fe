"""Rehearsals: one way through a short queue, and what is told of several."""

from statistics import median

import pytest

from services.scheduler.core.comers import AT_ONCE, PER_S, Allowance, Comer, Comers
from services.scheduler.core.rehearsal import (
    Luck,
    Opening,
    Rehearsal,
    Runner,
    Scene,
    Stage,
    Waiting,
)
from services.scheduler.core.rehearsing import blended_s
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import Rejected, RunSlice, Submit
from tests.core.seam import Bench, beat_of, submit

USUAL = (0, True, False)
LEASE, TOKEN_S = 10, 0.1
SURE = float("inf")


def running(left: int, holds: float = 500.0) -> Runner:
    return Runner(tokens=100, holds=holds, outputs=(20 + left,), made=20, cap=10_000, first=True)


def stage(*runners: Runner, free: float = 0.0, seats: float = SURE) -> Stage:
    return Stage(free_tokens=free, seats=seats, backlog_tokens=0.0, runners=runners)


def scene_of(
    *stages: Stage,
    waiting: tuple[Waiting, ...] = (),
    comers: tuple[Comer, ...] = (),
    comers_per_s: float = 0.0,
    overtaken_max: int = 32,
) -> Scene:
    return Scene(
        stages=stages,
        waiting=waiting,
        comers=comers,
        comers_per_s=comers_per_s,
        outputs=lambda tokens: (50,),
        token_s=TOKEN_S,
        prefill_token_s=1e-3,
        after_s=lambda own, before: (own + before) * 1e-3,
        served_per_s=100.0,
        served_tokens=0.0,
        lease_tokens=LEASE,
        backlog_max=64.0,
        backfill_max=15,
        overtaken_max=overtaken_max,
    )


def told_s(scene: Scene, mine: Waiting, times: int = 1) -> float:
    opening, luck = Opening(scene), Luck(0)
    played = [Rehearsal(opening, mine, luck).play(2_000)[0] for _ in range(times)]
    return median(start_s for start_s in played if start_s is not None)


def wants(input_tokens: int, key: float = 5.0, overtaken: int = 0) -> Waiting:
    return Waiting((USUAL, key), input_tokens, overtaken)


def test_who_needs_room_waits_for_the_first_end_that_makes_enough() -> None:
    """500 tokens come back at 3 s, less what the others make in the meantime."""
    scene = scene_of(stage(running(30), running(300)), stage(running(200)))
    assert told_s(scene, wants(200)) == pytest.approx(3.0 + 0.2)
    assert told_s(scene, wants(600)) == pytest.approx(30.0 + 0.6)


def test_no_seat_and_a_full_prefill_queue_are_waited_for() -> None:
    full = scene_of(stage(running(40), free=900.0, seats=0.0))
    assert told_s(full, wants(10)) == pytest.approx(4.0 + 0.01)
    busy = scene_of(Stage(free_tokens=900.0, seats=9.0, backlog_tokens=564.0, runners=()))
    assert told_s(busy, wants(10)) == pytest.approx(0.5 + 0.01, abs=1e-3)


def test_what_still_prefills_begins_in_order_and_counts_as_queued_before() -> None:
    first, second = (running(10)._replace(tokens=n, first=False) for n in (40, 20))
    queued = Stage(free_tokens=900.0, seats=9.0, backlog_tokens=50.0, runners=(first, second))
    assert told_s(scene_of(queued), wants(10)) == pytest.approx(0.001 * (10 + 40 + 20))


def test_a_small_one_passes_a_large_one_that_finds_no_room() -> None:
    scene = scene_of(stage(running(90), free=100.0), waiting=(wants(300, key=1.0),))
    assert told_s(scene, wants(50)) == pytest.approx(0.05)
    often = scene_of(stage(running(90), free=100.0), waiting=(wants(300, 1.0, overtaken=32),))
    assert told_s(often, wants(50)) > 9.0


def test_smaller_ones_that_come_later_pass_and_make_a_large_one_wait_longer() -> None:
    """They stand before it for three seconds from their coming on."""
    runners = [running(20 * number, holds=900) for number in range(1, 20)]
    small, large = Comer((USUAL, 1.0), 400, SURE), wants(1_000, key=4.0)
    alone = told_s(scene_of(stage(*runners)), large)
    crowded = scene_of(stage(*runners), comers=(small,), comers_per_s=2.0)
    assert alone == pytest.approx(4.0 + 1.0), "two ends make room"
    assert told_s(crowded, large, times=9) > alone + 1.0
    hurried = scene_of(stage(*runners), comers=(small._replace(within_s=0.1),), comers_per_s=2.0)
    assert told_s(hurried, large, times=9) == pytest.approx(alone), "they are refused"


def test_a_rehearsal_ends_where_nothing_can_make_room() -> None:
    opening = Opening(scene_of(stage(running(30))))
    start_s, events = Rehearsal(opening, wants(5_000), Luck(0)).play(1_000)
    assert start_s is None
    assert events < 10


def test_few_rehearsals_are_made_at_once_and_in_the_long_run() -> None:
    allowed = Allowance()
    made = 0
    for hundredth in range(1_000):
        if allowed.has(hundredth / 100):
            allowed.take()
            made += 1
    assert AT_ONCE + 10 * PER_S - 2 <= made <= AT_ONCE + 10 * PER_S


def test_who_came_lately_is_told_with_the_margin_for_late_starts() -> None:
    comers = Comers()
    assert comers.latest(2.0) == []
    for number in range(400):
        comers.came(Comer((USUAL, 1.0), 10, 3.0), number / 4)
    assert comers.latest(2.0)[0].within_s == 1.5
    assert comers.per_s(100.0) == pytest.approx(4.0, rel=0.02)


# ------------------------------------------------------------------------------------ at the seam


def full_bench() -> Bench:
    """A worker whose memory one request fills; it has 100 tokens to make, of 0.03 s each."""
    bench = Bench("tranche", Constants(slice_tokens=16))
    bench.now = 100.0
    bench.say(beat_of("w1", forms=("leased",), capacity=400))
    books = bench.core.books
    for number in range(64):
        books.outputs.saw(300, 100)
        books.comers.came(Comer((USUAL, 1.0), 10, 0.0), 92 + number / 8)
    (run,) = bench.say(submit("runs", prompt=tokens.pack(range(300)), max_tokens=100))
    assert isinstance(run, RunSlice)
    served = books.waits.served
    served.work, served.events, served.since = 10.0 * 60, 60.0, 60.0
    return bench


def hasty(name: str = "hasty", tenant: str = "") -> Submit:
    prompt = tokens.pack(range(200))
    return submit(name, prompt=prompt, max_tokens=100, ttft_deadline_ms=200, tenant=tenant)


def told_at_the_seam(bench: Bench, name: str = "hasty") -> float:
    (answer,) = bench.say(hasty(name))
    assert isinstance(answer, Rejected)
    assert answer.reason == "deadline"
    assert answer.retry_after_s is not None
    return answer.retry_after_s


def test_who_is_refused_for_a_deadline_hears_what_was_rehearsed() -> None:
    by_rate_s = (10 + 200) / 10
    expected_s = blended_s(3.03 + 0.05, by_rate_s)
    assert told_at_the_seam(full_bench()) == pytest.approx(expected_s, rel=0.02)


def test_without_newcomers_or_with_too_many_rehearsals_the_mean_rate_is_told() -> None:
    unknown = full_bench()
    unknown.core.books.comers = Comers()
    by_rate_s = told_at_the_seam(unknown)
    bench = full_bench()
    told = [told_at_the_seam(bench, f"hasty {number}") for number in range(int(AT_ONCE) + 1)]
    assert told[:-1] == pytest.approx([told[0]] * int(AT_ONCE), rel=0.01)
    assert told[-1] == pytest.approx(by_rate_s)
    assert by_rate_s != pytest.approx(told[0], rel=0.2)


def test_of_several_tenants_the_mean_rate_tells() -> None:
    bench = full_bench()
    for tenant in ("a", "b"):
        bench.say(submit(f"waits {tenant}", prompt=tokens.pack(range(200)), tenant=tenant))
    assert bench.core.books.lines.central.turns(64, bench.now) is None
    assert isinstance(bench.say(hasty())[0], Rejected)


def test_rehearsals_draw_nothing_that_decisions_draw() -> None:
    bench = full_bench()
    drawn = bench.core.books.draws.drawn
    told_at_the_seam(bench)
    assert bench.core.books.draws.drawn == drawn
