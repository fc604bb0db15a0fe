"""Cost profiles: how long one iteration of a model takes on a GPU, as a fitted closed form.

Theory of operation. The seconds of an iteration over some prefill chunks and some decodes are

    overhead                        scheduler, sampling and launches; per iteration and sequence
    + tokens(chunk tokens + decodes)   matrix products: a rising curve; flat while reading the
                                    weights is what takes the time, steep beyond 128-256 tokens
    + sum over chunks: (context + chunk / 2) x prefill_attention(chunk)
    + mean context of the decodes x decode.slope(decodes) + ...

Attention's time is a slope over the context. While few sequences run, the longest one sets the
pace, and a further sequence costs nothing; with many, the memory's bandwidth does. So the slope
is itself a curve of how many run (for prefill: of how long the chunk is). For a given number of
decodes the time is linear in their contexts (with one bend), which rise by one a step: many equal
steps have a closed form, and so has its inverse.

Kernels that mix chunks and decodes read decodes' contexts more slowly: an own set of coefficients.
All curves are piecewise linear and never fall. The profile knows only the sum of the contexts:
one long context among few short ones is taken for their mean, which is too quick.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import msgspec

PROFILES = Path(__file__).parents[1] / "deploy" / "costs"
REMEMBERED_MAX = 4096
"""Batch sizes, and chunk sizes, whose coefficients are kept once computed; others are computed
anew each time."""


class UnknownProfile(ValueError):
    """No such profile; says which there are."""


class BadProfile(ValueError):
    """The file is no cost profile, or one that is not monotone."""


class Curve(msgspec.Struct, frozen=True):
    """A rising piecewise-linear function: `values` at `knots`, `slope_after` the last one.

    The first knot is 0. Values and slopes are not negative.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]
    slope_after: float = 0.0

    def at(self, x: float) -> float:
        """The value at x >= 0."""
        knots, values = self.knots, self.values
        index = bisect_left(knots, x)
        if index == 0:
            return values[0]
        left, low = knots[index - 1], values[index - 1]
        if index == len(knots):
            return low + (x - left) * self.slope_after
        return low + (x - left) * (values[index] - low) / (knots[index] - left)

    @property
    def rises(self) -> bool:
        """Whether it is what it says: ordered knots, values that never fall, nothing negative."""
        pairs = list(zip(self.knots, self.values, strict=False))
        return (
            len(self.knots) == len(self.values) > 0
            and self.knots[0] == 0
            and self.values[0] >= 0
            and self.slope_after >= 0
            and all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(pairs))
        )


class DecodeCost(msgspec.Struct, frozen=True):
    """What the decodes of an iteration add to its matrix products, in seconds."""

    slope: Curve
    """Seconds per token of mean context, as a function of the number of decodes."""
    per_sequence_s: float = 0.0
    fixed_s: float = 0.0
    bend_tokens: float = 0.0
    beyond_bend_s: float = 0.0
    """Further seconds per sequence and context token beyond `bend_tokens`: kernels read contexts
    in blocks, so that the first tokens cost as much as a block."""


class Coefficients(msgspec.Struct, frozen=True):
    """The fitted closed form; see the module's text."""

    tokens: Curve
    """Seconds of an iteration over so many tokens, all but attention."""
    prefill_attention: Curve
    """Seconds per token of (context + chunk / 2), as a function of the chunk's tokens."""
    decode: DecodeCost
    mixed: DecodeCost | None = None
    """Instead of `decode`, where chunks and decodes share an iteration."""
    per_prefill_token_s: float = 0.0
    prefill_fixed_s: float = 0.0
    """Further seconds of an iteration that prefills."""


class FitError(msgspec.Struct, frozen=True):
    """Relative errors of a fit on cells that it has not seen."""

    cells: int
    median: float
    p95: float
    worst: float


