"""Owns the training windows: speeches as tokens, cut into batches of consecutive speeches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .speeches import Run
from .vocabulary import END_ID, SPEECH_ID

IGNORED = -100
"""The label of a position that the loss leaves out."""

TOKENS_PER_BATCH = 2048
WINDOW_TOKENS = (512, 1024, 2048)
WINDOW_SHARES = (0.75, 0.15, 0.1)
NAMELESS_SHARE = 0.06


@dataclass(frozen=True)
class Stream:
    """Speeches end to end; `ids`, `labels`: (tokens,), `starts`: (speeches,) token offsets."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]


def encode_runs(bpe: Tokenizer, runs: list[Run], dice: np.random.Generator | None = None) -> Stream:
    """Encode runs end to end; with `dice`, a few speeches lose their name.

    A chat message comes without a name, so the model must have read nameless speeches. The
    first token of one is left out of the loss: the model reads them and never begins one.
    """
    speeches = [speech for run in runs for speech in run]
    drawn = dice.random(len(speeches)) if dice else np.ones(len(speeches))
    nameless = drawn < NAMELESS_SHARE
    texts = [s.text if bare else s.rendered for s, bare in zip(speeches, nameless, strict=True)]
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for piece, bare in zip(
        bpe.encode_batch(texts, add_special_tokens=False), nameless, strict=True
    ):
        starts.append(len(ids))
        tokens = [SPEECH_ID, *piece.ids, END_ID]
        ids.extend(tokens)
        labels.extend([SPEECH_ID, IGNORED, *tokens[2:]] if bare else tokens)
    return Stream(np.array(ids), np.array(labels), np.array(starts))


def next_start(stream: Stream, begin: int, end: int) -> int:
    """The offset where the window after [begin, end) starts: a speech begun within, if any."""
    speech = int(np.searchsorted(stream.starts, end, side="right")) - 1
    start = int(stream.starts[speech])
    return start if start > begin else end


def epoch_batches(
    stream: Stream, dice: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), each (rows, window tokens), until the stream is used up once."""
    cursor = int(dice.choice(stream.starts[: max(1, len(stream.starts) // 50)]))
    while True:
        length = int(dice.choice(WINDOW_TOKENS, p=WINDOW_SHARES))
        spans: list[slice] = []
        for _ in range(TOKENS_PER_BATCH // length):
            if cursor + length > len(stream.ids):
                return
            spans.append(slice(cursor, cursor + length))
            cursor = next_start(stream, cursor, cursor + length)
        ids = np.stack([stream.ids[span] for span in spans])
        labels = np.stack([stream.labels[span] for span in spans])
        yield torch.from_numpy(ids), torch.from_numpy(labels)


def training_batches(
    bpe: Tokenizer, runs: list[Run], dropout: float, dice: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch: runs in a fresh order, encoded with merges left out at random (BPE dropout)."""
    shuffled = [runs[i] for i in dice.permutation(len(runs))]
    noisy = Tokenizer.from_str(bpe.to_str())
    if dropout > 0:
        noisy.model.dropout = dropout
    yield from epoch_batches(encode_runs(noisy, shuffled, dice), dice)


def held_out_windows(bpe: Tokenizer, runs: list[Run], length: int) -> list[torch.Tensor]:
    """Held-out runs as windows of at most `length` tokens, each (1, tokens)."""
    windows: list[torch.Tensor] = []
    for run in runs:
        ids = encode_runs(bpe, [run]).ids
        windows += [
            torch.from_numpy(ids[i : i + length])[None] for i in range(0, len(ids) - 1, length)
        ]
    return windows
