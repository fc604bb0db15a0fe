"""Owns the model card: the README of a model folder, written from measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .measure import (
    LIMIT_TOKENS,
    Lengths,
    Output,
    chat_prompt,
    generate,
    measured_prompts,
    summarise,
    words,
)
from .speeches import Split
from .vocabulary import END, END_ID, PAD, PAD_ID, SPEECH, SPEECH_ID

PROMPTS = 100
TEMPERATURES = (1.0, 0.8, 0.0)
TEXT = Path(__file__).with_name("card.md")


@dataclass(frozen=True)
class Measured:
    """What is measured on a saved model: lengths by temperature and a few texts."""

    parameters: int
    lengths: dict[float, Lengths]
    samples: dict[float, list[Output]]


def measure_model(folder: Path, split: Split, seed: int) -> Measured:
    """Load the saved model and run the card's prompts through it."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    speeches = [s for part in (split.train, split.held_out) for run in part for s in run]
    vocabulary = {word for speech in speeches for word in words(speech.rendered)}
    prompts = measured_prompts(tokenizer, split.held_out, PROMPTS, seed)
    shown = [
        f"{SPEECH}ROMEO:\n",
        f"{SPEECH}HIGGINS:\n",
        chat_prompt(tokenizer, "Speak to me of love."),
    ]
    lengths: dict[float, Lengths] = {}
    samples: dict[float, list[Output]] = {}
    for temperature in TEMPERATURES:
        outputs = generate(network, tokenizer, prompts, temperature, seed)
        lengths[temperature] = summarise(outputs, vocabulary)
        samples[temperature] = generate(network, tokenizer, shown, temperature, seed)
    return Measured(network.num_parameters(), lengths, samples)


def label(temperature: float) -> str:
    """How the card names a temperature."""
    return f"temperature {temperature}" if temperature else "greedy"


def length_rows(measured: Measured) -> str:
    """One table row for each temperature."""
    rows = []
    for temperature, found in measured.lengths.items():
        marks = " | ".join(f"{value:.0f}" for value in found.percentiles.values())
        rows.append(
            f"| {label(temperature)} | {found.mean:.0f} | {marks} | "
            f"{found.ended:.0%} | {found.known_words:.1%} |"
        )
    return "\n".join(rows)


def sample_texts(measured: Measured) -> str:
    """The shown prompts with what the model wrote, verbatim."""
    parts = []
    for temperature, outputs in measured.samples.items():
        for output in outputs:
            end = END if output.ended else f"(cut at {LIMIT_TOKENS} tokens)"
            parts.append(
                f"{label(temperature).capitalize()}, after `{output.prompt!r}`:\n\n"
                f"```text\n{output.text}{end}\n```"
            )
    return "\n\n".join(parts)


def history_rows(record: dict[str, Any], rows: int = 12) -> str:
    """The losses of the run as table rows, thinned to about `rows`, the last one kept."""
    steps = list(record["held_out"])
    thin = max(1, math.ceil(len(steps) / rows))
    kept = [*steps[:-1:thin], steps[-1]]
    return "\n".join(
        f"| {s} | {record['train'][s]:.3f} | {record['held_out'][s]:.3f} |" for s in kept
    )


def write_card(folder: Path, split: Split, record: dict[str, Any]) -> None:
    """Measure the model in `folder` and fill the card's text with the numbers."""
    plan = record["plan"]
    measured = measure_model(folder, split, plan["seed"])
    card = TEXT.read_text(encoding="utf-8").format(
        parameters=measured.parameters,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        train_speeches=sum(map(len, split.train)),
        held_out_speeches=sum(map(len, split.held_out)),
        steps=record["steps"],
        tokens=record["steps"] * record["tokens_per_step"] / 1e6,
        tokens_per_step=record["tokens_per_step"],
        minutes=record["seconds"] / 60,
        speed=record["steps"] * record["tokens_per_step"] / record["seconds"],
        best_step=record["best_step"],
        best_loss=record["best_loss"],
        perplexity=math.exp(record["best_loss"]),
        plan=", ".join(f"{name} {value}" for name, value in plan.items()),
        prompts=PROMPTS,
        limit=LIMIT_TOKENS,
        lengths=length_rows(measured),
        samples=sample_texts(measured),
        history=history_rows(record),
        special=f"`{PAD}` {PAD_ID}, `{SPEECH}` {SPEECH_ID} (bos), `{END}` {END_ID} (eos)",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
