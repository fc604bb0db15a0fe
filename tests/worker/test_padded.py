"""The padded engine when its device fails under it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engines.api import EngineError, OutOfMemory
from services.worker.engines.padded import PaddedEngine
from services.worker.models import load_model
from services.worker.settings import WorkerSettings
from shared.tokens import count
from tests.worker.conftest import DEVICE
from tests.worker.orders import Made, make_batch, make_order, make_spec, run_batch

MakeFailing = Callable[[int, Exception], PaddedEngine]


class FailingNetwork:
    """A network whose `fails_at`th call raises."""

    def __init__(self, network: Any, fails_at: int, error: Exception) -> None:
        self.network, self.fails_at, self.error = network, fails_at, error
        self.calls = 0

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        return self.network(**inputs)


@pytest.fixture
def make_failing(llama: Path) -> MakeFailing:
    """Makes an engine whose device fails at one call."""
    model = load_model(WorkerSettings(model=str(llama), device=DEVICE))

    def make(fails_at: int, error: Exception) -> PaddedEngine:
        network = FailingNetwork(model.network, fails_at, error)
        return PaddedEngine(replace(model, network=network), kv_tokens=1_000)

    return make


CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
RAM_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA_FULL, RAM_FULL])
def test_no_memory_for_the_prefill(make_failing: MakeFailing, error: Exception) -> None:
    engine = make_failing(1, error)
    order = make_batch(make_order(make_spec(), 4))
    engine.start(order)
    with pytest.raises(OutOfMemory, match="out of memory"):
        engine.step()
    assert not engine.busy
    assert engine.memory().kv_tokens_used == 0
    run_batch(engine, order)


@pytest.mark.parametrize("error", [CUDA_FULL, RAM_FULL])
def test_no_memory_later_ends_the_slice_early_with_its_tokens(
    make_failing: MakeFailing, error: Exception
) -> None:
    engine = make_failing(3, error)
    made = Made(make_spec())
    reports = run_batch(engine, make_batch(make_order(made.spec, 8)), {"r": made})
    (result,) = reports[-1].ended[0].results
    assert count(result.tokens) == len(made.ids) == 2
    assert result.finish_reason is None
    assert "out of memory" in result.detail
    run_batch(engine, make_batch(make_order(made.spec, 8, made.ids), batch_id="b2"), {"r": made})
    assert len(made.ids) == 10


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_failing_model_drops_the_batch(make_failing: MakeFailing, fails_at: int) -> None:
    engine = make_failing(fails_at, RuntimeError("shapes do not match"))
    order = make_batch(make_order(make_spec(), 8))
    engine.start(order)
    for _ in range(fails_at - 1):
        engine.step()
    with pytest.raises(EngineError, match="shapes do not match"):
        engine.step()
    assert not engine.busy
    run_batch(engine, order)
