"""A rehearsal: the near future of a short queue, played through to a newcomer's placing.

Theory of operation. Where few workers serve a short queue, one wait is made of few events: who of
those that run ends first and where, and who passes meanwhile. A mean rate knows nothing of these.
So they are played: requests that run end when one of the recent outputs of like prompts that were
longer than theirs did; newcomers are drawn from those that came lately, and stay away if what they
would be told is too late for them; the first in order is placed on the worker with least prefill
queued that has room for it, and is passed by smaller ones behind it by the rules of `leasing.py`.
What runs grows by one token a step. Moves, evictions and what a gate looks ahead for are left out.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import chain, repeat
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.comers import Comer
from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.ranks import Turn

Floats = NDArray[np.float64]
DRAWN = 1_024
"""Numbers drawn at a time."""
SOON_S = 1e-6
"""After an instant: what was to be below a limit then is."""
END, BEGIN, COME, FREE = range(4)
"""Events: a request ends, it has its first token, a newcomer comes, a worker may be given more."""


class Runner(NamedTuple):
    """A request that a worker has."""

    tokens: int
    """Its input."""
    holds: float
    """Tokens of memory that its lease reserves."""
    outputs: Sequence[int]
    """Lengths that its output may have, each as likely; at least one."""
    made: int
    """Output so far, as far as is known."""
    cap: int
    first: bool
    """It has its first token."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A worker that takes orders."""

    free_tokens: float
    seats: float
    """How many more requests it may take."""
    backlog_tokens: float
    """Prefill that is queued, less what should be done by now."""
    runners: Sequence[Runner]
    """In order of admission."""


class Waiting(NamedTuple):
    """A request in the queue."""

    turn: Turn
    tokens: int
    overtaken: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known at the beginning."""

    stages: Sequence[Stage]
    waiting: Sequence[Waiting]
    """In order."""
    comers: Sequence[Comer]
    comers_per_s: float
    outputs: Callable[[int], Sequence[int]]
    """Lengths that a new one with so much input may have, each as likely; at least one."""
    token_s: float
    """Between two output tokens."""
    prefill_token_s: float
    """Each token of input; above 0."""
    after_s: Callable[[int, float], float]
    """From the placing of so much input, behind so much queued prefill, to its first token."""
    served_per_s: float
    """Input placed in a second lately; by it and the next, starts are told to newcomers."""
    served_tokens: float
    """Input of one placing."""
    lease_tokens: int
    backlog_max: float
    backfill_max: int
    overtaken_max: int


class Entry:
    """One that waits in a rehearsal."""

    __slots__ = ("mine", "number", "overtaken", "tokens", "turn")

    def __init__(
        self, turn: Turn, number: int, tokens: int, overtaken: int = 0, *, mine: bool = False
    ) -> None:
        self.turn, self.number = turn, number
        self.tokens, self.overtaken, self.mine = tokens, overtaken, mine

    def __lt__(self, other: "Entry") -> bool:
        return (self.turn, self.number) < (other.turn, other.number)


@dataclass(slots=True)
class _Acting:
    """A stage as it changes."""

    free: float
    """At `at`; since then it is less by what those that run made."""
    seats: float
    busy_until: float
    """When all prefill that is queued is done."""
    running: int = 0
    at: float = 0.0
    queued: list[tuple[float, int]] = field(default_factory=list)
    """Of queued prefills: when each is over, and its input."""

    def free_at(self, now: float, token_s: float) -> float:
        return self.free - self.running * (now - self.at) / token_s

    def pass_to(self, now: float, token_s: float) -> None:
        self.free, self.at = self.free_at(now, token_s), now


class Luck:
    """A stream of uniform numbers, at least 0 and below 1, by itself."""

    def __init__(self, seed: int) -> None:
        self._draws = Draws(seed)
        self._ready: list[float] = []

    def __call__(self) -> float:
        if not self._ready:
            self._ready.extend(self.many(DRAWN).tolist())
        return self._ready.pop()

    def many(self, count: int) -> Floats:
        """The next few."""
        return self._draws.uniforms(count)


class Opening:
    """How each rehearsal of a scene begins: what those that run will do, chance apart."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.acting: list[_Acting] = []
        self.events: list[tuple[float, int, int, float]] = [(0.0, FREE, 0, 0.0)]
        """(when, what, which stage, tokens that are free then): those that are certain."""
        runners: list[tuple[float, int, Runner]] = []
        for place, stage in enumerate(scene.stages):
            self._begin(place, stage, runners)
        self._begin_at = np.array([at for at, _, _ in runners])
        self._place = [place for _, place, _ in runners]
        self._holds = np.array([runner.holds for *_, runner in runners])
        self._made = np.array([runner.made for *_, runner in runners])
        self._cap = np.array([runner.cap for *_, runner in runners])
        outputs = chain.from_iterable(runner.outputs for *_, runner in runners)
        self._outputs = np.fromiter(outputs, dtype=np.int64)
        self._counts = np.array([len(runner.outputs) for *_, runner in runners], dtype=np.int64)
        self._first = np.cumsum(self._counts) - self._counts

    def ends(self, luck: Luck) -> list[tuple[float, int, int, float]]:
        """When those that run end, by chance."""
        if not self._place:
            return []
        chosen = (luck.many(len(self._place)) * self._counts).astype(np.int64)
        output = np.minimum(self._outputs[self._first + chosen], self._cap)
        left = np.maximum(1, output - self._made)
        at = self._begin_at + left * self.scene.token_s
        freed = (self._holds + left).tolist()
        return list(zip(at.tolist(), repeat(END), self._place, freed, strict=False))

    def _begin(self, place: int, stage: Stage, runners: list[tuple[float, int, Runner]]) -> None:
        """Prefills are done in order: the last one is done last."""
        token_s = self.scene.prefill_token_s
        begins_at = busy_s = stage.backlog_tokens * token_s
        acting = _Acting(stage.free_tokens, stage.seats, busy_s)
        for runner in reversed(stage.runners):
            if runner.first:
                acting.running += 1
                runners.append((0.0, place, runner))
                continue
            runners.append((begins_at, place, runner))
            self.events.append((begins_at, BEGIN, place, 0.0))
            acting.queued.append((begins_at, runner.tokens))
            begins_at = max(0.0, begins_at - runner.tokens * token_s)
        self.acting.append(acting)
        open_at = busy_s - self.scene.backlog_max * token_s
        if open_at >= 0:
            self.events.append((open_at + SOON_S, FREE, place, 0.0))


