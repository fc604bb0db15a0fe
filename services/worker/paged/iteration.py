"""One iteration's rows: which tokens are computed, where their KV goes, and what each may see.

A row is one token to compute. Sequences that decode have one row each; a chunk of prefill has as
many as it has tokens. Rows of one sequence lie together, in the order of their positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, Any]
CHUNK_ROWS_MIN = 24
"""Chunks of at least so many rows are attended to by matrix products, shorter ones row by row."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence computes: the tokens at positions context - len(ids) to context."""

    seat: int
    ids: Sequence[int] | Ints
    context: int
    """Its tokens in the cache after this iteration."""
    wanted: int
    """Logits of so many of its last rows."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows begin..end are one sequence's chunk, long enough for matrix products."""

    begin: int
    end: int
    seat: int
    context: int


@dataclass(frozen=True, slots=True)
class Iteration:
    """See the module's text."""

    ids: Ints
    """int64 [rows]."""
    positions: Ints
    """int64 [rows]."""
    slots: Ints
    """int64 [rows]: block x block_tokens + place."""
    seats: Ints
    """int32 [rows]."""
    contexts: Ints
    """int32 [rows]: tokens that the row sees, its own the last."""
    single: int
    """The first so many rows are attended to row by row; the rest is in `chunks`."""
    chunks: tuple[Chunk, ...]
    wanted: Ints
    """int64: rows whose logits are wanted, in the order of the parts."""
    tables: Ints
    """int32 [seats, blocks]: the blocks of each seat."""


def lay_out(parts: Sequence[Part], tables: Ints, block_tokens: int) -> Iteration:
    """The rows of these parts: single rows and short chunks first."""
    order = sorted(range(len(parts)), key=lambda i: len(parts[i].ids) >= CHUNK_ROWS_MIN)
    lengths = np.array([len(parts[i].ids) for i in order], dtype=np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1])
    ids = np.empty(total, dtype=np.int64)
    for i, begin, end in zip(order, begins, ends, strict=True):
        ids[begin:end] = parts[i].ids
    starts = np.array([parts[i].context for i in order], dtype=np.int64) - lengths
    positions = np.arange(total, dtype=np.int64) + np.repeat(starts - begins, lengths)
    seats = np.repeat(np.array([parts[i].seat for i in order], dtype=np.int32), lengths)
    slots = tables[seats, positions // block_tokens].astype(np.int64) * block_tokens
    slots += positions % block_tokens
    end_of = dict(zip(order, ends.tolist(), strict=True))
    wanted = [
        row for i, part in enumerate(parts) for row in range(end_of[i] - part.wanted, end_of[i])
    ]
    chunks = tuple(
        Chunk(int(begin), int(end), parts[i].seat, parts[i].context)
        for i, begin, end in zip(order, begins, ends, strict=True)
        if end - begin >= CHUNK_ROWS_MIN
    )
    return Iteration(
        ids=ids,
        positions=positions,
        slots=slots,
        seats=seats,
        contexts=(positions + 1).astype(np.int32),
        single=chunks[0].begin if chunks else total,
        chunks=chunks,
        wanted=np.array(wanted, dtype=np.int64),
        tables=tables,
    )
