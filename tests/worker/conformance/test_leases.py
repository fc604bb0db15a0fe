"""Leases: credit is never overdrawn, KV stays between leases, and nobody sees what others do."""

from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import StepReport
from shared.memory import leased_blocks
from shared.messages import RequestSpec
from shared.tokens import count
from tests.worker.conformance.driver import Driver, some_specs
from tests.worker.conformance.subjects import Kit
from tests.worker.orders import Made, make_order
from tests.worker.reference import Agreement, Reference


@pytest.fixture
def driver(leased_kit: Kit, llama: Path) -> Driver:
    return Driver(leased_kit.make(llama), leased_kit.subject)


class Oracle:
    """Says whether texts are right: by the model, or where there is none by a run alone."""

    def __init__(self, kit: Kit, llama: Path, reference: Reference) -> None:
        self._kit, self._folder, self._reference = kit, llama, reference

    def check(self, made: dict[str, Made]) -> None:
        agreement = Agreement()
        for request in made.values():
            if self._kit.subject.real_text:
                self._reference.check_text(request, agreement)
            else:
                alone = self._alone(request.spec)
                assert request.ids == alone.ids[: len(request.ids)]
                assert request.finish_reason in (None, alone.finish_reason)
        agreement.check()

    def _alone(self, spec: RequestSpec) -> Made:
        driver = Driver(self._kit.make(self._folder), self._kit.subject)
        driver.start(make_order(spec, spec.max_tokens))
        driver.rest()
        return driver.made[spec.request_id]


@pytest.fixture
def oracle(leased_kit: Kit, llama: Path, references: dict[str, Reference]) -> Oracle:
    return Oracle(leased_kit, llama, references["llama"])


@pytest.mark.parametrize("lease_tokens", [1, 16, 64])
def test_a_lease_ends_where_it_says_and_goes_on(
    driver: Driver, oracle: Oracle, lease_tokens: int
) -> None:
    driver.start(*(make_order(s, lease_tokens) for s in some_specs(5, 40)), iteration_tokens=64)
    driver.run(lease_tokens)
    oracle.check(driver.made)
    assert all(made.finish_reason for made in driver.made.values())
    driver.assert_empty()


def test_a_renewal_in_time_makes_no_pause(driver: Driver) -> None:
    first, mate = some_specs(2, 60)
    driver.start(make_order(first, 6), make_order(mate, 60))
    driver.until_made("r0", 4)
    driver.renew("r0", 12)
    while len(driver.ids("r0")) < 12:
        own, others = len(driver.ids("r0")), len(driver.ids("r1"))
        driver.step()
        passed = len(driver.ids("r1")) - others
        assert len(driver.ids("r0")) - own >= min(passed, 12 - own)
        assert not driver.subject.stepwise or passed == 1


def test_a_renewal_at_the_last_moment_makes_no_pause(driver: Driver) -> None:
    first, mate = some_specs(2, 60)
    driver.start(make_order(first, 4), make_order(mate, 60))
    driver.until_made("r1", 1)
    apart = len(driver.ids("r1")) - len(driver.ids("r0"))
    for until in range(5, 30):
        driver.until_made("r0", until - 1)
        driver.renew("r0", until)
    if driver.subject.stepwise:
        assert len(driver.ids("r1")) - len(driver.ids("r0")) == apart


def test_a_pause_keeps_kv_and_no_more(driver: Driver) -> None:
    (spec,) = some_specs(1, 90)
    driver.start(make_order(spec, 40))
    driver.rest()
    size = driver.engine.info.kv_block_tokens
    held = size * leased_blocks(count(spec.prompt), 40, size)
    assert driver.used_tokens == held
    driver.renew("r0", 30)
    driver.renew("r0", 40)
    driver.engine.renew("unknown", 30)
    driver.engine.park("unknown")
    driver.engine.cancel("unknown")
    assert not driver.engine.busy, "a lease that is not longer is none"
    assert driver.engine.step() == StepReport()
    assert driver.used_tokens == held


def test_nobody_gets_a_lease_beyond_the_longest_output(driver: Driver, oracle: Oracle) -> None:
    short, long = some_specs(2, 20)
    driver.start(make_order(short, 500), make_order(long, 5))
    driver.renew("r1", 10_000)
    driver.check_books()
    driver.rest()
    assert [len(made.ids) for made in driver.made.values()] == [20, 20]
    oracle.check(driver.made)
    driver.assert_empty()


# --------------------------------------------------------------------------------- parking


@pytest.mark.parametrize("when", ["prefilling", "running", "paused"])
def test_a_parked_request_goes_on_later(driver: Driver, oracle: Oracle, when: str) -> None:
    spec, mate = some_specs(2, 60)
    driver.start(make_order(spec, 20), make_order(mate, 60), iteration_tokens=8)
    if when == "paused":
        driver.until_made("r0", 20)
    elif when == "running":
        driver.until_made("r0", 5)
    driver.park("r0")
    assert driver.engine.busy, "its end is to be said"
    driver.rest()
    assert [(end.request_id, end.attempt, end.evicted) for end in driver.left] == [("r0", 1, False)]
    assert driver.until == {}
    driver.assert_empty()
    driver.go_on("r0", 60)
    driver.rest()
    oracle.check(driver.made)
    driver.assert_empty()


