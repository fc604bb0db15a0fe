"""Owns the checks of the shipped demo model: it loads, speaks English and ends its speeches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FOLDER = DEPLOY / "demo_model"
SPEAKERS = ("ROMEO", "HIGGINS", "KING RICHARD II", "LIZA", "First Citizen", "MENENIUS", "JULIET")
WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
CHAT = [
    {"role": "system", "content": "A street."},
    {"role": "user", "content": "Speak to me of love."},
    {"role": "assistant", "content": "ROMEO:\nI will."},
    {"role": "user", "content": "Go on."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    """The model in float32; one thread is the fastest for so small a model on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def play_words() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (DEPLOY / "demo_text").glob("*.txt"))
    return {word.lower() for text in texts for word in WORD.findall(text)}


def speak(
    network: Any, tokenizer: Any, prompts: list[str], sample: bool, limit: int = 256
) -> list[list[int]]:
    """New token ids for each rendered prompt, the end token included where it came."""
    torch.manual_seed(7)
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    style = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    with torch.inference_mode():
        rows = network.generate(**batch, max_new_tokens=limit, **style)
    pad = tokenizer.pad_token_id
    width = batch["input_ids"].shape[1]
    return [[token for token in row.tolist() if token != pad] for row in rows[:, width:]]


def test_weights_are_small_safetensors() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert not list(FOLDER.glob("*.bin"))
    assert not list(FOLDER.glob("*.p*[tk]*l"))


def test_configuration(network: Any, tokenizer: Any) -> None:
    config = network.config
    assert config.model_type == "llama"
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size == len(tokenizer) == 2048
    assert config.eos_token_id == tokenizer.eos_token_id == network.generation_config.eos_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_plain_prompt_opens_a_speech(tokenizer: Any) -> None:
    ids = tokenizer("ROMEO:\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "ROMEO:\n"


@pytest.mark.parametrize("text", ["O, what light?", "naïve café 😀\n\ttabs", ""])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_chat_template_renders_the_roles(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|speech|>STAGE:\nA street.<|end|>"
        "<|speech|>Speak to me of love.<|end|>"
        "<|speech|>ROMEO:\nI will.<|end|>"
        "<|speech|>Go on.<|end|>"
        "<|speech|>"
    )
    closed = tokenizer.apply_chat_template(CHAT[::-1], tokenize=False)
    assert closed.endswith("<|speech|>STAGE:\nA street.<|end|>")


def test_chat_answer_names_its_speaker(network: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    (answer,) = speak(network, tokenizer, [prompt], sample=False)
    assert re.match(r"[A-Z][A-Za-z. '-]*:\n\S", tokenizer.decode(answer))


@pytest.mark.parametrize("sample", [False, True])
def test_speeches_are_english(
    network: Any, tokenizer: Any, play_words: set[str], sample: bool
) -> None:
    prompts = [f"{tokenizer.bos_token}{name}:\n" for name in SPEAKERS]
    spoken = " ".join(
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in speak(network, tokenizer, prompts, sample, limit=96)
    )
    words = [word.lower() for word in WORD.findall(spoken)]
    assert len(words) >= 40
    assert sum(word in play_words for word in words) / len(words) >= 0.7


def test_speeches_end_at_varied_lengths(network: Any, tokenizer: Any) -> None:
    prompts = [f"{tokenizer.bos_token}{name}:\n" for name in SPEAKERS] * 3
    outputs = speak(network, tokenizer, prompts, sample=True)
    ended = [ids for ids in outputs if ids[-1] == tokenizer.eos_token_id]
    assert len(ended) >= 0.8 * len(outputs)
    lengths = sorted(len(ids) for ids in ended)
    assert len(set(lengths)) >= 8
    assert lengths[-1] >= 3 * lengths[0]
