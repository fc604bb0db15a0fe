"""What every engine that runs leases must do, and what the simulated one promises beside."""

import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import EngineError, LeasedEngine, LeaseEnd, OutOfMemory, StepReport
from services.worker.engines.simulated_clock import WallClock
from services.worker.engines.simulated_text import LengthsError, load_lengths
from shared.config import SetupError
from shared.memory import leased_blocks
from shared.messages import RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import count
from tests.worker.conftest import MakeEngine, TestClock, simulated
from tests.worker.orders import Made, make_batch, make_order, make_spec, run_batch, run_to_end
from tests.worker.tiny_models import END, VOCABULARY

DRAWN = Sampling(temperature=1.0)
BLOCK = 16


def specs_of(number: int, max_tokens: int = 90) -> list[RequestSpec]:
    """Prompts of mixed length, seeds of their own."""
    return [
        make_spec(f"r{n}", [1] * (3 + 29 * n % 97), max_tokens, changed(DRAWN, seed=n * 7919))
        for n in range(number)
    ]


def leases(*orders: SliceOrder, **more: object) -> RunSlice:
    """An order of leases."""
    return changed(make_batch(*orders, form="leased"), **more)


class Driver:
    """Runs leases on an engine as a worker does, and holds it to its credit."""

    def __init__(self, engine: LeasedEngine) -> None:
        self.engine = engine
        self.made: dict[str, Made] = {}
        self.until: dict[str, int] = {}
        self.left: list[LeaseEnd] = []

    def start(self, *orders: SliceOrder, **more: object) -> None:
        for order in orders:
            name = order.spec.request_id
            known = self.made.setdefault(name, Made(order.spec))
            assert count(order.tokens) == len(known.ids)
            self.until[name] = len(known.ids) + order.lease_tokens
        self.engine.start(leases(*orders, **more))

    def renew(self, name: str, until: int) -> None:
        self.until[name] = until
        self.engine.renew(name, until)

    def step(self) -> StepReport:
        report = self.engine.step()
        self.left += report.left
        for tokens in report.tokens:
            request = self.made[tokens.request_id]
            assert tokens.position == len(request.ids)
            assert request.finish_reason is None, "a token after the end"
            request.ids += tokens.ids
            request.finish_reason = tokens.finish_reason
            assert len(request.ids) <= self.until[tokens.request_id], "beyond the credit"
        memory = self.engine.memory()
        assert memory.kv_tokens_used <= memory.kv_tokens_capacity
        return report

    def rest(self) -> None:
        """Until nothing happens any more by itself."""
        while self.engine.busy:
            self.step()

    def ids(self, name: str) -> list[int]:
        return self.made[name].ids


@pytest.fixture
def driver(make_leased_engine: MakeEngine, llama: Path) -> Driver:
    engine = make_leased_engine(llama)
    assert isinstance(engine, LeasedEngine)
    return Driver(engine)


@pytest.fixture
def unsliced(make_leased_engine: MakeEngine, llama: Path) -> dict[str, list[int]]:
    """The texts of `specs_of`, each request alone in one lease."""
    texts = {}
    for spec in specs_of(8):
        engine = make_leased_engine(llama)
        assert isinstance(engine, LeasedEngine)
        alone = Driver(engine)
        alone.start(make_order(spec, spec.max_tokens))
        alone.rest()
        assert alone.made[spec.request_id].finish_reason in ("stop", "length")
        texts[spec.request_id] = alone.ids(spec.request_id)
    return texts


@pytest.mark.parametrize("lease_tokens", [1, 8, 32, 128])
def test_text_is_the_same_in_any_leases_and_company(
    driver: Driver, unsliced: dict[str, list[int]], lease_tokens: int
) -> None:
    driver.start(*(make_order(spec, lease_tokens) for spec in specs_of(8)), iteration_tokens=64)
    while any(made.finish_reason is None for made in driver.made.values()):
        driver.rest()
        for name, made in driver.made.items():
            if made.finish_reason is None:
                assert len(made.ids) == driver.until[name], "it stops at its lease's end only"
                driver.renew(name, len(made.ids) + lease_tokens)
    assert {name: made.ids for name, made in driver.made.items()} == unsliced
    assert driver.engine.memory().kv_tokens_used == 0


