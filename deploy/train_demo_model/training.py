"""Owns the training loop: AdamW on a cosine, best network by held-out loss, progress shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .speeches import Split
from .windows import TOKENS_PER_BATCH, held_out_windows, training_batches

WARMUP_STEPS = 150
FLOOR = 0.03
"""The last learning rate, as a share of the highest."""
BPE_DROPOUT_UNTIL = 0.75
"""The share of training after which speeches are encoded canonically."""
HELD_OUT_WINDOW = 1024


@dataclass(frozen=True)
class Plan:
    """What one training run is asked to do; `minutes` 0 means no wall-time limit."""

    steps: int
    minutes: float
    seed: int
    learning_rate: float
    weight_decay: float
    dropout: float
    bpe_dropout: float
    evaluate_every: int


@dataclass
class Record:
    """What a training run did; losses in nats per token, by step."""

    plan: Plan
    held_out: dict[int, float] = field(default_factory=dict)
    train: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf

    def as_json(self) -> dict[str, object]:
        """The record as plain values for a JSON file."""
        return asdict(self) | {"tokens_per_step": TOKENS_PER_BATCH}


def held_out_loss(network: LlamaForCausalLM, windows: list[torch.Tensor]) -> float:
    """Mean loss over all held-out tokens, nats per token; windows: (1, tokens) each."""
    network.eval()
    total, count = 0.0, 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for window in windows:
            predicted = window.shape[1] - 1
            total += float(network(input_ids=window, labels=window, use_cache=False).loss) * (
                predicted
            )
            count += predicted
    network.train()
    return total / count


def build_optimizer(network: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms alone."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(plan: Plan, step: int, progress: float) -> float:
    """Linear warm-up by step, then a cosine by progress (0 to 1)."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return plan.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


class Trainer:
    """Trains one network on one split and hands each new best network to `keep`."""

    def __init__(
        self,
        network: LlamaForCausalLM,
        bpe: Tokenizer,
        split: Split,
        plan: Plan,
        keep: Callable[[Record], None],
    ) -> None:
        self.network, self.bpe, self.split, self.plan, self.keep = network, bpe, split, plan, keep
        self.dice = np.random.default_rng(plan.seed)
        self.windows = held_out_windows(bpe, split.held_out, HELD_OUT_WINDOW)
        self.optimizer = build_optimizer(network, plan)
        self.record = Record(plan)
        self.console = Console(width=100)
        self.began = time.monotonic()

    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by minutes, whichever is further."""
        self.record.seconds = time.monotonic() - self.began
        by_steps = self.record.steps / self.plan.steps
        by_time = self.record.seconds / (60 * self.plan.minutes) if self.plan.minutes else 0.0
        return max(by_steps, by_time)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches without end, epoch after epoch."""
        while True:
            noise = self.plan.bpe_dropout if self.progress() < BPE_DROPOUT_UNTIL else 0.0
            yield from training_batches(self.bpe, self.split.train, noise, self.dice)

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """One update; ids, labels: (rows, window tokens); returns the loss in nats per token."""
        rate = learning_rate(self.plan, self.record.steps, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.network(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.record.steps += 1
        return float(loss.detach())

    def evaluate(self, train_losses: list[float]) -> None:
        """Measure the held-out loss, note it, and keep the network if it is the best so far."""
        record, loss = self.record, held_out_loss(self.network, self.windows)
        record.held_out[record.steps] = loss
        record.train[record.steps] = sum(train_losses) / max(1, len(train_losses))
        speed = record.steps * TOKENS_PER_BATCH / max(1e-9, record.seconds)
        better = loss < record.best_loss
        self.console.print(
            f"step {record.steps}  train {record.train[record.steps]:.3f}  held out {loss:.3f}"
            f"{'  best' if better else ''}  {speed:.0f} tokens/s  {record.seconds:.0f} s"
        )
        if better:
            record.best_step, record.best_loss = record.steps, loss
            self.keep(record)

    def run(self) -> Record:
        """Train to the plan's steps or minutes; the last step is always evaluated."""
        self.network.train()
        losses: list[float] = []
        with Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=self.console
        ) as bar:
            task = bar.add_task("training", total=1.0)
            for ids, labels in self.batches():
                losses.append(self.step(ids, labels))
                done = self.progress()
                bar.update(task, completed=done)
                if done >= 1 or self.record.steps % self.plan.evaluate_every == 0:
                    self.evaluate(losses)
                    losses = []
                if done >= 1:
                    return self.record
        return self.record
