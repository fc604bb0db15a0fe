"""Admission: does a closed batch fit a worker, whatever its requests will generate?"""

from collections.abc import Callable
from dataclasses import dataclass

from shared.memory import batch_size_limit, closed_batch_tokens


@dataclass(frozen=True, slots=True)
class Room:
    """What one worker, or the narrowest of several, can take."""

    budget_tokens: int
    batch_size_max: int
    """0: only memory limits."""
    context_tokens_max: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a closed batch needs."""

    batch_size: int
    input_tokens_max: int
    iterations: int
    context_tokens: int
    """The longest prompt plus whole output among its requests."""


SizeLimit = Callable[[Room, int, int], int]
"""(room, longest input, iterations) -> the most rows. May be 0."""


def slice_bound(room: Room, input_tokens_max: int, iterations: int) -> int:
    """SCLS's memory predicate, N x (L + S) <= budget, solved for N. With whole outputs instead of
    slices it is the worst case that sequence-level scheduling has to assume."""
    rows = batch_size_limit(room.budget_tokens, input_tokens_max, iterations)
    return min(rows, room.batch_size_max) if room.batch_size_max else rows


def fits(room: Room, need: Footprint) -> bool:
    """May this batch go to a worker with this room?"""
    slots = closed_batch_tokens(need.batch_size, need.input_tokens_max, need.iterations)
    narrow = room.batch_size_max and need.batch_size > room.batch_size_max
    return (
        slots <= room.budget_tokens
        and not narrow
        and need.context_tokens <= room.context_tokens_max
    )


ADMISSIONS: dict[str, SizeLimit] = {"slice-bound": slice_bound}
