"""A tiny model and engines on it, each made once per session."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from services.worker.engines.vllm import VllmEngine, engine_on
from services.worker.engines.vllm_core import VllmCore
from services.worker.settings import WorkerSettings
from tests.worker.reference import Reference
from tests.worker.tiny_models import tiny_llama

KV_TOKENS = 4_096


@dataclass(frozen=True)
class Loaded:
    """An engine, and the vLLM under it."""

    engine: VllmEngine
    core: VllmCore


LoadEngine = Callable[..., Loaded]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("vllm").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def reference(llama: Path) -> Reference:
    """What transformers makes of the tiny Llama."""
    return Reference(llama)


def settings_of(folder: Path, **more: object) -> WorkerSettings:
    """Float32, one thread, 4096 tokens of KV."""
    defaults = {"engine": "vllm", "kv_tokens": KV_TOKENS, "torch_threads": 1, "device": "cpu"}
    return WorkerSettings(model=str(folder), **{**defaults, **more})


@pytest.fixture(scope="session")
def load() -> Iterator[LoadEngine]:
    """Makes an engine for a model folder, with other settings by name."""
    made: list[Loaded] = []

    def load_one(folder: Path, **more: object) -> Loaded:
        settings = settings_of(folder, **more)
        core = VllmCore(settings)
        made.append(Loaded(engine_on(core, settings), core))
        return made[-1]

    yield load_one
    for one in made:
        one.engine.close()


@pytest.fixture(scope="session")
def shared_engine(load: LoadEngine, llama: Path) -> Loaded:
    """One for all tests that need no settings of their own."""
    return load(llama)


@pytest.fixture
def loaded(shared_engine: Loaded) -> Iterator[Loaded]:
    """The shared one; a test must leave nothing in it."""
    yield shared_engine
    engine = shared_engine.engine
    while engine.busy:
        engine.step()
    assert engine.memory().kv_tokens_used == 0, "a test has left leases"
    assert shared_engine.core.blocks_used == 0
    assert shared_engine.core.preemptions == 0