class Rehearsal:
    """One time through. Seconds count from now."""

    def __init__(self, opening: Opening, mine: Waiting, luck: Luck) -> None:
        self._scene, self._mine, self._luck = opening.scene, mine, luck
        scene = self._scene
        self._number = len(scene.waiting)
        """Of the latest to come."""
        self._queue = [
            Entry(one.turn, number, one.tokens, one.overtaken)
            for number, one in enumerate(scene.waiting)
        ]
        insort(self._queue, Entry(mine.turn, self._number, mine.tokens, mine=True))
        self._acting = [replace(one, queued=[*one.queued]) for one in opening.acting]
        self._events = [*opening.events, *opening.ends(luck)]
        self._expect_newcomer(0.0)
        heapify(self._events)

    def play(self, events_max: int) -> tuple[float | None, int]:
        """When the newcomer has its first token, None if it is not placed within so many events;
        and how many there were."""
        for count in range(1, events_max + 1):
            if not self._events:
                return None, count
            now, kind, place, tokens = heappop(self._events)
            if kind == COME:
                self._come(now)
            elif kind in (BEGIN, END):
                self._turn(kind, now, place, tokens)
            before = self._serve(now)
            if before is not None:
                return now + self._scene.after_s(self._mine.tokens, before), count
        return None, events_max

    # ------------------------------------------------------------------------------ what happens

    def _announce(self, place: int, acting: _Acting, now: float) -> None:
        """Say when it has little enough prefill queued."""
        at = acting.busy_until - self._scene.backlog_max * self._scene.prefill_token_s
        if at >= now:
            heappush(self._events, (at + SOON_S, FREE, place, 0.0))

    def _turn(self, kind: int, now: float, place: int, tokens: float) -> None:
        """One begins to make tokens, or ends."""
        acting = self._acting[place]
        acting.pass_to(now, self._scene.token_s)
        acting.running += 1 if kind == BEGIN else -1
        if kind == END:
            acting.free += tokens
            acting.seats += 1

    # ------------------------------------------------------------------------------ who comes

    def _expect_newcomer(self, now: float) -> None:
        if self._scene.comers_per_s > 0 and self._scene.comers:
            wait_s = -log(1 - self._luck()) / self._scene.comers_per_s
            heappush(self._events, (now + wait_s, COME, 0, 0.0))

    def _come(self, now: float) -> None:
        """Somebody like one that came lately, if it is not refused."""
        self._expect_newcomer(now)
        comers = self._scene.comers
        comer = comers[int(self._luck() * len(comers))]
        self._number += 1
        rank, key = comer.turn
        entry = Entry((rank, now + key), self._number, comer.tokens)
        place = bisect_right(self._queue, entry)
        if self._told_s(entry, place, now) <= comer.within_s:
            self._queue.insert(place, entry)

    def _told_s(self, entry: Entry, place: int, now: float) -> float:
        """About what it would be told of its start (predict.py)."""
        scene = self._scene
        ahead = self._queue[:place]
        if place <= scene.backfill_max:
            ahead = [one for one in ahead if not self._lets_pass(one, entry)]
        alone_s = scene.after_s(entry.tokens, 0)
        tokens = sum(one.tokens for one in ahead) + scene.served_tokens + entry.tokens
        return alone_s + tokens / max(1.0, scene.served_per_s)

    def _lets_pass(self, waiting: Entry, newcomer: Entry) -> bool:
        overtaken = 0 < waiting.overtaken < self._scene.overtaken_max
        return overtaken and waiting.tokens > newcomer.tokens

    # --------------------------------------------------------------------------- who is placed

    def _open(self, now: float) -> list[tuple[float, float, int]]:
        """(queued prefill in seconds, free tokens, place) of stages that may be given more, those
        with least prefill first."""
        scene = self._scene
        most_s = scene.backlog_max * scene.prefill_token_s
        found = [
            (max(0.0, acting.busy_until - now), acting.free_at(now, scene.token_s), place)
            for place, acting in enumerate(self._acting)
            if acting.busy_until - now < most_s and acting.seats > 0
        ]
        found.sort()
        return found

    def _best_for(self, tokens: int, stages: list[tuple[float, float, int]]) -> int | None:
        need = tokens + self._scene.lease_tokens - 1
        return next((place for _, free, place in stages if free >= need), None)

    def _serve(self, now: float) -> int | None:
        """Place who can be placed, as a round does. Of the newcomer, what prefill is queued where
        it was placed; None while it waits."""
        stages, passed, number = self._open(now), [], 0
        queue, scene = self._queue, self._scene
        largest = 1 + max((free for _, free, _ in stages), default=0.0)
        while stages and number < len(queue) and number <= scene.backfill_max:
            entry = queue[number]
            fits = entry.tokens + scene.lease_tokens <= largest
            place = self._best_for(entry.tokens, stages) if fits else None
            if place is None:
                passed.append(entry)
                if entry.overtaken >= scene.overtaken_max:
                    break
                number += 1
                continue
            if entry.mine:
                return sum(input_ for at, input_ in self._acting[place].queued if at > now)
            del queue[number]
            self._place(entry, place, now)
            stages = self._open(now)
            largest = 1 + max((free for _, free, _ in stages), default=0.0)
            for other in passed:
                other.overtaken += 1
            if any(other.overtaken >= scene.overtaken_max for other in passed):
                break
        return None

    def _place(self, entry: Entry, place: int, now: float) -> None:
        scene, acting = self._scene, self._acting[place]
        holds = entry.tokens + scene.lease_tokens
        begins_at = max(now, acting.busy_until) + entry.tokens * scene.prefill_token_s
        acting.busy_until = begins_at
        acting.free -= holds
        acting.seats -= 1
        acting.queued = [one for one in acting.queued if one[0] > now]
        acting.queued.append((begins_at, entry.tokens))
        outputs = scene.outputs(entry.tokens)
        left = outputs[int(self._luck() * len(outputs))]
        heappush(self._events, (begins_at, BEGIN, place, 0.0))
        heappush(self._events, (begins_at + left * scene.token_s, END, place, holds + left))
        self._announce(place, acting, now)
