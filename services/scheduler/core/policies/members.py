"""Members: the requests of one worker as an admission gate sees them, and what else it may see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.lengths import LengthModel
from services.scheduler.core.policies.survival import kinds_of
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
    leased: int = 0
    """Of `made`, what its lease covers and it has not made yet."""
    predicted: int = 0
    """The output that was predicted for it; 0: none was."""
    returning: bool = False
    """It lost its place here or elsewhere for want of memory, and comes back."""

    @property
    def held(self) -> int:
        """Prompt and output so far."""
        return self.prompt_tokens + self.made


class Columns(Sequence[Member]):
    """Members as arrays; a gate takes these as they are and needs no conversion."""

    __slots__ = ("_kind", "cap", "leased", "made", "predicted", "prompt", "true_output")

    def __init__(
        self,
        prompt: Ints,
        made: Ints,
        cap: Ints,
        true_output: Ints,
        leased: Ints | None = None,
        predicted: Ints | None = None,
        kind: Ints | None = None,
    ) -> None:
        """All of one length, one entry per member; None: 0 for all. `kind`: their classes, if they
        are known already."""
        self.prompt, self.made, self.cap, self.true_output = prompt, made, cap, true_output
        self.leased, self.predicted, self._kind = leased, predicted, kind

    @property
    def reached(self) -> Ints:
        """What each one has made in truth, without what its lease covers beyond."""
        return self.made if self.leased is None else self.made - self.leased

    @property
    def kind(self) -> Ints:
        """The class of each, see `survival`."""
        if self._kind is None:
            self._kind = kinds_of(self.prompt, self.predicted)
        return self._kind

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> "Columns": ...
    def __getitem__(self, index: int | slice) -> "Member | Columns":
        columns = (self.prompt, self.made, self.cap, self.true_output)
        more = (self.leased, self.predicted)
        if isinstance(index, slice):
            rest = (None if column is None else column[index] for column in more)
            return Columns(*(column[index] for column in columns), *rest)
        leased, predicted = (0 if column is None else int(column[index]) for column in more)
        prompt, made, cap, true_output = (int(column[index]) for column in columns)
        return Member(prompt, made, cap, true_output, leased, predicted)


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
    margin_z: float = 2.0
    """Deviations of future memory that `chance` keeps free."""


def columns(members: Sequence[Member]) -> Columns:
    """The members as arrays."""
    if isinstance(members, Columns):
        return members
    rows = [(m.prompt_tokens, m.made, m.cap, m.true_output, m.leased, m.predicted) for m in members]
    if not rows:
        return Columns(*(_NOBODY for _ in range(4)))
    return Columns(*np.array(rows, dtype=np.int64).T)


_NOBODY: Ints = np.zeros(0, dtype=np.int64)
