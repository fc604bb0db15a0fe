"""Calibration cells: one measured iteration each, and the slices that can be composed of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.profiles import Coefficients, CostProfile

SLICE_TOKENS = 128
"""Of the slices on which a fit is judged: S of SCLS's set-up as recollected."""


class CalibrationError(ValueError):
    """The cells do not determine a profile; says what is missing."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured iteration."""

    chunks: tuple[tuple[int, int], ...]
    """(tokens, tokens already in the cache) of each prefill chunk."""
    decodes: int
    kv_tokens: int
    """The sum of the decodes' contexts."""
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that the iteration computes."""
        return self.decodes + sum(chunk for chunk, _ in self.chunks)

    @property
    def phase(self) -> str:
        """prefill, decode or mixed."""
        if not self.decodes:
            return "prefill"
        return "mixed" if self.chunks else "decode"

    @property
    def memory_tokens(self) -> int:
        """KV tokens that exist when the iteration ends."""
        return self.kv_tokens + sum(chunk + context for chunk, context in self.chunks)


@dataclass(frozen=True, slots=True)
class MeasuredSlice:
    """A closed slice, composed of the table's cells: a prefill, and the decodes that follow."""

    index: int
    """Of its prefill among the cells."""
    batch: int
    input_tokens: int
    seconds: float


def measured_slices(cells: Sequence[Cell], tokens: int = SLICE_TOKENS) -> list[MeasuredSlice]:
    """Each prefill of equal prompts, and tokens - 1 decodes of as many sequences; between the
    contexts that were measured, decode times are interpolated."""
    found = []
    for index, cell in enumerate(cells):
        if cell.decodes or len(set(cell.chunks)) != 1 or cell.chunks[0][1]:
            continue
        batch, length = len(cell.chunks), cell.chunks[0][0]
        seconds = _decodes_s(cells, batch, length, tokens - 1)
        if seconds is not None:
            found.append(MeasuredSlice(index, batch, length, cell.seconds + seconds))
    return found


def _decodes_s(cells: Sequence[Cell], batch: int, length: int, steps: int) -> float | None:
    """Of `steps` decodes of contexts length + 1, ...; None beyond what was measured."""
    points = sorted(
        (cell.kv_tokens / batch, cell.seconds)
        for cell in cells
        if cell.decodes == batch and not cell.chunks
    )
    if len(points) < 2 or points[0][0] > length + 1 or points[-1][0] < length + steps:
        return None
    contexts, seconds = zip(*points, strict=True)
    wanted = np.arange(length + 1, length + steps + 1)
    return float(np.interp(wanted, contexts, seconds).sum())


def predicted_slice_s(coefficients: Coefficients, sample: MeasuredSlice) -> float:
    """What the closed form says, without overheads."""
    profile = CostProfile(name="", model="", gpu="", kv_tokens=1, coefficients=coefficients)
    return profile.padded_s(sample.batch, sample.input_tokens, SLICE_TOKENS)
