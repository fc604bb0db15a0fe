"""Owns the command line: `python -m deploy.train_demo_model train|report` from the root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from .card import write_card
from .network import add_dropout, build_network, save_network
from .speeches import read_plays, split_plays
from .training import Plan, Record, Trainer
from .vocabulary import train_bpe, wrap_tokenizer

DEPLOY = Path(__file__).resolve().parents[1]
RECORD = "training.json"

app = typer.Typer(add_completion=False, help="Train and measure the shipped demo model.")

Text = Annotated[Path, typer.Option(help="Folder of the two plays.")]
Out = Annotated[Path, typer.Option(help="Model folder to write; files are replaced whole.")]
Seed = Annotated[int, typer.Option(help="Seed of split, weights and batch order.")]
Held = Annotated[float, typer.Option(help="Share of speech blocks held out.")]


@app.command()
def train(
    text: Text = DEPLOY / "demo_text",
    out: Out = DEPLOY / "demo_model",
    seed: Seed = 1599,
    held_out: Held = 0.05,
    steps: Annotated[int, typer.Option(help="Updates of 2048 tokens.")] = 6000,
    minutes: Annotated[float, typer.Option(help="Wall-time limit; 0: none.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    learning_rate: Annotated[float, typer.Option()] = 1.5e-3,
    weight_decay: Annotated[float, typer.Option()] = 0.1,
    dropout: Annotated[float, typer.Option()] = 0.1,
    bpe_dropout: Annotated[float, typer.Option()] = 0.08,
    evaluate_every: Annotated[int, typer.Option(help="Updates between evaluations.")] = 100,
) -> None:
    """Train from scratch, keep the best network by held-out loss, then write the card."""
    torch.set_num_threads(threads)
    split = split_plays(read_plays(text), held_out, seed)
    bpe = train_bpe(speech.rendered for run in split.train for speech in run)
    network, tokenizer = build_network(seed), wrap_tokenizer(bpe)
    add_dropout(network, dropout)

    def keep(record: Record) -> None:
        save_network(network, tokenizer, out)
        (out / RECORD).write_text(json.dumps(record.as_json(), indent=1) + "\n")

    plan = Plan(
        steps, minutes, seed, learning_rate, weight_decay, dropout, bpe_dropout, evaluate_every
    )
    record = Trainer(network, bpe, split, plan, keep).run()
    (out / RECORD).write_text(json.dumps(record.as_json(), indent=1) + "\n")
    report(text=text, out=out, held_out=held_out)


@app.command()
def report(
    text: Text = DEPLOY / "demo_text",
    out: Out = DEPLOY / "demo_model",
    held_out: Held = 0.05,
) -> None:
    """Measure the saved model again and rewrite its card."""
    torch.set_num_threads(1)  # the fastest for single tokens of so small a model
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    split = split_plays(read_plays(text), held_out, record["plan"]["seed"])
    write_card(out, split, record)


if __name__ == "__main__":
    app()
