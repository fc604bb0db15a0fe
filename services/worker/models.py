"""Loading: any causal language model of transformers, from a folder or a hub id, and its facts."""

import inspect
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging

from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.telemetry.logs import adopt_logger

_NOT_CAUSAL = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForPreTraining")
_LOADING = threading.Lock()
"""transformers patches torch's modules while it loads: two loads at once lose tied weights."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(SetupError):
    """The model cannot be loaded or served; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's KV cache: heads, and the sizes of a key and a value."""

    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what an engine must know of it."""

    network: Any
    """The transformers model, in inference mode, on its device."""
    name: str
    device: torch.device
    dtype: torch.dtype
    context_tokens_max: int
    vocabulary_size: int
    end_token_ids: tuple[int, ...]
    kv_shapes: tuple[KvShape, ...]
    kv_bytes_per_token: int
    uniform_attention: bool
    """Every layer attends to all earlier tokens, by SDPA with an additive mask."""
    keeps_logits: bool
    """Its forward can leave out the logits of all but the last positions."""
    takes_positions: bool


def load_model(settings: WorkerSettings) -> LoadedModel:
    """Load `settings.model`. Raises ModelError."""
    transformers_logging.disable_progress_bar()
    adopt_logger("transformers")
    config = _load_config(settings)
    device = pick_device(settings.device)
    with _LOADING:
        network = _load_network(settings, config, device)
    network.eval()
    text = network.config.get_text_config()
    parameters = inspect.signature(network.forward).parameters
    shapes = _probe_kv_shapes(network, device)
    size = network.dtype.itemsize
    return LoadedModel(
        network=network,
        name=settings.served_name(),
        device=device,
        dtype=network.dtype,
        context_tokens_max=_context(text, settings.context_tokens_max),
        vocabulary_size=int(network.get_output_embeddings().weight.shape[0]),
        end_token_ids=end_tokens(network.generation_config, text),
        kv_shapes=shapes,
        kv_bytes_per_token=sum(s.heads * (s.key_size + s.value_size) for s in shapes) * size,
        uniform_attention=_is_uniform(text, parameters),
        keeps_logits="logits_to_keep" in parameters,
        takes_positions="position_ids" in parameters,
    )


def pick_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises ModelError if there is no CUDA device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device was found; use device=cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def end_tokens(generation: GenerationConfig | None, config: Any) -> tuple[int, ...]:
    """The ids that end an output: those of the generation config, else of the model's config."""
    for source in (generation, config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            listed: Iterable[int] = [ids] if isinstance(ids, int) else ids
            return tuple(sorted(int(i) for i in listed))
    return ()


def _load_config(settings: WorkerSettings) -> Any:
    if not settings.model:
        raise ModelError("no model is set; give --model with a folder or a hub id")
    looks_like_path = settings.model.startswith((".", "/", "~"))
    folder = Path(settings.model).expanduser()
    if looks_like_path and not folder.is_dir():
        raise ModelError(f"the model folder {settings.model} does not exist")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {settings.model} has no config.json")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the model folder {settings.model} has no *.safetensors file; only safetensors "
            "weights are loaded: convert it with save_pretrained(safe_serialization=True)"
        )
    try:
        config = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else settings.model,
            revision=settings.revision or None,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the config of {settings.model}: {error}") from error
    architectures: list[str] = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False) or any(
        mark in name for name in architectures for mark in _NOT_CAUSAL
    ):
        raise ModelError(
            f"{settings.model} is {', '.join(architectures) or config.model_type}, not a causal "
            "language model; choose a decoder-only text model"
        )
    return config


def _load_network(settings: WorkerSettings, config: Any, device: torch.device) -> Any:
    folder = Path(settings.model).expanduser()
    try:
        network, notes = AutoModelForCausalLM.from_pretrained(
            str(folder) if folder.is_dir() else settings.model,
            config=config,
            revision=settings.revision or None,
            dtype=_data_type(settings.dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load {settings.model}: {error}") from error
    missing = sorted(notes["missing_keys"])
    if missing:
        raise ModelError(
            f"{settings.model} lacks {len(missing)} weights of a causal language model, such as "
            f"{missing[0]}"
        )
    return network.to(device)


def _data_type(wanted: str, device: torch.device) -> torch.dtype | str:
    if wanted != "auto":
        return _DTYPES[wanted]
    return torch.float32 if device.type == "cpu" else "auto"


def _context(config: Any, limit: int) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, limit) if limit else value
    if limit:
        return limit
    raise ModelError("the model's config names no context length; set context_tokens_max")


def _is_uniform(config: Any, parameters: Any) -> bool:
    """Whether one additive mask of padding and causality serves every layer."""
    layer_types = set(getattr(config, "layer_types", None) or ("full_attention",))
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return (
        config._attn_implementation == "sdpa"
        and layer_types == {"full_attention"}
        and ("layer_types" in vars(config) or not any(windows))
        and "position_ids" in parameters
        and not getattr(config, "alibi", False)
    )


@torch.inference_mode()
def _probe_kv_shapes(network: Any, device: torch.device) -> tuple[KvShape, ...]:
    """What one token leaves in each layer's cache: the truth, whatever the config calls it."""
    cache = DynamicCache(config=network.config.get_text_config())
    network(
        input_ids=torch.zeros((1, 1), dtype=torch.long, device=device),
        past_key_values=cache,
        use_cache=True,
    )
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or hasattr(layer, "conv_states"):
            raise ModelError(
                f"{type(network).__name__} keeps other state than keys and values; only models "
                "whose layers are all attention can be served"
            )
        shapes.append(KvShape(keys.shape[1], keys.shape[3], values.shape[3]))
    return tuple(shapes)
