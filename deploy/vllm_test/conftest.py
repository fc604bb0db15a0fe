"""Tiny models that vLLM's CPU kernels take, and engines on them, each made once per session."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from services.worker.engines.vllm import VllmEngine, engine_on
from services.worker.engines.vllm_core import VllmCore
from services.worker.settings import WorkerSettings
from tests.worker.reference import Reference
from tests.worker.tiny_models import BEGIN, END, PAD, VOCABULARY, byte_tokenizer

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    **_SPECIAL,
}
"""vLLM's attention on the CPU begins at heads of 32; those of tests/worker's models are smaller."""
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SHAPE, sliding_window=64, head_dim=32),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.15,
        **_SPECIAL,
    ),
}
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
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of every family."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="session")
def llama(model_folders: dict[str, Path]) -> Path:
    """The folder of a tiny Llama."""
    return model_folders["llama"]


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
