"""Owns the measurements of a saved model: texts, output lengths and how they end."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .speeches import Run
from .vocabulary import END_ID

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
LIMIT_TOKENS = 512


@dataclass(frozen=True)
class Output:
    """One generated continuation; `tokens` counts the end token where `ended`."""

    prompt: str
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Lengths:
    """Output lengths in tokens over a set of prompts, and shares between 0 and 1."""

    mean: float
    percentiles: dict[int, float]
    ended: float
    known_words: float


def words(text: str) -> list[str]:
    """The words of a text, in lower case, apostrophes within words kept."""
    return [word.lower() for word in WORD.findall(text)]


def known_share(texts: Iterable[str], vocabulary: set[str]) -> float:
    """The share of all words in the texts that the vocabulary has."""
    spoken = [word for text in texts for word in words(text)]
    return sum(word in vocabulary for word in spoken) / max(1, len(spoken))


def chat_prompt(tokenizer: PreTrainedTokenizerFast, message: str) -> str:
    """One user message rendered by the chat template, generation prompt included."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


def measured_prompts(
    tokenizer: PreTrainedTokenizerFast, held_out: list[Run], count: int, seed: int
) -> list[str]:
    """Half completions that name a held-out speaker, half chats with a held-out first line."""
    speeches = [speech for run in held_out for speech in run]
    dice = random.Random(seed)  # noqa: S311 - a reproducible choice, no secret
    drawn = dice.sample(speeches, count)
    named = [f"{tokenizer.bos_token}{speech.name}:\n" for speech in drawn[: count // 2]]
    lines = [speech.text.split("\n")[0] for speech in drawn[count // 2 :]]
    return named + [chat_prompt(tokenizer, line) for line in lines]


def generate_ids(
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
    limit: int,
) -> list[list[int]]:
    """New token ids for rendered prompts, the end token included; temperature 0 is greedy."""
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    style = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    with torch.inference_mode():
        produced = network.generate(**batch, max_new_tokens=limit, **style)
    rows = [row.tolist() for row in produced[:, batch["input_ids"].shape[1] :]]
    return [row[: row.index(END_ID) + 1] if END_ID in row else row for row in rows]


def generate(
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
    seed: int,
) -> list[Output]:
    """Continue rendered prompts up to the limit of tokens; temperature 0 is greedy."""
    torch.manual_seed(seed)
    produced = generate_ids(network, tokenizer, prompts, temperature, LIMIT_TOKENS)
    return [
        Output(
            prompt,
            str(tokenizer.decode(ids, skip_special_tokens=True)),
            len(ids),
            ids[-1] == END_ID,
        )
        for prompt, ids in zip(prompts, produced, strict=True)
    ]


def summarise(outputs: list[Output], vocabulary: set[str]) -> Lengths:
    """Output lengths, the share that ended by itself and the share of known words."""
    tokens = np.array([output.tokens for output in outputs])
    return Lengths(
        mean=float(tokens.mean()),
        percentiles={p: float(np.percentile(tokens, p)) for p in (5, 25, 50, 75, 95, 100)},
        ended=sum(output.ended for output in outputs) / len(outputs),
        known_words=known_share((output.text for output in outputs), vocabulary),
    )