def test_a_renewal_in_time_makes_no_pause(driver: Driver) -> None:
    (spec,) = specs_of(1)
    driver.start(make_order(spec, 6))
    while len(driver.ids("r0")) < 4:
        driver.step()
    driver.renew("r0", 12)
    while driver.engine.busy:
        before = len(driver.ids("r0"))
        driver.step()
        assert len(driver.ids("r0")) >= before
    assert len(driver.ids("r0")) == 12


def test_a_pause_keeps_kv_and_no_more(driver: Driver) -> None:
    (spec,) = specs_of(1)
    driver.start(make_order(spec, 40))
    driver.rest()
    prompt = count(spec.prompt)
    assert driver.engine.memory().kv_tokens_used == BLOCK * leased_blocks(prompt, 40, BLOCK)
    driver.renew("r0", 30)
    assert not driver.engine.busy, "a shorter lease is none"
    driver.engine.renew("unknown", 30)
    driver.engine.park("unknown")
    driver.engine.cancel("unknown")
    assert not driver.engine.busy
    assert driver.engine.step() == StepReport()


@pytest.mark.parametrize("paused", [False, True])
def test_a_parked_request_goes_on_elsewhere(
    driver: Driver, unsliced: dict[str, list[int]], paused: bool
) -> None:
    spec = specs_of(8)[2]
    driver.start(make_order(spec, 20))
    while driver.engine.busy if paused else len(driver.ids("r2")) < 5:
        driver.step()
    driver.engine.park("r2")
    assert driver.engine.busy, "its end is to be said"
    driver.rest()
    assert [(end.request_id, end.attempt, end.evicted) for end in driver.left] == [("r2", 1, False)]
    assert driver.engine.memory().kv_tokens_used == 0
    driver.start(make_order(spec, 90, driver.ids("r2"), attempt=2))
    driver.rest()
    assert driver.ids("r2") == unsliced["r2"]


def test_a_cancelled_lease_is_gone_without_a_word(driver: Driver) -> None:
    gone, stays = specs_of(2)
    driver.start(make_order(gone, 50), make_order(stays, 50))
    while len(driver.ids("r1")) < 3:
        driver.step()
    driver.engine.cancel("r0")
    made = len(driver.ids("r0"))
    driver.rest()
    assert len(driver.ids("r0")) == made
    assert driver.left == []
    assert len(driver.ids("r1")) == 50


def test_an_attempt_may_be_replaced_at_once(driver: Driver, unsliced: dict[str, list[int]]) -> None:
    spec = specs_of(8)[3]
    driver.start(make_order(spec, 50))
    while len(driver.ids("r3")) < 3:
        driver.step()
    driver.engine.cancel("r3")
    driver.start(make_order(spec, 90, driver.ids("r3"), attempt=2))
    driver.rest()
    assert driver.ids("r3") == unsliced["r3"]
    assert driver.engine.memory().kv_tokens_used == 0


def test_what_can_never_fit_is_refused(make_leased_engine: MakeEngine, llama: Path) -> None:
    engine = make_leased_engine(llama, kv_tokens=64)
    with pytest.raises(OutOfMemory, match="80 tokens of KV, there are 64"):
        engine.start(leases(make_order(make_spec("r", [1] * 50), 16)))
    assert not engine.busy


def test_no_more_credit_than_memory_evicts_nobody_else_is_said_so(
    make_leased_engine: MakeEngine, llama: Path
) -> None:
    engine = make_leased_engine(llama, kv_tokens=96)
    assert isinstance(engine, LeasedEngine)
    driver = Driver(engine)
    specs = [changed(spec, prompt=spec.prompt[:8]) for spec in specs_of(3)]
    driver.start(*(make_order(spec, 30) for spec in specs))
    driver.rest()
    assert driver.left == [], "3 requests of 2 blocks each fit"
    for spec in specs:
        driver.renew(spec.request_id, 60)
    driver.rest()
    assert driver.left
    assert all(end.evicted for end in driver.left)
    assert all(driver.ids(end.request_id) for end in driver.left), "their tokens are good"


def test_forms_do_not_run_beside_each_other(make_leased_engine: MakeEngine, llama: Path) -> None:
    engine = make_leased_engine(llama)
    assert isinstance(engine, LeasedEngine)
    first, second = specs_of(2)
    engine.start(leases(make_order(first, 5)))
    with pytest.raises(EngineError, match="leases are held"):
        engine.start(make_batch(make_order(second, 5)))
    engine.cancel("r0")
    while engine.busy:
        engine.step()
    made = {"r1": Made(second)}
    run_batch(engine, make_batch(make_order(second, 5)), made)
    assert len(made["r1"].ids) == 5


