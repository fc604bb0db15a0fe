"""Loading models: what is found out about them, and what is said when they cannot be had."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2Model, T5Config

from services.gateway.settings import GatewaySettings
from services.worker.engines.registry import UnknownEngine, engine_maker
from services.worker.memory import device_memory, kv_capacity_tokens
from services.worker.models import ModelError, end_tokens, load_model
from services.worker.settings import WorkerSettings
from tests.worker.tiny_models import END, FAMILIES, VOCABULARY

KV_BYTES = {
    # layers x (key + value) x KV heads x head size x 4 bytes
    "llama": 2 * 2 * 2 * 32 * 4,
    "qwen2": 2 * 2 * 2 * 16 * 4,
    "qwen3": 2 * 2 * 2 * 32 * 4,
    "mistral": 2 * 2 * 2 * 32 * 4,
    "gemma": 2 * 2 * 2 * 32 * 4,
    "gemma2": 2 * 2 * 2 * 32 * 4,
    "gemma3": 2 * 2 * 2 * 32 * 4,
    "gpt2": 2 * 2 * 2 * 32 * 4,
}


def settings_for(folder: Path | str, **settings: object) -> WorkerSettings:
    """A CPU worker."""
    return WorkerSettings(**{"model": str(folder), "device": "cpu", **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_every_family(model_folders: dict[str, Path], family: str) -> None:
    model = load_model(settings_for(model_folders[family]))
    assert model.name == family
    assert model.context_tokens_max == 512
    assert model.vocabulary_size == VOCABULARY
    assert model.end_token_ids == (END,)
    assert model.kv_bytes_per_token == KV_BYTES[family]
    assert model.dtype == torch.float32
    assert model.uniform_attention == (family not in {"mistral", "gemma2", "gemma3"})


def test_data_types_and_limits_can_be_set(llama: Path) -> None:
    model = load_model(
        settings_for(llama, dtype="bfloat16", context_tokens_max=100, model_name="Tiny")
    )
    assert (model.dtype, model.context_tokens_max, model.name) == (torch.bfloat16, 100, "Tiny")
    assert model.kv_bytes_per_token == KV_BYTES["llama"] // 2


def test_end_tokens_of_the_generation_config_win(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [9, 4]}))
    assert load_model(settings_for(folder)).end_token_ids == (4, 9)
    assert end_tokens(None, GPT2Config(eos_token_id=None)) == ()


@pytest.mark.parametrize(
    ("breakage", "complaint"),
    [
        ("missing", "does not exist"),
        ("no config", "has no config.json"),
        ("no weights", "no \\*.safetensors"),
        ("not a model", "cannot read the config"),
        ("masked", "not a causal language model"),
        ("encoder-decoder", "not a causal language model"),
        ("truncated", "cannot load"),
        ("foreign weights", "lacks"),
    ],
)
def test_what_cannot_be_served_is_said_clearly(
    llama: Path, tmp_path: Path, breakage: str, complaint: str
) -> None:
    folder = tmp_path / "model"
    if breakage != "missing":
        shutil.copytree(llama, folder)
    break_model(folder, breakage)
    with pytest.raises(ModelError, match=complaint):
        load_model(settings_for(folder))


def break_model(folder: Path, breakage: str) -> None:
    """Spoil a model folder in one way."""
    match breakage:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "not a model":
            (folder / "config.json").write_text("{}")
        case "masked":
            config = BertConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
            )
            BertForMaskedLM(config).save_pretrained(folder)
        case "encoder-decoder":
            T5Config().save_pretrained(folder)
        case "truncated":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:2_000])
        case "foreign weights":
            config = GPT2Config(
                vocab_size=64, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
            )
            GPT2Model(config).save_pretrained(folder)


def test_no_model_at_all() -> None:
    with pytest.raises(ModelError, match="--model"):
        load_model(settings_for(""))


def test_cuda_where_there_is_none(llama: Path) -> None:
    if torch.cuda.is_available():
        assert load_model(settings_for(llama, device="cuda")).device.type == "cuda"
        return
    with pytest.raises(ModelError, match="no CUDA device"):
        load_model(settings_for(llama, device="cuda"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/Llama-3/", "Llama-3"),
        ("./demo", "demo"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ],
)
def test_the_served_name(model: str, name: str) -> None:
    assert settings_for(model).served_name() == name


@pytest.mark.parametrize(
    "written", ["models/tiny", "models/tiny/", "./models/tiny", "{cwd}/models/tiny"]
)
def test_a_folder_has_one_name_however_it_is_written(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = written.format(cwd=tmp_path)
    assert WorkerSettings(model=model).served_name() == "tiny"
    assert GatewaySettings(model=model).served_name() == "tiny"
    assert GatewaySettings(model=model, served_model_name="given").served_name() == "given"


def test_kv_capacity(llama: Path) -> None:
    model = load_model(settings_for(llama))
    assert kv_capacity_tokens(settings_for(llama, kv_tokens=77), model) == 77
    free, total = device_memory(torch.device("cpu"))
    assert 0 < free <= total
    half = kv_capacity_tokens(settings_for(llama, kv_memory_share=0.5), model)
    assert half == pytest.approx(free * 0.5 / model.kv_bytes_per_token, rel=0.2)
    with pytest.raises(ModelError, match="kv_tokens"):
        kv_capacity_tokens(settings_for(llama, kv_tokens=1), model)


def test_an_unknown_engine_is_an_error_that_names_those_that_exist() -> None:
    with pytest.raises(UnknownEngine, match=r"'steam'.*padded"):
        engine_maker("steam")
