"""Orders that cannot run leave nothing behind, and those that can are not disturbed by them."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import BadOrder, OutOfMemory, StepReport
from services.worker.engines.registry import FORMS
from shared.messages import RunSlice, SliceOrder
from tests.worker.conformance.driver import Driver, leases, run_all
from tests.worker.conformance.subjects import Kit
from tests.worker.orders import GREEDY, make_batch, make_order, make_spec, run_batch
from tests.worker.tiny_models import BEGIN, VOCABULARY

GOOD = make_order(make_spec("good"), 16)


def in_form(kit: Kit, *orders: SliceOrder) -> RunSlice:
    """An order as this engine takes them here."""
    return leases(*orders) if kit.subject.form == "leased" else make_batch(*orders)


def test_forms_are_known_before_an_engine_is_made(any_kit: Kit, llama: Path) -> None:
    info = any_kit.make(llama).info
    assert FORMS[info.engine] == info.forms


def test_a_form_that_the_engine_lacks_is_refused(any_kit: Kit, llama: Path) -> None:
    engine = any_kit.make(llama)
    if len(engine.info.forms) == 1:
        other = make_batch(GOOD) if any_kit.subject.form == "leased" else leases(GOOD)
        with pytest.raises(BadOrder, match="only"):
            engine.start(other)
    assert not engine.busy
    assert engine.memory().kv_tokens_used == 0


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (make_order(make_spec(prompt=[VOCABULARY])), "vocabulary"),
        (make_order(make_spec(), output=[5, VOCABULARY]), "vocabulary"),
        (make_order(make_spec(prompt=[1] * 510, max_tokens=99)), "context"),
        (make_order(make_spec(prompt=[])), "no prompt"),
    ],
)
def test_impossible_orders_are_refused_with_their_company(
    any_kit: Kit, llama: Path, bad: SliceOrder, complaint: str
) -> None:
    engine = any_kit.make(llama)
    for orders in ([bad], [GOOD, bad], [bad, GOOD]):
        with pytest.raises(BadOrder, match=complaint):
            engine.start(in_form(any_kit, *orders))
        assert not engine.busy
        assert engine.memory().kv_tokens_used == 0
        assert engine.step() == StepReport()
    run_all(any_kit, engine, [GOOD.spec], 16)


def test_an_empty_batch_is_refused(closed_kit: Kit, llama: Path) -> None:
    with pytest.raises(BadOrder, match="empty"):
        closed_kit.make(llama).start(make_batch())


def test_a_batch_that_does_not_fit_is_refused_and_leaves_nothing(
    closed_kit: Kit, llama: Path
) -> None:
    engine = closed_kit.make(llama, kv_tokens=48)
    orders = [make_order(make_spec(f"r{n}", [BEGIN] * 16), 8) for n in range(3)]
    with pytest.raises(OutOfMemory, match="72 tokens of KV, there are 48"):
        engine.start(make_batch(*orders))
    assert not engine.busy
    assert engine.step() == StepReport()
    run_batch(engine, make_batch(*orders[:2]))


def test_the_batch_size_is_bounded(closed_kit: Kit, llama: Path) -> None:
    engine = closed_kit.make(llama, batch_size_max=2)
    orders = [make_order(make_spec(f"r{n}"), 2) for n in range(3)]
    with pytest.raises(OutOfMemory, match="at most 2"):
        engine.start(make_batch(*orders))
    run_batch(engine, make_batch(*orders[:2]))


def blocks(kit: Kit, number: int, folder: Path) -> dict[str, Any]:
    """Settings for a pool of so many of the engine's blocks."""
    size = kit.make(folder).info.kv_block_tokens
    return {"kv_tokens": number * size}


def test_a_lease_that_never_fits_is_refused(leased_kit: Kit, llama: Path) -> None:
    engine = leased_kit.make(llama, **blocks(leased_kit, 4, llama))
    size = engine.info.kv_block_tokens
    large = make_order(make_spec("large", [BEGIN] * (3 * size), 4 * size), 2 * size)
    with pytest.raises(OutOfMemory):
        engine.start(leases(large))
    driver = Driver(engine, leased_kit.subject)
    driver.assert_empty()
    driver.start(make_order(large.spec, size))
    driver.rest()
    assert len(driver.ids("large")) == size


def test_leases_that_do_not_fit_together_leave_who_is_there_alone(
    careful_kit: Kit, llama: Path
) -> None:
    engine = careful_kit.make(llama, **blocks(careful_kit, 6, llama))
    size = engine.info.kv_block_tokens
    driver = Driver(engine, careful_kit.subject)
    specs = [make_spec(f"r{n}", [BEGIN, n] * (size // 2), 4 * size) for n in range(4)]
    driver.start(make_order(specs[0], size))
    driver.until_made("r0", 3)
    # Two blocks are in use; of three leases of two each the first ones would fit.
    with pytest.raises(OutOfMemory):
        driver.start(*(make_order(spec, size) for spec in specs[1:]))
    assert list(driver.until) == ["r0"]
    driver.check_books()
    driver.step()
    driver.start(*(make_order(spec, size) for spec in specs[1:3]))
    driver.rest()
    assert {name: len(made.ids) for name, made in driver.made.items()} == dict.fromkeys(
        ("r0", "r1", "r2"), size
    )
    assert driver.left == []


def test_more_credit_than_memory_ends_leases_early_with_their_tokens(
    leased_kit: Kit, llama: Path
) -> None:
    """Whoever promises more than there is: some lose their place, and are told so; the others go
    on, and no token is lost."""
    engine = leased_kit.make(llama, **blocks(leased_kit, 6, llama))
    size = engine.info.kv_block_tokens
    driver = Driver(engine, leased_kit.subject)
    endless = changed(GREEDY, ignore_eos=True)
    specs = [make_spec(f"r{n}", [BEGIN, n], 3 * size, endless) for n in range(3)]
    driver.start(*(make_order(spec, 2 * size - 1) for spec in specs))
    driver.rest()
    assert driver.left == [], "3 requests of 2 blocks each fit"
    held = driver.until.copy()
    for spec in specs:
        name = spec.request_id
        driver.engine.renew(name, 3 * size)
        driver.until[name] = 3 * size
    reports = 0
    while engine.busy and reports < 1_000:
        report, reports = engine.step(), reports + 1
        for tokens in report.tokens:
            made = driver.made[tokens.request_id]
            assert tokens.position == len(made.ids)
            made.ids += tokens.ids
            made.finish_reason = tokens.finish_reason
        driver.left += report.left
        memory = engine.memory()
        assert memory.kv_tokens_used <= memory.kv_tokens_capacity
    assert driver.left
    assert all(end.evicted for end in driver.left)
    evicted = {end.request_id for end in driver.left}
    assert all(len(driver.ids(name)) >= held[name] for name in evicted), "their tokens are good"
    assert all(
        made.finish_reason or name in evicted or len(made.ids) == 3 * size
        for name, made in driver.made.items()
    )
    for name in evicted:
        driver.attempts[name] = 1
        driver.until = {}
        driver.go_on(name, 3 * size)
        driver.run(size)
    assert [len(made.ids) for made in driver.made.values()] == [3 * size] * 3
    driver.assert_empty()