def test_a_parked_request_goes_on_elsewhere(
    leased_kit: Kit, llama: Path, driver: Driver, oracle: Oracle
) -> None:
    (spec,) = some_specs(1, 60)
    driver.start(make_order(spec, 60))
    driver.until_made("r0", 23)
    driver.park("r0")
    driver.rest()
    other = Driver(leased_kit.make(llama), leased_kit.subject)
    other.made, other.attempts = driver.made, driver.attempts
    other.go_on("r0", 60)
    other.rest()
    oracle.check(other.made)
    other.assert_empty()


def test_who_finishes_while_it_is_parked_says_one_of_both(driver: Driver) -> None:
    specs = some_specs(4, 6)
    driver.start(*(make_order(spec, 6) for spec in specs))
    driver.until_made("r0", 5)
    for name in list(driver.until):
        driver.park(name)
    driver.rest()
    ended = {name for name, made in driver.made.items() if made.finish_reason}
    assert ended.isdisjoint(end.request_id for end in driver.left)
    assert len(ended) + len(driver.left) == 4
    driver.assert_empty()


# ------------------------------------------------------------------------------ cancelling


@pytest.mark.parametrize("made", [0, 1, 5, 30])
def test_a_cancelled_lease_is_gone_without_a_word(
    driver: Driver, oracle: Oracle, made: int
) -> None:
    """Also one that prefills, and one that pauses. The driver takes no more tokens of it."""
    gone, stays = some_specs(2, 50)
    driver.start(make_order(gone, 30), make_order(stays, 50), iteration_tokens=16)
    if made:
        driver.until_made("r0", made)
    driver.cancel("r0")
    if driver.engine.busy:
        driver.step()
    driver.rest()
    assert driver.left == []
    assert len(driver.ids("r1")) == 50
    oracle.check(driver.made)
    driver.assert_empty()


def test_cancelled_alone_it_leaves_nothing(driver: Driver) -> None:
    (spec,) = some_specs(1, 50)
    for tokens in (0, 1, 9):
        driver.made.clear()
        driver.start(make_order(spec, 50))
        driver.until_made("r0", tokens)
        driver.cancel("r0")
        driver.rest()
        driver.assert_empty()


def test_an_attempt_may_be_replaced_at_once(driver: Driver, oracle: Oracle) -> None:
    spec, mate = some_specs(2, 60)
    driver.start(make_order(spec, 50), make_order(mate, 60))
    driver.until_made("r0", 3)
    driver.cancel("r0")
    driver.go_on("r0", 60)
    driver.rest()
    oracle.check(driver.made)
    driver.assert_empty()


# ------------------------------------------------------------------------- who is served when


@pytest.mark.parametrize("prefill_first", [False, True])
def test_decodes_wait_for_prefill_only_if_told_so(driver: Driver, prefill_first: bool) -> None:
    runs, comes = some_specs(2, 100)
    comes = changed(comes, prompt=comes.prompt[:4] * 120)
    more = {"iteration_tokens": 24, "prefill_first": prefill_first}
    driver.start(make_order(runs, 100), **more)
    driver.until_made("r0", 3)
    driver.start(make_order(comes, 10), **more)
    before = len(driver.ids("r0"))
    driver.until_made("r1", 1)
    passed = len(driver.ids("r0")) - before
    # 120 tokens, 24 at a time; an engine may give every other iteration to prefill alone.
    assert passed <= 1 if prefill_first else passed >= 2


@pytest.mark.parametrize("seed", range(4))
def test_anything_may_happen_at_any_time(driver: Driver, oracle: Oracle, seed: int) -> None:
    """Arrivals, renewals, parking, coming back and cancelling in any order."""
    rng = Random(seed)
    waiting = some_specs(14, 40, seed=seed)
    parked: list[str] = []
    for _ in range(160):
        there = list(driver.until)
        budget = rng.choice([0, 7, 40])
        match rng.choice(["arrive", "renew", "renew", "park", "return", "cancel", *["step"] * 6]):
            case "arrive" if waiting and len(there) < 6:
                driver.start(make_order(waiting.pop(), rng.choice([1, 7, 16])), **_limit(budget))
            case "renew" if there:
                name = rng.choice(there)
                driver.renew(name, driver.until[name] + rng.choice([0, 1, 16, 100]))
            case "park" if there:
                driver.park(rng.choice(there))
            case "return" if parked:
                driver.go_on(parked.pop(), 12, **_limit(budget))
            case "cancel" if there and rng.random() < 0.3:
                driver.cancel(rng.choice(there))
            case _:
                parked += [end.request_id for end in driver.step().left]
    before = len(driver.left)
    driver.rest()
    parked += [end.request_id for end in driver.left[before:]]
    for name in parked:
        driver.go_on(name, 5)
    driver.run(16)
    oracle.check(driver.made)
    driver.assert_empty()


def _limit(iteration_tokens: int) -> dict[str, int]:
    return {"iteration_tokens": iteration_tokens}
