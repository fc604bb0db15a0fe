"""The memory-only simulator: Past-Future's own experiment, with the scheduler's own gates.

Theory of operation. One worker, no time and no prefill: a step gives every running request a
token. Ten steps, then an admission round; who ends goes into the history; when memory overflows,
the latest one admitted is evicted and waits at the head with its tokens. The run stops when a round
wants a request and none is left, so the last batch is not drained. All of that is the artifact's
simulator, as section 3.5 of the research note has it; `QUIRKS` are its differences from what the
gates do in the mesh. Ten steps in which nobody ends and nothing overflows are taken at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.draws import Draws
from services.scheduler.core.policies.future import peak
from services.scheduler.core.policies.gates import GATES
from services.scheduler.core.policies.lengths import LengthModel, prepare_lengths
from services.scheduler.core.policies.members import Columns, Member, View
from services.scheduler.core.settings import Constants

Ints = NDArray[np.int64]
Progress = Callable[[int, int], None]
Look = Callable[[int, int, int], None]
Lengths = tuple[int, int]
"""Prompt and output tokens of a request."""

CAPACITY_TOKENS = 120_000
CAP_TOKENS = 4096
"""The limit that every request states, also where its true output is longer."""
ROUND_STEPS = 10
PREFILL_TOKENS_MAX = 32_768
"""Admission goes on while the prompts of a round sum up to less."""

QUIRKS = Constants(
    count_last_token=True,
    aggressive_counts_made=False,
    lengths_within_cap=False,
    requeued_conditioned=False,
    censored_open=False,
    cold_start_share=0.5,
    cold_start_tokens=512,
    history_window=1000,
)
"""The artifact's simulator, as named settings of the gates."""
HISTORY_GATES = frozenset({"past-future", "larry-b", "chance"})
"""Only these look at the history; for others it is not prepared."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a run was."""

    steps: int
    finished: int
    evictions: int
    """Events: a request may be evicted more than once."""
    memory_mean: float
    """Held over capacity: mean over steps and rounds."""
    future_mean: float
    """The batch's true peak over capacity, right after admission: mean over rounds. Above 1
    evictions are certain."""
    stall_p99_steps: float = 0.0
    """Of each finished request's longest standstill between two of its tokens."""

    @property
    def evictions_percent(self) -> float:
        """Eviction events per 100 finished requests."""
        return 100 * self.evictions / max(1, self.finished)


def simulate(
    source: Sequence[Lengths],
    gate: str,
    constants: Constants = QUIRKS,
    *,
    seed: int = 0,
    capacity_tokens: int = CAPACITY_TOKENS,
    progress: Progress = lambda done, total: None,
    look: Look = lambda steps, finished, held_tokens: None,
) -> Tally:
    """Run one policy over the requests of `source`, in their order. `gate` is a name of GATES;
    `seed` that of its draws; `progress` hears (requests taken, all), `look` after each round what
    was done and what is held."""
    run = Run(source, gate, constants, seed, capacity_tokens)
    while not run.exhausted:
        run.ten_steps()
        run.round()
        progress(run.taken, len(source))
        look(run.steps, run.finished, run.held)
    return run.tally()


@dataclass(slots=True)
class Waiting:
    """One that waits."""

    prompt: int
    output: int
    made: int = 0
    evicted_at: int = -1
    """The step, if it was."""
    stood: int = 0
    """Its longest standstill so far, in steps."""

    def stood_until(self, steps: int) -> int:
        """The same if it goes on now; who has made nothing waited and did not stand still."""
        return max(self.stood, steps - self.evicted_at if self.evicted_at >= 0 < self.made else 0)


