"""What a simulated worker remembers of its requests, and what it counts."""

from dataclasses import dataclass, field
from typing import NamedTuple

from shared.messages import FinishReason, TokenRun
from sim.text import output


class Times(NamedTuple):
    """When the tokens of one run were there: what a client sees of a stream without asking."""

    at: float
    """When the worker sent them; what comes later is the network's."""
    first: bool
    first_at: float
    last_at: float
    gap_s: float


@dataclass(slots=True)
class Held:
    """A request that is here, or was: what is needed to stream it."""

    attempt: int
    gateway: str
    begins: int
    """Of its text."""
    start: int
    """Position at which this attempt began."""
    end: int
    """Position up to which it was reported."""
    sent: int
    """Position up to which its tokens went to the gateway."""
    gap_s: float = 0.0
    """The longest between tokens that were not sent yet."""
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Counts:
    """Of one worker, by its own truth."""

    slices: int = 0
    evictions: int = 0
    evicted: dict[str, int] = field(default_factory=dict)
    """Request to how often."""
    moves: int = 0
    """Leases ended so that their request goes on elsewhere, or later."""
    invalid_tokens: int = 0
    pad_tokens: int = 0
    last_end_at: float = 0.0
    batch_rows: int = 0


def run_of(request_id: str, held: Held, start: int, end: int) -> TokenRun:
    """Its output tokens from `start` to `end`, with its finish if they reach there."""
    reason = held.finish_reason if end == held.end else None
    return TokenRun(
        request_id=request_id,
        attempt=held.attempt,
        position=start,
        ids=output(held.begins, start, end - start),
        finish_reason=reason,
        ending_token=reason == "stop",
    )
