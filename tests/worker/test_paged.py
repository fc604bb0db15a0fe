"""What the paged engine does beside what every engine does (`tests/worker/conformance`): when its
device fails under it all leases are dropped, and it goes on; and its weights of 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as changed
from torch import Tensor

from services.worker.engines import paged
from services.worker.engines.api import EngineError, OutOfMemory
from services.worker.paged.networks import make_network
from services.worker.settings import WorkerSettings
from tests.worker.conformance.driver import Driver, some_specs
from tests.worker.conformance.test_generate import closeness
from tests.worker.conftest import DEVICE
from tests.worker.orders import GREEDY, make_order, make_spec
from tests.worker.reference import Agreement, Reference

CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
RAM_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
BROKEN = RuntimeError("shapes do not match")
WORDS = {OutOfMemory: "out of memory", EngineError: "shapes do not match"}


class FailingNetwork:
    """A network whose `fails_at`th iteration raises."""

    kind = "failing"

    def __init__(self, network: Any, fails_at: int, error: Exception) -> None:
        self.network, self.fails_at, self.error = network, fails_at, error
        self.calls = 0

    def forward(self, iteration: Any, attention: Any) -> Tensor:
        self.calls += 1
        logits: Tensor = self.network.forward(iteration, attention)
        if self.calls == self.fails_at:
            raise self.error
        return logits


MakeFailing = Callable[[int, Exception], Driver]


@pytest.fixture
def make_failing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> MakeFailing:
    """Makes an engine whose device fails in one iteration."""

    def make(fails_at: int, error: Exception) -> Driver:
        monkeypatch.setattr(
            paged,
            "make_network",
            lambda *args, **more: FailingNetwork(make_network(*args, **more), fails_at, error),
        )
        settings = WorkerSettings(model=str(llama), engine="paged", device=DEVICE, kv_tokens=4_000)
        return Driver(paged.make_paged(settings))

    return make


@pytest.mark.parametrize(
    ("error", "raised"), [(CUDA_FULL, OutOfMemory), (RAM_FULL, OutOfMemory), (BROKEN, EngineError)]
)
@pytest.mark.parametrize("fails_at", [1, 3, 20])
def test_all_leases_are_dropped_and_the_engine_goes_on(
    make_failing: MakeFailing,
    references: dict[str, Reference],
    error: Exception,
    raised: type[EngineError],
    fails_at: int,
) -> None:
    driver = make_failing(fails_at, error)
    specs = some_specs(3, 40)
    driver.start(*(make_order(spec, 40) for spec in specs), iteration_tokens=64)
    for _ in range(fails_at - 1):
        driver.step()
    with pytest.raises(raised, match=WORDS[raised]):
        driver.step()
    driver.assert_empty()
    for spec in specs:
        driver.go_on(spec.request_id, 40)
    driver.rest()
    agreement = Agreement()
    for made in driver.made.values():
        references["llama"].check_text(made, agreement)
    agreement.check()
    driver.assert_empty()


def test_too_little_memory_for_a_block_is_refused(llama: Path) -> None:
    settings = WorkerSettings(model=str(llama), engine="paged", device=DEVICE, kv_tokens=15)
    with pytest.raises(paged.ModelError, match="kv_tokens"):
        paged.make_paged(settings)


def test_an_eviction_is_counted(llama: Path) -> None:
    settings = WorkerSettings(model=str(llama), engine="paged", device=DEVICE, kv_tokens=64)
    engine = paged.make_paged(settings)
    driver = Driver(engine)
    driver.start(*(make_order(make_spec(f"r{n}", [n, n], 60), 30) for n in range(2)))
    driver.rest()
    driver.renew("r1", 40)
    driver.rest()
    assert [(end.request_id, end.evicted) for end in driver.left] == [("r1", True)]
    assert (len(driver.ids("r1")), engine.evictions) == (30, 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="weights of 8 bits are for the CPU")
def test_weights_of_8_bits_make_almost_the_same_text(
    llama: Path, references: dict[str, Reference]
) -> None:
    settings = WorkerSettings(model=str(llama), engine="paged", weights="int8", kv_tokens=4_000)
    driver = Driver(paged.make_paged(settings))
    scored = changed(GREEDY, logprobs=0)
    driver.start(*(make_order(spec, 40) for spec in some_specs(4, 40, scored)))
    driver.rest()
    equal, behind, errors = closeness(driver.made, references["llama"])
    assert equal >= 0.9, (equal, behind, errors)
    assert behind <= 0.4
    assert max(errors) <= 0.8