class Run:
    """The state between rounds. Arrays: one entry per running request, in order of admission."""

    def __init__(
        self, source: Sequence[Lengths], gate: str, constants: Constants, seed: int, capacity: int
    ) -> None:
        self._source = source
        self._gate_name = gate
        self._constants = constants
        self._draws = Draws(seed)
        self._capacity = capacity
        self._prompt = self._made = self._output = np.empty(0, dtype=np.int64)
        self._caps = self._stood = self._made
        self._stalls: list[int] = []
        self._held = self._until_end = 0
        self._true_peak: int | None = None
        self._queue: deque[Waiting] = deque()
        self._history: deque[int] = deque(maxlen=constants.history_window)
        self._lengths: LengthModel | None = None
        self._refused = False
        """The head was refused, and will be until somebody ends or is evicted."""
        self.taken = 0
        self.exhausted = False
        self._steps = self._finished = self._evictions = 0
        self._memory_sum = self._memory_samples = 0
        self._peak_sum = self._rounds = 0

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def finished(self) -> int:
        return self._finished

    @property
    def held(self) -> int:
        """Tokens of the running batch."""
        return self._held

    def tally(self) -> Tally:
        memory = self._memory_sum / max(1, self._memory_samples) / self._capacity
        future = self._peak_sum / max(1, self._rounds) / self._capacity
        stall = float(np.percentile(self._stalls, 99)) if self._stalls else 0.0
        return Tally(self._steps, self._finished, self._evictions, memory, future, stall)

    # --------------------------------------------------------------------------------------- steps

    def ten_steps(self) -> None:
        """Ten steps; before them the rounds that cannot change anything, where that is known."""
        if self._refused:
            self._quiet_rounds(self._quiet_steps() // ROUND_STEPS)
        rest = ROUND_STEPS
        while rest:
            quiet = min(rest, self._quiet_steps())
            self._quiet(quiet)
            rest -= quiet
            if rest:
                self._step()
                rest -= 1

    def _quiet_steps(self) -> int:
        """For so many steps nobody ends and nothing overflows."""
        size = len(self._made)
        if not size:
            return ROUND_STEPS
        return max(0, min(self._until_end - 1, (self._capacity - self._held) // size))

    def _quiet(self, steps: int) -> None:
        """Steps in which nothing happens."""
        size = len(self._made)
        self._memory_sum += steps * self._held + size * steps * (steps + 1) // 2
        self._memory_samples += steps
        self._grow(steps)

    def _quiet_rounds(self, rounds: int) -> None:
        """Rounds, ten steps before each, in which nothing happens."""
        grown = ROUND_STEPS * len(self._made)
        self._memory_sum += rounds * self._held + grown * rounds * (rounds + 1) // 2
        self._memory_samples += rounds
        self._peak_sum += rounds * self._peak()
        self._rounds += rounds
        self._quiet(rounds * ROUND_STEPS)

    def _grow(self, steps: int) -> None:
        self._steps += steps
        self._made = self._made + steps
        self._held += steps * len(self._made)
        self._until_end -= steps

    def _step(self) -> None:
        """A step in which somebody may end or memory may overflow."""
        self._grow(1)
        ended = self._made >= self._output
        if ended.any():
            self._ended(ended)
            self._keep(~ended)
        self._memory_sum += self._held
        self._memory_samples += 1
        self._check_memory()

    def _ended(self, ended: NDArray[np.bool_]) -> None:
        """They go into the history."""
        self._history.extend(self._made[ended].tolist())
        self._stalls.extend(self._stood[ended].tolist())
        self._finished += int(ended.sum())
        if self._gate_name in HISTORY_GATES:
            self._lengths = None

    def _check_memory(self) -> None:
        """Evict until it lasts."""
        while self._held > self._capacity:
            self._evict_latest()

    def _evict_latest(self) -> None:
        made, output, stood = int(self._made[-1]), int(self._output[-1]), int(self._stood[-1])
        entry = Waiting(int(self._prompt[-1]), output, made, self._steps, stood)
        self._queue.appendleft(entry)
        self._keep(slice(-1))
        self._evictions += 1

    def _keep(self, which: "slice | NDArray[np.bool_]") -> None:
        self._stood = self._stood[which]
        self._put(self._prompt[which], self._made[which], self._output[which])

    def _put(self, prompt: Ints, made: Ints, output: Ints) -> None:
        """Somebody came or went."""
        self._prompt, self._made, self._output = prompt, made, output
        self._held = int(prompt.sum() + made.sum())
        self._until_end = int((output - made).min()) if len(made) else 0
        self._caps = np.full(len(made), CAP_TOKENS)
        self._true_peak = None
        self._refused = False

    # --------------------------------------------------------------------------------------- round

    def round(self) -> None:
        """Admit from the head until one is refused, the prompts are many, or none is left."""
        gate = GATES[self._gate_name](self._view())
        joined: list[Waiting] = []
        prefill = 0
        while prefill < PREFILL_TOKENS_MAX:
            head = self._head()
            if head is None:
                self.exhausted = True
                break
            candidate = Member(head.prompt, head.made, CAP_TOKENS, head.output)
            if not gate.admits(candidate):
                break
            gate.add(candidate)
            joined.append(self._queue.popleft())
            prefill += head.prompt
        if joined:
            self._join(joined)
        self._refused = gate.lasting
        if not self.exhausted:
            self._sample_round()

    def _head(self) -> Waiting | None:
        """Who is next; from the source when nobody waits."""
        if not self._queue and self.taken < len(self._source):
            self._queue.append(Waiting(*self._source[self.taken]))
            self.taken += 1
        return self._queue[0] if self._queue else None

    def _view(self) -> View:
        if self._lengths is None:
            seen = np.array(self._history, dtype=np.int64)
            self._lengths = prepare_lengths(seen, None, self._constants)
        members = Columns(self._prompt, self._made, self._caps, self._output)
        return View(self._capacity, 1, members, self._lengths, self._constants, self._draws)

    def _join(self, joined: Sequence[Waiting]) -> None:
        stood = [entry.stood_until(self._steps) for entry in joined]
        self._stood = np.append(self._stood, np.array(stood, dtype=np.int64))
        self._put(
            np.append(self._prompt, [entry.prompt for entry in joined]),
            np.append(self._made, [entry.made for entry in joined]),
            np.append(self._output, [entry.output for entry in joined]),
        )

    def _sample_round(self) -> None:
        self._memory_sum += self._held
        self._memory_samples += 1
        self._peak_sum += self._peak()
        self._rounds += 1

    def _peak(self) -> int:
        """The batch's true future peak; it stays what it is until somebody comes or goes."""
        if self._true_peak is None:
            self._true_peak = peak(self._prompt + self._made, self._output - self._made)
        return self._true_peak
