"""Tiny models and engines, made once per session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from services.worker.engines.api import Engine
from services.worker.engines.registry import engine_maker
from services.worker.settings import WorkerSettings
from tests.worker.core_bench import Bench
from tests.worker.reference import Reference
from tests.worker.tiny_models import FAMILIES

MakeEngine = Callable[..., Engine]


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


@pytest.fixture(params=["padded"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes an engine of each kind for a model folder, with other settings by name."""
    made: list[Engine] = []

    def make(folder: Path, **settings: object) -> Engine:
        defaults = {"kv_tokens": 8_000, "torch_threads": 1, "device": "cpu"}
        loaded = WorkerSettings(model=str(folder), engine=request.param, **{**defaults, **settings})
        made.append(engine_maker(request.param)(loaded))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def bench() -> Bench:
    """A worker's core that has sent its first beat."""
    return Bench()
