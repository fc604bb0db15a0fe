"""Gates: may a waiting request join the batch that runs on a worker, as far as memory goes?

Theory of operation. A gate is made from a View of one worker and answers for one candidate after
the other; `add` says that one of them joins. Memory is counted in blocks of the worker; with
blocks of one token in tokens, as the sources do. Two facts are common to all: nobody is kept from
an empty worker whose memory holds what the candidate has so far [T] (else it could wait for ever),
and of what a request made the last token is not yet held (`count_last_token`).

Whether the granted leases fit is the mechanics' rule, not a gate's: gates look further ahead.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.policies.chance import chance
from services.scheduler.core.policies.future import Future
from services.scheduler.core.policies.members import Columns, Member, View, columns
from services.scheduler.core.settings import Constants

Ints = NDArray[np.int64]


class Gate(Protocol):
    """One worker's admission, while candidates are tried."""

    @property
    def needed(self) -> float:
        """What the batch would need with the last candidate, in tokens, as far as was looked."""
        ...

    @property
    def room(self) -> float:
        """Tokens within which that has to stay."""
        ...

    @property
    def lasting(self) -> bool:
        """The last candidate was refused, and will be until somebody leaves the batch: growing
        alone makes no room. False where later samples or times may say otherwise."""
        ...

    def admits(self, candidate: Member) -> bool:
        """May it join? Nothing changes."""
        ...

    def add(self, candidate: Member) -> None:
        """It joins."""
        ...