class CostProfile(msgspec.Struct, frozen=True, dict=True, kw_only=True):
    """One model on one kind of worker: its speed and its memory."""

    name: str
    model: str
    gpu: str
    tp: int = 1
    kv_tokens: int
    """KV tokens that fit, as a multiple of the block."""
    kv_block_tokens: int = 16
    kv_bytes_per_token: int = 0
    """0: unknown."""
    coefficients: Coefficients
    overhead_s: float = 0.0
    """Of each iteration: scheduler, sampling, launches, as far as the table lacks them."""
    overhead_per_sequence_s: float = 0.0
    noise_cv: float = 0.0
    """Standard deviation / mean of an iteration's time around the fit (held-out cells)."""
    errors: dict[str, FitError] = {}
    """By phase: prefill, decode, mixed, slice."""
    valid: dict[str, int] = {}
    """The largest of each measured axis; beyond, curves go on with their last slope."""
    source: str = ""
    licence: str = ""
    notes: str = ""

    def iteration_s(
        self, prefill: Sequence[tuple[int, int]], decodes: int, kv_tokens: int
    ) -> float:
        """Seconds of one iteration.

        `prefill`: (tokens of the chunk, tokens of its context that are already in the KV cache).
        `decodes`: sequences that make one token; `kv_tokens`: the sum of their contexts, each with
        the token that is being computed.
        """
        if not prefill:
            if not decodes:
                return 0.0
            base, slope, bend, beyond = self._decode_line(decodes)
            over = kv_tokens - bend
            return base + slope * kv_tokens + (beyond * over if over > 0 else 0.0)
        parts = self.coefficients
        tokens, attention_s = 0, 0.0
        slopes = self._chunk_slopes
        for chunk, context in prefill:
            per_token_s = slopes.get(chunk)
            if per_token_s is None:
                per_token_s = self._chunk_slope(chunk)
            tokens += chunk
            attention_s += (context + 0.5 * chunk) * per_token_s
        seconds = (
            self.overhead_s
            + self.overhead_per_sequence_s * (len(prefill) + decodes)
            + parts.tokens.at(tokens + decodes)
            + parts.per_prefill_token_s * tokens
            + parts.prefill_fixed_s
            + attention_s
        )
        if decodes:
            fixed, slope, bend, beyond = self._mixed_line(decodes)
            over = kv_tokens - bend
            seconds += fixed + slope * kv_tokens + (beyond * over if over > 0 else 0.0)
        return seconds

    def decode_steps_s(self, decodes: int, kv_tokens: int, steps: int) -> float:
        """Seconds of `steps` iterations of nothing but these decodes.

        `kv_tokens` is the sum of contexts in the first of them; each context grows by 1 a step.
        """
        if steps <= 0 or decodes <= 0:
            return 0.0
        base, slope, bend, beyond = self._decode_line(decodes)
        seconds = steps * (base + slope * (kv_tokens + 0.5 * decodes * (steps - 1)))
        over = kv_tokens + decodes * (steps - 1) - bend
        if beyond and over > 0:
            bent = min(steps, int(over // decodes) + 1)
            seconds += beyond * bent * (over - 0.5 * decodes * (bent - 1))
        return seconds

    def decode_steps_within(self, decodes: int, kv_tokens: int, seconds: float) -> int:
        """The most whole steps whose `decode_steps_s` is at most `seconds`."""
        if decodes <= 0 or seconds <= 0:
            return 0
        base, slope, bend, beyond = self._decode_line(decodes)
        straight = math.ceil((bend - kv_tokens) / decodes) if beyond and kv_tokens < bend else 0
        spent = self.decode_steps_s(decodes, kv_tokens, straight)
        if spent >= seconds:
            straight, spent, beyond = 0, 0.0, 0.0  # ends before the bend
        context = kv_tokens + straight * decodes
        first = base + slope * context + beyond * max(0.0, context - bend)
        found = straight + _steps_of_ramp(first, (slope + beyond) * decodes, seconds - spent)
        while found and self.decode_steps_s(decodes, kv_tokens, found) > seconds:
            found -= 1
        while self.decode_steps_s(decodes, kv_tokens, found + 1) <= seconds:
            found += 1
        return found

    def padded_s(self, batch: int, input_tokens_max: int, iterations: int) -> float:
        """Seconds of a closed batch: all inputs padded to the longest and prefilled together, which
        makes the first token, then iterations - 1 decode steps of contexts one longer each."""
        if batch <= 0 or iterations <= 0:
            return 0.0
        prefill_s = self.padded_prefill_s(batch, input_tokens_max)
        return prefill_s + self.decode_steps_s(
            batch, batch * (input_tokens_max + 1), iterations - 1
        )

    def padded_prefill_s(self, batch: int, input_tokens_max: int) -> float:
        """Seconds of the first iteration of a closed batch."""
        parts, tokens = self.coefficients, batch * input_tokens_max
        return (
            self.overhead_s
            + self.overhead_per_sequence_s * batch
            + parts.tokens.at(tokens)
            + parts.per_prefill_token_s * tokens
            + parts.prefill_fixed_s
            + 0.5 * tokens * parts.prefill_attention.at(input_tokens_max)
        )

    @cached_property
    def _lines(self) -> dict[int, tuple[float, float, float, float]]:
        return {}

    @cached_property
    def _chunk_slopes(self) -> dict[int, float]:
        return {}

    def _chunk_slope(self, chunk: int) -> float:
        slope = self.coefficients.prefill_attention.at(chunk)
        if len(self._chunk_slopes) < REMEMBERED_MAX:
            self._chunk_slopes[chunk] = slope
        return slope

    @cached_property
    def _mixed_lines(self) -> dict[int, tuple[float, float, float, float]]:
        return {}

    def _decode_line(self, decodes: int) -> tuple[float, float, float, float]:
        """(seconds, seconds per KV token, bend in KV tokens, further seconds per token beyond) of
        an iteration of so many decodes and nothing else."""
        line = self._lines.get(decodes)
        if line is None:
            parts = self.coefficients
            fixed, slope, bend, beyond = _line(parts.decode, decodes)
            fixed += self.overhead_s + self.overhead_per_sequence_s * decodes
            line = (fixed + parts.tokens.at(decodes), slope, bend, beyond)
            if len(self._lines) < REMEMBERED_MAX:
                self._lines[decodes] = line
        return line

    def _mixed_line(self, decodes: int) -> tuple[float, float, float, float]:
        line = self._mixed_lines.get(decodes)
        if line is None:
            parts = self.coefficients
            line = _line(parts.mixed or parts.decode, decodes)
            if len(self._mixed_lines) < REMEMBERED_MAX:
                self._mixed_lines[decodes] = line
        return line


def _line(cost: DecodeCost, decodes: int) -> tuple[float, float, float, float]:
    return (
        cost.fixed_s + cost.per_sequence_s * decodes,
        cost.slope.at(decodes) / decodes,
        cost.bend_tokens * decodes,
        cost.beyond_bend_s,
    )


def _steps_of_ramp(first: float, growth: float, seconds: float) -> int:
    """About how many terms of first + (first + growth) + ... fit into `seconds`."""
    if growth <= 0:
        return max(0, int(seconds / first))
    half = first - growth / 2
    return max(0, int((math.sqrt(half * half + 2 * growth * seconds) - half) / growth))


def load_profile(name_or_path: str | Path) -> CostProfile:
    """A profile of `deploy/costs`, by name, or any file. Raises UnknownProfile or BadProfile."""
    path = Path(name_or_path)
    if path.suffix != ".json" or not path.exists():
        path = PROFILES / f"{name_or_path}.json"
    if not path.is_file():
        known = ", ".join(profile_names()) or "none here; the repository has some in deploy/costs"
        raise UnknownProfile(f"no cost profile {name_or_path}; a file, or one of: {known}")
    return decode_profile(path.read_bytes(), str(path))


def decode_profile(data: bytes, named: str) -> CostProfile:
    """A profile from its JSON. Raises BadProfile."""
    try:
        profile = msgspec.json.decode(data, type=CostProfile)
    except msgspec.MsgspecError as error:
        raise BadProfile(f"{named} is no cost profile: {error}") from error
    problems = list(_problems(profile))
    if problems:
        raise BadProfile(f"{named}: {'; '.join(problems)}")
    return profile


def profile_names() -> list[str]:
    """The profiles that are shipped."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def _problems(profile: CostProfile) -> list[str]:
    parts = profile.coefficients
    costs = [cost for cost in (parts.decode, parts.mixed) if cost is not None]
    curves = [parts.tokens, parts.prefill_attention, *(cost.slope for cost in costs)]
    seconds = [parts.per_prefill_token_s, parts.prefill_fixed_s, profile.overhead_s]
    seconds += [profile.overhead_per_sequence_s, profile.noise_cv]
    for cost in costs:
        seconds += [cost.per_sequence_s, cost.fixed_s, cost.bend_tokens, cost.beyond_bend_s]
    problems = []
    if not all(curve.rises for curve in curves):
        problems.append("a curve falls")
    if not all(0 <= value < math.inf for value in seconds):
        problems.append("a coefficient is negative or infinite")
    if parts.tokens.at(1) + profile.overhead_s <= 0:
        problems.append("an iteration over one token takes no time")
    if profile.kv_block_tokens < 1 or profile.kv_tokens < profile.kv_block_tokens:
        problems.append("less than one block of KV")
    return problems
