"""Tiny models and engines, made once per session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from services.worker.engines.api import Engine
from services.worker.engines.registry import engine_maker
from services.worker.engines.simulated import make_simulated
from services.worker.engines.simulated_clock import Clock
from services.worker.settings import WorkerSettings
from tests.worker.core_bench import Bench
from tests.worker.reference import Reference
from tests.worker.tiny_models import FAMILIES

MakeEngine = Callable[..., Engine]
DEVICE = os.environ.get("TRANCHE_TEST_DEVICE", "cpu")
"""Where engines under test run: cpu, or cuda where there is one. References stay on the CPU."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of every family."""
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in FAMILIES.items()}


@pytest.fixture(scope="session")
def llama(model_folders: dict[str, Path]) -> Path:
    """The folder of a tiny Llama."""
    return model_folders["llama"]


@pytest.fixture(scope="session")
def references(model_folders: dict[str, Path]) -> dict[str, Reference]:
    """The oracle for every family."""
    return {name: Reference(folder) for name, folder in model_folders.items()}


class TestClock:
    """A simulated engine's time that jumps to whatever is waited for."""

    __test__ = False
    tick_s = 0.01

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def wait_until(self, at: float) -> None:
        self.at = max(self.at, at)

    def interrupt(self) -> None:
        pass


def simulated(folder: Path, clock: Clock | None = None, **settings: object) -> Engine:
    """A simulated engine that takes no time, on a profile with noise; blocks of 16 tokens."""
    defaults = {"kv_tokens": 8_000, "simulated_lengths": "mean=1000"}
    loaded = WorkerSettings(
        model=str(folder), engine="simulated", name="w", **{**defaults, **settings}
    )
    return make_simulated(loaded, clock or TestClock())


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Makes a padded engine for a model folder, with other settings by name."""
    made: list[Engine] = []

    def make(folder: Path, **settings: object) -> Engine:
        defaults = {"kv_tokens": 8_000, "torch_threads": 1, "device": DEVICE}
        loaded = WorkerSettings(model=str(folder), engine="padded", **{**defaults, **settings})
        made.append(engine_maker("padded")(loaded))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def bench() -> Bench:
    """A worker's core that has sent its first beat."""
    return Bench()