# ----------------------------------------------------------------- the simulated engine's own


def test_closed_and_leased_texts_are_the_same(llama: Path, unsliced: dict[str, list[int]]) -> None:
    made = run_to_end(simulated(llama), specs_of(8), 13, batch_size=3)
    assert {name: request.ids for name, request in made.items()} == unsliced


def test_lengths_are_those_of_the_table(llama: Path, tmp_path: Path) -> None:
    table = tmp_path / "lengths.csv"
    table.write_text("prompt_tokens,output_tokens\n5,3\n5,7\n5,400\n")
    engine = simulated(llama, simulated_lengths=str(table))
    cases = {
        "row 0": (changed(DRAWN, seed=0), 0, 3, "stop"),
        "row 1": (changed(DRAWN, seed=4), 0, 7, "stop"),
        "row 2 is cut": (changed(DRAWN, seed=2), 0, 50, "length"),
        "a choice is a row further": (changed(DRAWN, seed=0), 1, 7, "stop"),
        "no end": (changed(DRAWN, seed=0, ignore_eos=True), 0, 50, "length"),
        "not so soon": (changed(DRAWN, seed=0, min_tokens=20), 0, 21, "stop"),
    }
    specs = [
        make_spec(name, max_tokens=50, sampling=sampling, choice=choice)
        for name, (sampling, choice, _, _) in cases.items()
    ]
    made = run_to_end(engine, specs, 16)
    found = {name: (len(request.ids), request.finish_reason) for name, request in made.items()}
    assert found == {name: (tokens, reason) for name, (_, _, tokens, reason) in cases.items()}
    for name, request in made.items():
        ended = cases[name][3] == "stop"
        assert request.ids[-1] == END if ended else END not in request.ids
        assert all(0 <= token < VOCABULARY for token in request.ids)
        assert END not in request.ids[:-1]


def test_a_table_can_be_made_for_a_mean() -> None:
    lengths = load_lengths("mean=200")
    assert sum(lengths) / len(lengths) == pytest.approx(200, rel=0.01)
    assert lengths != tuple(sorted(lengths))
    assert load_lengths("mean=200") == lengths


@pytest.mark.parametrize("source", ["mean=0", "mean=x", "/nowhere.csv", "/nowhere.parquet"])
def test_tables_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(LengthsError, match="simulated_lengths"):
        load_lengths(source)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"profile": "abacus"}, "--profile: no cost profile abacus"),
        ({"kv_tokens": 15}, "less than a block"),
        ({"model": "/nowhere"}, "config.json"),
    ],
)
def test_what_cannot_be_simulated_says_so(
    llama: Path, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(SetupError, match=complaint):
        simulated(Path(str(settings.pop("model", llama))), **settings)


def test_logprobs_are_there_where_they_are_wanted(llama: Path) -> None:
    scored = changed(DRAWN, logprobs=2, prompt_logprobs=True)
    specs = [make_spec("with", max_tokens=5, sampling=scored), make_spec("without", max_tokens=5)]
    made = run_to_end(simulated(llama), specs, 2)
    assert len(made["with"].logprobs) == len(made["with"].ids)
    assert len(made["with"].prompt_logprobs) == 3
    assert made["without"].logprobs == []


def test_the_profile_says_how_long_it_takes(llama: Path) -> None:
    """An iteration of a 13 B model on an A100 takes 15 to 40 ms, whatever the machine."""
    clock = TestClock()
    engine = simulated(llama, clock, simulated_noise=0.0)
    (spec,) = specs_of(1)
    engine.start(leases(make_order(spec, 50)))
    while engine.busy:
        engine.step()
    assert 49 * 0.015 < clock.now() < 50 * 0.040


def test_a_waiting_step_can_be_interrupted_from_outside() -> None:
    clock = WallClock(speed=0.001)
    waker = threading.Timer(0.05, clock.interrupt)
    waker.start()
    began = time.monotonic()
    clock.wait_until(clock.now() + 60)
    assert time.monotonic() - began < 30
    waker.join()