class _Memory:
    """A worker's memory in blocks, and what is in it."""

    __slots__ = ("block", "capacity", "lag", "members", "running")

    def __init__(self, view: View) -> None:
        self.block = max(1, view.block_tokens)
        self.capacity = max(0, view.capacity_tokens) // self.block
        self.lag = 0 if view.constants.count_last_token else 1
        self.members: Columns = columns(view.members)
        self.running = len(self.members)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def blocks_of_all(self, tokens: Ints) -> int:
        return int((tokens if self.block == 1 else -(-tokens // self.block)).sum())

    def takes_alone(self, candidate: Member) -> bool:
        return self.running == 0 and self.blocks(candidate.held) <= self.capacity


class SumGate:
    """Each request takes what a rule says; the sum stays within a limit."""

    def __init__(
        self,
        memory: _Memory,
        taken: int,
        limit: float,
        newcomer: Callable[[Member], int],
        joined: Callable[[Member], int] | None = None,
        full_at: float = float("inf"),
    ) -> None:
        """In blocks: `taken` by the members, `newcomer` what a candidate needs to be admitted,
        `joined` what it takes afterwards if that differs; from `full_at` taken on nobody joins."""
        self._memory = memory
        self._taken = taken
        self._limit = limit
        self._newcomer = newcomer
        self._joined = joined or newcomer
        self._full_at = full_at
        self.needed, self.room = 0.0, float(limit * memory.block)
        self.lasting = False

    def admits(self, candidate: Member) -> bool:
        need = self._taken + self._newcomer(candidate)
        self.needed = float(need * self._memory.block)
        fits = need <= self._limit
        fits = fits and self._taken < self._full_at
        self.lasting = not (fits or self._memory.takes_alone(candidate))
        return not self.lasting

    def add(self, candidate: Member) -> None:
        self._taken += self._joined(candidate)
        self._memory.running += 1


class PeakGate:
    """The predicted peak of the batch stays below a limit, under each of S lists of lengths.

    The lists are only made when they can matter: a peak is never below what is held now.
    """

    def __init__(
        self,
        memory: _Memory,
        limit: float,
        lists: int,
        members_left: Callable[[int], Ints],
        candidate_left: Callable[[Member, int], Ints],
    ) -> None:
        """`members_left(S)`: (S, n) tokens that the members have left; `candidate_left(c, S)`:
        (S,) for a candidate; `limit` in blocks, itself not allowed."""
        self._memory = memory
        self._limit = limit
        self._lists = lists
        self._members_left = members_left
        self._candidate_left = candidate_left
        self._held = memory.members.prompt + memory.members.made - memory.lag
        self._held_sum = memory.blocks_of_all(self._held)
        self._future: Future | None = None
        self._asked: Member | None = None
        self._left: Ints | None = None
        self.needed, self.room = 0.0, float(limit * memory.block)
        self.lasting = False

    def admits(self, candidate: Member) -> bool:
        self._asked, self.lasting = None, False
        if self._memory.takes_alone(candidate):
            return True
        held = candidate.held - self._memory.lag
        at_once = self._held_sum + self._memory.blocks(held)
        self.needed = float(at_once * self._memory.block)
        if at_once >= self._limit:
            self.lasting = True
            return False
        peak = self._peak_with(candidate, held)
        self.needed = float(peak * self._memory.block)
        return peak < self._limit

    def add(self, candidate: Member) -> None:
        """It stays with the lengths under which it was admitted, also if it joins with a lease."""
        held = candidate.held - self._memory.lag
        left = self._left_as_asked(candidate)
        if left is None:
            left = self._candidate_left(candidate, self._lists)
        self._now().add(held, left)
        self._held_sum += self._memory.blocks(held)
        self._memory.running += 1
        self._asked = None

    def _left_as_asked(self, candidate: Member) -> Ints | None:
        """What was drawn when it was asked for, less what its first lease now covers."""
        asked, left = self._asked, self._left
        if asked is None or left is None or asked.prompt_tokens != candidate.prompt_tokens:
            return None
        return np.maximum(left - max(0, candidate.made - asked.made), 0)

    def _peak_with(self, candidate: Member, held: int) -> int:
        future = self._now()
        self._asked, self._left = candidate, self._candidate_left(candidate, self._lists)
        return future.peak_with(held, self._left)

    def _now(self) -> Future:
        if self._future is None:
            left = self._members_left(self._lists)
            self._future = Future(self._held, left, self._memory.block)
        return self._future


def past_future(view: View) -> Gate:
    """Past-Future: the largest of S sampled peaks below (1 - reserve) x memory; each request's
    length from the history, given what it made. S = min(5, 200 / batch + 1), one for an empty
    batch (artifact)."""
    memory, constants, lengths, draws = _Memory(view), view.constants, view.lengths, view.draws
    size = memory.running
    lists = min(constants.future_lists_max, constants.future_lists_budget // max(1, size) + 1)
    members = memory.members
    return PeakGate(
        memory,
        memory.capacity * (1 - constants.future_reserve),
        max(1, lists) if size else 1,
        lambda count: lengths.remaining(members.made, members.cap, draws, count),
        lambda candidate, count: lengths.candidate(candidate.made, candidate.cap, draws, count),
    )


def oracle(view: View) -> Gate:
    """The exact peak with true lengths below (1 - `oracle_reserve`) x memory."""
    memory = _Memory(view)
    members = memory.members
    return PeakGate(
        memory,
        memory.capacity * (1 - view.constants.oracle_reserve),
        1,
        lambda _: np.maximum(members.true_output - members.made, 0)[None, :],
        lambda candidate, _: _one(max(0, candidate.true_output - candidate.made)),
    )


def larry_b(view: View) -> Gate:
    """LARRY-b [R]: what the running requests are expected to grow is kept for them. The peak under
    each one's expected length, the candidate's included, stays within memory."""
    memory, lengths = _Memory(view), view.lengths
    members = memory.members

    def left_of_all(_: int) -> Ints:
        return np.ceil(lengths.expected_remaining_all(members.made, members.cap))[None, :].astype(
            np.int64
        )

    def left_of_one(candidate: Member, _: int) -> Ints:
        return _one(int(np.ceil(lengths.expected_remaining(candidate.made, candidate.cap))))

    return PeakGate(memory, memory.capacity + 1, 1, left_of_all, left_of_one)


def aggressive(view: View) -> Gate:
    """What is held now and the newcomer stay within a watermark, whatever comes later."""
    memory, constants = _Memory(view), view.constants

    def newcomer(candidate: Member) -> int:
        made = candidate.made if constants.aggressive_counts_made else 0
        return memory.blocks(candidate.prompt_tokens + made)

    return SumGate(
        memory,
        _held_now(memory),
        memory.capacity * constants.aggressive_watermark,
        newcomer,
        joined=lambda candidate: memory.blocks(candidate.held),
        full_at=_full_at(memory, constants.aggressive_full_at),
    )


def conservative(view: View) -> Gate:
    """The worst cases, prompt and limit, sum up to at most overcommit x memory."""
    memory, constants = _Memory(view), view.constants
    expected = constants.conservative_output_tokens
    members = memory.members
    worst = members.prompt + (expected or members.cap) - memory.lag
    return SumGate(
        memory,
        memory.blocks_of_all(worst),
        memory.capacity * constants.conservative_overcommit,
        lambda candidate: memory.blocks(
            candidate.prompt_tokens + (expected or candidate.cap) - memory.lag
        ),
    )


def reserve_all(view: View) -> Gate:
    """TGI (prompt + limit - 1) and TensorRT-LLM's no-evict: everybody's worst case is reserved and
    fits; there is no overcommit."""
    memory = _Memory(view)
    members = memory.members
    return SumGate(
        memory,
        memory.blocks_of_all(members.prompt + members.cap - 1),
        memory.capacity,
        lambda candidate: memory.blocks(candidate.prompt_tokens + candidate.cap - 1),
    )


def prompt_fits(view: View) -> Gate:
    """vLLM: the prompt (and, of a re-queued one, its output, which is computed again) fits what is
    free now, less a watermark: none in V1, 1 % in V0 and Sarathi."""
    memory = _Memory(view)
    return SumGate(
        memory,
        _held_now(memory),
        memory.capacity * (1 - view.constants.prompt_watermark),
        lambda candidate: memory.blocks(candidate.held),
    )


def next_step(view: View) -> Gate:
    """TensorRT-LLM's max-utilization: everybody's next step fits."""
    memory = _Memory(view)
    members = memory.members
    return SumGate(
        memory,
        memory.blocks_of_all(members.prompt + members.made - memory.lag + 1),
        memory.capacity,
        lambda candidate: memory.blocks(candidate.held + 1),
    )


def larry_a(view: View) -> Gate:
    """LARRY-a [R]: what is free after the newcomer's prompt is at least x % of memory."""
    memory = _Memory(view)
    return SumGate(
        memory,
        _held_now(memory),
        memory.capacity * (1 - view.constants.larry_reserve),
        lambda candidate: memory.blocks(candidate.held),
    )


def _held_now(memory: _Memory) -> int:
    """Blocks of the members' prompts and outputs, but for each one's last token."""
    members = memory.members
    written = members.prompt + members.made - memory.lag * (members.made > 0)
    return memory.blocks_of_all(written)


def _full_at(memory: _Memory, share: float) -> float:
    return memory.capacity * share if share < 1 else float("inf")


def _one(value: int) -> Ints:
    return np.array((value,), dtype=np.int64)


def _within_reserve(constants: Constants) -> float:
    return 1 - constants.future_reserve if constants.lengths_within_cap else 0.0


def _never(constants: Constants) -> float:
    return 0.0


SURE_SHARE: dict[str, Callable[[Constants], float]] = {
    "past-future": _within_reserve,
    "oracle": lambda constants: 1 - constants.oracle_reserve,
    "aggressive": lambda constants: min(
        constants.aggressive_watermark, constants.aggressive_full_at
    ),
    "conservative": _never,
    "reserve-all": lambda constants: 1.0,
    "prompt-fits": lambda constants: 1 - constants.prompt_watermark,
    "next-step": lambda constants: 1.0,
    "larry-a": lambda constants: 1 - constants.larry_reserve,
    "larry-b": lambda constants: 1.0 if constants.lengths_within_cap else 0.0,
    "chance": lambda constants: 1.0 if constants.lengths_within_cap else 0.0,
}
"""Of each gate the share of memory within which it admits for certain, if even the longest outputs
of everybody stay below it. 0: nothing is certain, since it may expect more than that."""


GATES: dict[str, Callable[[View], Gate]] = {
    "past-future": past_future,
    "oracle": oracle,
    "aggressive": aggressive,
    "conservative": conservative,
    "reserve-all": reserve_all,
    "prompt-fits": prompt_fits,
    "next-step": next_step,
    "larry-a": larry_a,
    "larry-b": larry_b,
    "chance": chance,
}
