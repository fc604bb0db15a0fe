"""What both pretend engines use: the cost of an iteration, what they report, and what they count.

An engine's clock only moves in jumps: runs of iterations during which nobody joins, ends or
reports. All times are seconds on the caller's clock.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from shared.messages import FinishReason

Noise = Callable[[int], float]
"""Iterations of a jump -> the factor on its expected time."""
Kind = Literal["prefill", "decode", "mixed", "closed"]
Spans = list[tuple[float, float, Kind, int]]
"""(start, end, kind, most requests together) of unbroken work of one kind."""
FACTOR_MIN = 0.2
"""No jump takes less than this share of its expected time, whatever the noise."""


class Costs(Protocol):
    """What a cost profile says (`shared.profiles.CostProfile`); tests have simpler ones."""

    def iteration_s(
        self, prefill: Sequence[tuple[int, int]], decodes: int, kv_tokens: int
    ) -> float:
        """One iteration: chunks of (tokens, context cached before), and `decodes` single tokens
        over contexts of `kv_tokens` in all."""

    def decode_steps_s(self, decodes: int, kv_tokens: int, steps: int) -> float:
        """So many iterations of decodes alone; each context grows by one a step."""

    def decode_steps_within(self, decodes: int, kv_tokens: int, seconds: float) -> int:
        """The whole steps that fit into `seconds`."""

    def padded_s(self, batch: int, input_tokens_max: int, iterations: int) -> float:
        """A closed batch: one prefill of batch x input, then iterations - 1 padded steps."""


def no_noise(steps: int) -> float:
    """Every jump takes exactly what the profile says."""
    return 1.0


def noise_of(gauss: Callable[[float, float], float], cv: float) -> Noise:
    """Independent errors of each iteration, with a coefficient of variation `cv`: over k of them
    the mean's deviation is cv / sqrt(k). `gauss` is the caller's generator."""
    if cv <= 0:
        return no_noise

    def factor(steps: int) -> float:
        return max(FACTOR_MIN, gauss(1.0, cv / steps**0.5))

    return factor


class Progress(msgspec.Struct, frozen=True, gc=False):
    """What became of one request since it was last reported."""

    request_id: str
    attempt: int
    at: float
    """The end of the iteration: when its newest token was there."""
    position: int
    """Where these tokens begin in the output."""
    tokens: int
    first: bool = False
    """Its prefill is over; the first of these tokens came from that."""
    finish_reason: FinishReason | None = None
    resident: bool = False
    evicted: bool = False
    gap_s: float = 0.0
    """The longest time between two of its tokens, from the last one reported before on."""
    invalid_tokens: int = 0
    pad_tokens: int = 0
    last_at: float = 0.0
    """When the newest token was there; in a closed batch before `at`."""
    first_at: float = 0.0
    """When the first of these tokens was there."""
    cached_tokens: int = 0
    """With `first`: input tokens that were found in the prefix cache."""


@dataclass(slots=True)
class Tally:
    """Totals of one engine since its start."""

    busy_s: float = 0.0
    iterations: int = 0
    decode_tokens: int = 0
    """Made by decodes, those of closed batches that nobody wanted included."""
    prefill_tokens: int = 0
    """Computed; what was found in the prefix cache is not among them."""
    sequence_iterations: int = 0
    """Sum of the running sequences over all iterations: the mean batch size's numerator."""
    kv_block_seconds: float = 0.0
    """Integral of blocks in use over time, up to `counted_to`."""
    counted_to: float = 0.0
    kv_blocks_peak: int = 0
    evictions: int = 0
    """By the engine itself, for want of blocks: 0 under a scheduler that keeps its books right."""
    batches: int = 0
    early_returns: int = 0

    def count_memory(self, start: float, end: float, before: int, after: int) -> None:
        """`before` blocks were in use up to `start`, and evenly more or fewer until `end`."""
        idle = before * (start - self.counted_to)
        self.kv_block_seconds += idle + (before + after) / 2 * (end - start)
        self.counted_to = end
        if after > self.kv_blocks_peak:
            self.kv_blocks_peak = after


@dataclass(slots=True)
class GapLog:
    """The longest decode gap since any step: a stack of steps whose gaps fall."""

    steps: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, step: int, gap_s: float) -> None:
        """The tokens of this step came `gap_s` after those of the step before."""
        steps, gaps = self.steps, self.gaps
        while gaps and gaps[-1] <= gap_s:
            gaps.pop()
            steps.pop()
        steps.append(step)
        gaps.append(gap_s)

    def longest_after(self, step: int) -> float:
        """The longest gap of the steps beyond `step`; 0 if there was none."""
        place = bisect_right(self.steps, step)
        return self.gaps[place] if place < len(self.gaps) else 0.0

    def clear(self) -> None:
        self.steps.clear()
        self.gaps.clear()
