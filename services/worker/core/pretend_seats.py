"""One request's seat on a pretend worker, one jump of its clock, and what was measured of both."""

from dataclasses import dataclass
from enum import Enum

import msgspec

from services.worker.core.pretend_parts import Kind, Spans
from shared.memory import leased_blocks
from shared.messages import FinishReason, SliceTimings


class Stage(Enum):
    """Where a seat is."""

    PREFILLING = "prefilling"
    RUNNING = "running"
    PAUSED = "paused"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Seat:
    """One request on this worker. Positions count output tokens."""

    request_id: str
    attempt: int
    prompt_tokens: int
    made: int
    """Position when it came here."""
    length: int
    """Where its output ends, by itself or by its limit."""
    reason: FinishReason
    cap: int
    """Its limit: no lease reaches further."""
    until: int
    """Where its lease ends."""
    number: int
    """Order of arrival here."""
    arrived_at: float
    base: int
    """While it runs: position less the engine's steps; else the position itself."""
    reported: int
    """Position up to which its tokens were reported."""
    stage: Stage = Stage.PREFILLING
    filled: int = 0
    """Input tokens whose keys and values are there."""
    cached: int = -1
    """Of these, found and not computed; below 0: not looked for yet."""
    late: bool = False
    """It came after the next iteration was composed."""
    began_at: float = -1.0
    """Of its prefill; below 0: not yet."""
    margin_told: bool = False
    event_step: int = -1
    """The heap's entry that counts."""
    stepped: bool = False
    """It has run a step since it began, or began again, to run."""
    last_at: float = 0.0
    """Of its newest token, while it does not run or has not stepped."""
    gap_s: float = 0.0
    """The longest gap since its last report, up to step `gap_from`; the log has what follows."""
    gap_from: int = 0

    @property
    def input_tokens(self) -> int:
        """What is prefilled: the prompt and the output it came with."""
        return self.prompt_tokens + self.made

    def lease_blocks(self, block_tokens: int) -> int:
        """What it may occupy at the end of its lease."""
        return leased_blocks(self.prompt_tokens, self.until, block_tokens)

    def block_phase(self, block_tokens: int) -> int:
        """Steps, modulo the block, that begin a new block for it. While it runs."""
        return (1 - self.prompt_tokens - self.base) % block_tokens


class Jump(msgspec.Struct):
    """Iterations under way, all of one kind."""

    start: float
    end: float
    steps: int
    """Decode steps; 0: prefill alone."""
    decodes: int
    factor: float
    """On the expected time."""
    first_s: float
    """Of the first iteration, with the factor."""
    chunks: list[tuple[Seat, int]]
    """Prefill in this iteration, in tokens."""


def note_jump(spans: Spans, jump: Jump) -> None:
    """Write a jump down; the last span goes on if it was of the same kind, without a break."""
    kind: Kind = "decode" if not jump.chunks else "mixed" if jump.decodes else "prefill"
    rows, start = jump.decodes + len(jump.chunks), jump.start
    if spans and spans[-1][1] == start and spans[-1][2] == kind:
        start, _, _, before = spans.pop()
        rows = max(rows, before)
    spans.append((start, jump.end, kind, rows))


@dataclass(slots=True)
class Measured:
    """What a worker's clock would show since its last report."""

    decode_s: float = 0.0
    steps: int = 0
    rows: int = 0
    """Sum of the running sequences over the steps."""
    contexts: int = 0
    """Sum of all their contexts over the steps, as they were before each jump."""
    prefill: Seat | None = None
    prefill_s: float = 0.0

    def count(self, jump: Jump, contexts: int) -> None:
        """A jump of decodes alone, which began with these contexts in all."""
        if not jump.chunks:
            self.decode_s += jump.end - jump.start
            self.steps += jump.steps
            self.rows += jump.decodes * jump.steps
            self.contexts += contexts * jump.steps

    def prefilled(self, seat: Seat, now: float) -> None:
        """This seat has its first token."""
        self.prefill, self.prefill_s = seat, now - seat.began_at

    def as_message(self) -> SliceTimings:
        """See `LeasedEngine.take_timings`."""
        if self.prefill is not None:
            return SliceTimings(
                queue_s=self.prefill.began_at - self.prefill.arrived_at,
                prefill_s=self.prefill_s,
                iterations=1,
                input_tokens_max=self.prefill.input_tokens,
                batch_size=1,
            )
        if not self.rows:
            return SliceTimings()
        return SliceTimings(
            decode_s=self.decode_s,
            iterations=self.steps + 1,
            input_tokens_max=max(1, round(self.contexts / self.rows)),
            batch_size=max(1, round(self.rows / self.steps)),
        )
