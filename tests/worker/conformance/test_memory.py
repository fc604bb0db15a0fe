"""Memory of leases: what follows from them is what is used, to the block.

That is checked after every step of every test here (`Driver.check_books`); these are the cases
beside it.
"""

from pathlib import Path

from services.worker.models import load_model
from shared.memory import leased_blocks
from shared.tokens import count
from tests.worker.conformance.driver import Driver, some_prompts, some_specs
from tests.worker.conformance.subjects import Kit
from tests.worker.orders import make_order, make_spec
from tests.worker.reference import Agreement, Reference
from tests.worker.test_models import settings_for


def test_memory_follows_every_order_at_once(careful_kit: Kit, llama: Path) -> None:
    driver = Driver(careful_kit.make(llama), careful_kit.subject)
    size = driver.engine.info.kv_block_tokens
    specs = some_specs(4, 3 * size)
    used = [driver.used_tokens]
    for spec in specs:
        driver.start(make_order(spec, 5))
        used.append(driver.used_tokens)
    prompts = [count(spec.prompt) for spec in specs]
    steps = [size * leased_blocks(prompt, 5, size) for prompt in prompts]
    assert used == [sum(steps[:n]) for n in range(5)]
    driver.renew("r2", 2 * size)
    driver.check_books()
    driver.until_made("r1", 5)
    driver.cancel("r1")
    driver.check_books()
    driver.run(size)
    driver.assert_empty()


def test_bytes_are_those_of_the_model(real_leased_kit: Kit, llama: Path) -> None:
    memory = real_leased_kit.make(llama).memory()
    assert memory.kv_bytes_per_token == load_model(settings_for(llama)).kv_bytes_per_token
    assert memory.kv_bytes_capacity == memory.kv_tokens_capacity * memory.kv_bytes_per_token
    assert 0 < memory.device_bytes_free <= memory.device_bytes_total


def test_requests_that_begin_alike_never_need_more_than_each_alone(
    real_leased_kit: Kit, llama: Path, references: dict[str, Reference]
) -> None:
    """A common beginning, known or just being computed, and one text twice at the same time."""
    engine = real_leased_kit.make(llama)
    size = engine.info.kv_block_tokens
    driver = Driver(engine, real_leased_kit.subject, shares=True)
    beginning = some_prompts(1, longest=60, seed=8)[0] * 3
    beginning = beginning[: 3 * size + 5]
    prompts = [[*beginning, n, *range(9)] for n in range(4)]
    prompts += [prompts[0], beginning, beginning[: 3 * size], beginning[: 3 * size]]
    specs = [make_spec(f"r{n}", prompt, 2 * size) for n, prompt in enumerate(prompts)]
    driver.start(*(make_order(spec, 9) for spec in specs[:3]), iteration_tokens=size)
    driver.until_made("r0", 2)
    driver.start(*(make_order(spec, 9) for spec in specs[3:]), iteration_tokens=size)
    driver.until_made("r7", 1)
    driver.cancel("r0")
    driver.park("r1")
    driver.rest()
    driver.go_on("r1", 5)
    driver.run(7)
    agreement = Agreement()
    for made in driver.made.values():
        references["llama"].check_text(made, agreement)
    agreement.check()
    driver.assert_empty()


def test_memory_that_was_used_before_does_not_shine_through(
    real_leased_kit: Kit, llama: Path, references: dict[str, Reference]
) -> None:
    """A pool so small that every block is used again and again, and known ones are evicted."""
    size = real_leased_kit.make(llama).info.kv_block_tokens
    engine = real_leased_kit.make(llama, kv_tokens=9 * size)
    driver = Driver(engine, real_leased_kit.subject)
    agreement = Agreement()
    for turn in range(3):
        for spec in some_specs(5, size, seed=turn):
            driver.made.pop(spec.request_id, None)
            driver.start(make_order(spec, size))
            driver.rest()
            references["llama"].check_text(driver.made[spec.request_id], agreement)
            driver.assert_empty()
    agreement.check()
