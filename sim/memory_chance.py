"""The memory-only simulator with the rules of `tranche`: chance, backfill, victims and credits.

Like `memory_only`, whose state and steps these are, with the scheduler core's own gate, survival
function and margin. What differs: behind a refused head others are tried (`backfill_max`), and
where memory does not last the victim is the preset's. With credits nobody runs without a lease that
has memory set aside; who has used up a lease gets the next one, shorter where memory is short, and
where none is left a victim is paused. What is set aside never exceeds what there is, so that no
allocation can fail: that is asserted at every step.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.policies.backfill import deepest, looked_at
from services.scheduler.core.policies.chance import ChanceGate, Margin, Moments
from services.scheduler.core.policies.lengths import LengthModel, prepare_lengths
from services.scheduler.core.policies.members import Columns, Member, View
from services.scheduler.core.policies.survival import kind_of
from services.scheduler.core.policies.victims import gains
from services.scheduler.core.presets import TRANCHE
from services.scheduler.core.settings import Constants
from sim.memory_only import (
    CAP_TOKENS,
    CAPACITY_TOKENS,
    PREFILL_TOKENS_MAX,
    QUIRKS,
    Ints,
    Lengths,
    Progress,
    Run,
    Tally,
    Waiting,
)

CHANCE = replace(QUIRKS, backfill_max=15, chance_target=0.03)
PRESET = replace(CHANCE, chance_return_less=float(TRANCHE["chance_return_less"]))
"""With all of `tranche` that plays a part here."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is switched on."""

    lease_tokens: int = 0
    """0: no credits; what overflows is evicted."""
    steered: bool = True
    """The margin follows the evictions; else it stays at `z`."""
    z: float | None = None
    """The margin to begin with; None: the core's."""


@dataclass(frozen=True, slots=True)
class ChanceTally:
    """What a run was, with what the plain tally does not tell."""

    plain: Tally
    margin_z: float
    """At the end."""
    unfair: int
    """The most often that anybody was overtaken."""


def simulate_chance(
    source: Sequence[Lengths],
    rules: Rules,
    constants: Constants = CHANCE,
    *,
    predicted: Sequence[int] | None = None,
    capacity_tokens: int = CAPACITY_TOKENS,
    progress: Progress = lambda done, total: None,
) -> ChanceTally:
    """Run over the requests of `source`, in their order; `predicted`: output that was predicted for
    each, none 0. Nothing is drawn."""
    run = ChanceRun(source, rules, constants, capacity_tokens, predicted)
    while not run.exhausted:
        run.ten_steps()
        run.round()
        progress(run.taken, len(source))
    return run.outcome()


@dataclass(slots=True)
class _Entry(Waiting):
    """One that waits."""

    number: int = 0
    predicted: int = 0
    returning: bool = False
    overtaken: int = 0
    kind: int = 0


_Asked = tuple[LengthModel, tuple[int, ...], Ints, NDArray[np.bool_], Moments]
"""Candidates and what they add, as long as neither they nor the history change."""


