"""What a model's files say of it without its weights, and without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.worker.settings import WorkerSettings
from shared.config import SetupError

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class ModelConfigError(SetupError):
    """The configuration cannot be read; the text says what to do."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Of a causal language model."""

    vocabulary_size: int
    end_token_ids: tuple[int, ...]
    context_tokens_max: int


def read_config(settings: WorkerSettings) -> ModelConfig:
    """From config.json and generation_config.json of a folder or hub id. Raises
    ModelConfigError."""
    if not settings.model:
        raise ModelConfigError("no model is set; give --model with a folder or a hub id")
    config = _read(settings, "config.json")
    if config is None:
        raise ModelConfigError(f"cannot read config.json of the model {settings.model}")
    config = config.get("text_config", config)
    generation = _read(settings, "generation_config.json") or {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    own = next((int(config[key]) for key in CONTEXT_KEYS if config.get(key)), 0)
    context = settings.context_tokens_max or own
    if not context:
        raise ModelConfigError("the model's config names no context; set context_tokens_max")
    if not config.get("vocab_size"):
        raise ModelConfigError(f"the config of {settings.model} names no vocab_size")
    return ModelConfig(
        vocabulary_size=int(config["vocab_size"]),
        end_token_ids=tuple([ends] if isinstance(ends, int) else ends or ()),
        context_tokens_max=context,
    )


def _read(settings: WorkerSettings, name: str) -> dict[str, Any] | None:
    """A file of the model; None if it has none, or it is no JSON object."""
    folder = Path(settings.model).expanduser()
    try:
        path = folder / name if folder.is_dir() else _download(settings, name)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _download(settings: WorkerSettings, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(settings.model, name, revision=settings.revision or None))
