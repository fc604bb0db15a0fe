"""Members: the requests of one worker as an admission gate sees them, and what else it may see."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.lengths import LengthModel
from services.scheduler.core.settings import Constants

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Member:
    """One request, in tokens."""

    prompt_tokens: int
    made: int
    """Output so far; of a running request up to the end of its lease, which its credit covers."""
    cap: int
    """The most output it may make: max_tokens."""
    true_output: int = 0
    """For the oracle only; nobody else may look."""

    @property
    def held(self) -> int:
        """Prompt and output so far."""
        return self.prompt_tokens + self.made


class Columns(Sequence[Member]):
    """Members as arrays; a gate takes these as they are and needs no conversion."""

    __slots__ = ("cap", "made", "prompt", "true_output")

    def __init__(self, prompt: Ints, made: Ints, cap: Ints, true_output: Ints) -> None:
        """All of one length, one entry per member."""
        self.prompt, self.made, self.cap, self.true_output = prompt, made, cap, true_output

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> "Columns": ...
    def __getitem__(self, index: int | slice) -> "Member | Columns":
        columns = (self.prompt, self.made, self.cap, self.true_output)
        if isinstance(index, slice):
            return Columns(*(column[index] for column in columns))
        return Member(*(int(column[index]) for column in columns))


@dataclass(frozen=True, slots=True)
class View:
    """What a gate may know of one worker."""

    capacity_tokens: int
    """KV tokens of the worker; gates apply their own reserve."""
    block_tokens: int
    members: Sequence[Member]
    """Running on the worker, in order of admission."""
    lengths: LengthModel
    constants: Constants
    draws: Draws


def columns(members: Sequence[Member]) -> Columns:
    """The members as arrays."""
    if isinstance(members, Columns):
        return members
    return Columns(
        _ints(m.prompt_tokens for m in members),
        _ints(m.made for m in members),
        _ints(m.cap for m in members),
        _ints(m.true_output for m in members),
    )


def _ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), dtype=np.int64)