class ChanceRun(Run):
    """The state between rounds; arrays as in `Run`, and more of them."""

    def __init__(
        self,
        source: Sequence[Lengths],
        rules: Rules,
        constants: Constants,
        capacity: int,
        predicted: Sequence[int] | None,
    ) -> None:
        super().__init__(source, "chance", constants, 0, capacity)
        self._rules = rules
        self._predicted_of = predicted
        self._entries: list[_Entry] = []
        self._line: deque[_Entry] = deque()
        self._kind = self._until = self._prompt
        self._seen_kinds: deque[int] = deque(maxlen=constants.history_window)
        self.margin = Margin()
        if rules.z is not None:
            self.margin.z = rules.z
        self._overtaken_most = self._free = 0
        self._asked: _Asked | None = None

    def outcome(self) -> ChanceTally:
        """Once it is over."""
        plain = self.tally()
        return ChanceTally(
            plain=plain,
            margin_z=self.margin.z,
            unfair=self._overtaken_most,
        )

    # --------------------------------------------------------------------------------------- steps

    def _quiet_steps(self) -> int:
        quiet = super()._quiet_steps()
        if self._rules.lease_tokens and len(self._made):
            quiet = min(quiet, int((self._until - self._made).min()))
        return quiet

    def _step(self) -> None:
        if self._rules.lease_tokens:
            self._renew()
        before = self._finished
        super()._step()
        if self._rules.steered:
            for _ in range(self._finished - before):
                self.margin.saw_finish(self._constants, self._constants.chance_target)

    def _ended(self, ended: NDArray[np.bool_]) -> None:
        super()._ended(ended)
        self._seen_kinds.extend(self._kind[ended].tolist())

    def _check_memory(self) -> None:
        """Without credits memory may turn out too small; with them it cannot."""
        if self._rules.lease_tokens:
            assert self._committed() <= self._capacity, "an allocation would have failed"
            return
        while self._held > self._capacity:
            self._evict()

    def _committed(self) -> int:
        return int(self._prompt.sum() + self._until.sum())

    def _renew(self) -> None:
        """The next leases of those who have used theirs up; the nearest to its end first."""
        size = len(self._made)
        wanting = np.flatnonzero(self._made >= self._until)
        if not size or not wanting.size:
            return
        lease, committed = self._rules.lease_tokens, self._committed()
        if committed + lease * size <= self._capacity:  # also by shares there is enough
            self._until[wanting] += lease
            return
        while True:
            wanting = np.flatnonzero(self._made >= self._until)
            free = self._capacity - self._committed()
            if free >= wanting.size:
                break
            self._evict()
        for place in wanting.tolist():
            share = max(1, free // max(1, len(self._made)))
            tokens = min(lease, share, free - (wanting.size - 1) if free < lease else free)
            tokens = max(1, tokens)
            self._until[place] += tokens
            free -= tokens

    def _evict(self) -> None:
        left = self._model().survival.expected(self._made, self._caps, self._kind)
        gained = gains(left, self._prompt + self._made, return_tokens=0.0)
        place = len(gained) - 1 - int(gained[::-1].argmax())
        entry = self._entries[place]
        entry.made, entry.stood = int(self._made[place]), int(self._stood[place])
        entry.evicted_at = self._steps
        entry.returning, entry.overtaken = True, 0
        self._line.appendleft(entry)
        keep = np.ones(len(self._made), dtype=bool)
        keep[place] = False
        self._keep(keep)
        self._evictions += 1
        if self._rules.steered:
            self.margin.saw_eviction(self._constants, self._constants.chance_target)

    def _keep(self, which: "slice | NDArray[np.bool_]") -> None:
        assert not isinstance(which, slice)
        self._kind, self._until = self._kind[which], self._until[which]
        self._entries = [entry for entry, kept in zip(self._entries, which, strict=True) if kept]
        super()._keep(which)

    # --------------------------------------------------------------------------------------- round

    def round(self) -> None:
        """The head, and where it is refused those behind it."""
        gate = ChanceGate(self._chance_view())
        joined: list[_Entry] = []
        prefill, passed = 0, 0
        self._free = self._capacity - self._committed()
        while prefill < PREFILL_TOKENS_MAX:
            window = self._window()
            if len(window) <= passed:
                break
            alone = not len(self._made) and not joined
            place = self._first_admitted(gate, window, passed, alone)
            if place is None:
                break
            entry = window[place]
            gate.add(self._member(entry))
            joined.append(entry)
            self._free -= entry.prompt + entry.made + self._rules.lease_tokens
            del self._line[place]
            prefill += entry.prompt
            passed = place
            for other in window[:place]:
                other.overtaken += 1
                self._overtaken_most = max(self._overtaken_most, other.overtaken)
        self.exhausted = prefill < PREFILL_TOKENS_MAX and not self._line
        if joined:
            self._join_all(joined)
        if not self.exhausted:
            self._sample_round()

    def _window(self) -> list[_Entry]:
        """Who may be tried: the head and so many behind it, none behind one that has been
        overtaken too often."""
        found: list[_Entry] = []
        while len(found) < deepest(self._constants.backfill_max):
            entry = self._next(len(found))
            if entry is None:
                break
            found.append(entry)
            if entry.overtaken >= self._constants.overtaken_max:
                break
        predicted = [entry.predicted for entry in found]
        return found[: looked_at(predicted, self._constants.backfill_max)]

    def _first_admitted(
        self, gate: ChanceGate, window: Sequence[_Entry], since: int, alone: bool
    ) -> int | None:
        """The first from place `since` on, those before it having been refused by this gate;
        `alone`: nobody runs or has been admitted, so that the head need only fit."""
        tried = window[since:]
        model, numbers = self._model(), tuple(entry.number for entry in tried)
        known = self._asked
        if not len(self._made) or known is None or known[:2] != (model, numbers):
            rows = np.array([(e.prompt, e.made, CAP_TOKENS, e.output, e.kind) for e in tried])
            prompt, made, cap, output, kind = rows.T
            returning = np.array([e.returning for e in tried])
            moments = gate.moments(Columns(prompt, made, cap, output, kind=kind))
            known = self._asked = (model, numbers, prompt + made, returning, moments)
        _, _, held, returning, moments = known
        needs = gate.needs(moments, returning)
        needs[held + self._rules.lease_tokens > self._free] = np.inf
        fitting = np.flatnonzero(needs < self._capacity)
        if fitting.size:
            return since + int(fitting[0])
        return 0 if alone and gate.admits(self._member(window[0])) else None

    def _next(self, place: int) -> _Entry | None:
        """Who is at this place of the line; from the source if nobody is."""
        if place >= len(self._line) and self.taken < len(self._source):
            told = self._predicted_of[self.taken] if self._predicted_of is not None else 0
            prompt, output = self._source[self.taken]
            kind = kind_of(prompt, told)
            entry = _Entry(prompt, output, number=self.taken, predicted=told, kind=kind)
            self._line.append(entry)
            self.taken += 1
        return self._line[place] if place < len(self._line) else None

    def _member(self, entry: _Entry) -> Member:
        return Member(
            entry.prompt,
            entry.made,
            CAP_TOKENS,
            predicted=entry.predicted,
            returning=entry.returning,
        )

    def _join_all(self, joined: Sequence[_Entry]) -> None:
        self._entries = [*self._entries, *joined]
        made = np.array([entry.made for entry in joined], dtype=np.int64)
        self._kind = np.append(self._kind, [entry.kind for entry in joined])
        self._until = np.append(self._until, made + self._rules.lease_tokens)
        self._join(joined)

    def _model(self) -> LengthModel:
        if self._lengths is None:
            seen = np.array(self._history, dtype=np.int64)
            kinds = np.array(self._seen_kinds, dtype=np.int64)
            self._lengths = prepare_lengths(seen, None, self._constants, kinds)
        return self._lengths

    def _chance_view(self) -> View:
        members = Columns(self._prompt, self._made, self._caps, self._output, kind=self._kind)
        model, z = self._model(), self.margin.z
        return View(self._capacity, 1, members, model, self._constants, self._draws, z)
