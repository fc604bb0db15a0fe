"""A leased engine as a table of requests and a loop over iterations: slow, and easy to believe."""

from dataclasses import dataclass, field
from itertools import pairwise

from services.worker.core.pretend_parts import Costs


@dataclass
class Sequence:
    request_id: str
    attempt: int
    prompt: int
    made: int
    length: int
    until: int
    cap: int
    filled: int = 0
    paused: bool = False
    told: bool = False
    reported: int = 0
    token_times: list[float] = field(default_factory=list)
    last_reported_at: float | None = None

    @property
    def prefilling(self) -> bool:
        return self.filled < self.input

    @property
    def input(self) -> int:
        return self.prompt + self._begun_with

    def __post_init__(self) -> None:
        self._begun_with = self.made
        self.reported = self.made


Told = tuple[str, int, float, int, int, str, bool, float]
"""(request, attempt, at, position, tokens, reason, resident, longest gap)."""


class SlowEngine:
    """One iteration at a time; every KV slot is counted anew each time."""

    def __init__(self, costs: Costs, block: int, margin: int, budget: int, first: bool) -> None:
        self.costs, self.block, self.margin = costs, block, margin
        self.budget, self.prefill_first = budget, first
        self.sequences: list[Sequence] = []
        self.told: list[Told] = []
        self.blocks_peak = 0
        self.now = 0.0
        self.end: float | None = None
        self.inbox: list[tuple[str, object]] = []
        self.plan: tuple[list[tuple[Sequence, int]], list[Sequence]] = ([], [])

    def say(self, kind: str, what: object, now: float) -> None:
        """Obeyed between two iterations; a longer lease counts at once."""
        self.run_to(now)
        if kind == "renew":
            self._extend(*what, resume=False)  # type: ignore[misc]
        self.inbox.append((kind, what))
        if self.end is None:
            self.now = now
            self._begin()

    def run_to(self, now: float) -> None:
        while self.end is not None and self.end <= now:
            self.now = self.end
            self._finish()
            self._begin()

    def _begin(self) -> None:
        inbox, self.inbox = self.inbox, []
        for kind, what in inbox:
            self._obey(kind, what)
        waiting = [s for s in self.sequences if s.prefilling]
        running = [s for s in self.sequences if not s.prefilling and not s.paused]
        if self.prefill_first and waiting:
            running = []
        room, chunks = self.budget - len(running), []
        for sequence in waiting:
            if room > 0:
                take = min(room, sequence.input - sequence.filled)
                chunks.append((sequence, take))
                room -= take
        self.plan = (chunks, running)
        self.end = None
        if chunks or running:
            contexts = sum(s.prompt + s.made for s in running)
            parts = [(take, s.filled) for s, take in chunks]
            self.end = self.now + self.costs.iteration_s(parts, len(running), contexts)

    def _obey(self, kind: str, what: object) -> None:
        if kind == "add":
            assert isinstance(what, Sequence)
            self.sequences.append(what)
            return
        assert isinstance(what, tuple)
        request_id, value = what
        found = [s for s in self.sequences if s.request_id == request_id]
        for sequence in found:
            if kind == "renew":
                self._extend(request_id, value, resume=True)
            elif kind == "park":
                self._tell(sequence, "", resident=False)
                self.sequences.remove(sequence)
            elif kind == "drop":
                self.sequences.remove(sequence)

    def _extend(self, request_id: str, until: int, *, resume: bool) -> None:
        for sequence in self.sequences:
            if sequence.request_id == request_id:
                sequence.told = sequence.told and until <= sequence.until
                sequence.until = max(until, sequence.until)
                if resume and sequence.until > sequence.made:
                    sequence.paused = False

    def _finish(self) -> None:
        chunks, running = self.plan
        for sequence, take in chunks:
            sequence.filled += take
        makers = [s for s, _ in chunks if not s.prefilling]
        for sequence in [*running, *makers]:
            sequence.made += 1
            sequence.token_times.append(self.now)
        used = sum(self._blocks(s) for s in self.sequences)
        self.blocks_peak = max(self.blocks_peak, used)
        for sequence in [*running, *makers]:
            self._look_at(sequence, first=sequence in makers)

    def _blocks(self, sequence: Sequence) -> int:
        slots = max(sequence.filled, sequence.prompt + sequence.made - 1)
        return -(-(sequence.filled if sequence.prefilling else slots) // self.block)

    def _look_at(self, sequence: Sequence, first: bool) -> None:
        if sequence.made >= sequence.length:
            self._tell(sequence, "ended", resident=False)
            self.sequences.remove(sequence)
            return
        left = sequence.until - sequence.made
        low = left <= self.margin and sequence.until < sequence.cap
        sequence.paused = left <= 0
        if first or left <= 0 or (low and not sequence.told):
            self._tell(sequence, "", resident=True)
        sequence.told = sequence.told or low

    def _tell(self, sequence: Sequence, reason: str, *, resident: bool) -> None:
        count = sequence.made - sequence.reported
        times = sequence.token_times[len(sequence.token_times) - count :]
        since = [sequence.last_reported_at] if sequence.last_reported_at is not None else []
        walk = [*since, *times]
        gap = max((b - a for a, b in pairwise(walk)), default=0.0)
        self.told.append(
            (
                sequence.request_id,
                sequence.attempt,
                self.now,
                sequence.reported,
                count,
                reason,
                resident,
                gap,
            )
        )
        sequence.reported = sequence.made
        if times:
            sequence.last_reported_at = times[-1]
