"""What an engine does: it holds a model and its KV cache, and advances orders one iteration a call.

Theory of operation. The worker's shell owns one thread in which it calls the engine; nothing else
ever touches it, so an engine needs no locks. The shell gives it orders (`start`), then calls
`step` as long as the engine has work; between two steps it may cancel requests and add orders.
A step reports the tokens of one iteration, and the results of the slices that ended in it.

A closed batch ends with one `SliceEnd`. A leased request belongs to no batch: it makes tokens up
to the end of its lease, pauses there with its KV kept, goes on after `renew`, and ends with a
finish reason, or because it was cancelled, parked or evicted (`LeaseEnd`). What the scheduler
hears of it is the core's matter, not the engine's.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from shared.messages import (
    FinishReason,
    Form,
    RunSlice,
    SliceResult,
    SliceTimings,
    TokenLogprobs,
    WorkerMemory,
)


class EngineError(Exception):
    """The base of what an engine raises."""


class OutOfMemory(EngineError):
    """The KV of these orders does not fit. Nothing of them was started."""


class BadOrder(EngineError):
    """The order can never run here: wrong form, too long for the context, unknown token ids."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """One request's new tokens in one iteration (one, unless an engine makes several)."""

    request_id: str
    attempt: int
    position: int
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    ending_token: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class SliceEnd:
    """A closed batch ended."""

    batch_id: str
    results: tuple[SliceResult, ...]
    timings: SliceTimings


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """A leased request is gone from the engine before its finish; its KV is free."""

    request_id: str
    attempt: int
    evicted: bool = False
    """By the engine itself; False: it was parked."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one iteration did."""

    tokens: tuple[StepTokens, ...] = ()
    ended: tuple[SliceEnd, ...] = ()
    prefill_s: float = 0.0
    decode_s: float = 0.0
    batch_size: int = 0
    """Sequences in this iteration."""
    left: tuple[LeaseEnd, ...] = ()
    """Leased requests that ended without a finish."""
    timings: SliceTimings | None = None
    """Leased only: measured since the last report to the scheduler, if the engine knows better than
    the sum of its steps."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is; fixed once it is loaded."""

    engine: str
    forms: tuple[Form, ...]
    model: str
    context_tokens_max: int
    vocabulary_size: int
    end_token_ids: tuple[int, ...] = ()
    batch_size_max: int = 0
    device: str = "cpu"
    kv_block_tokens: int = 1
    """KV is given out in blocks of so many tokens."""
    shares_prefixes: bool = False
    """What a prompt has in common with an earlier one is not computed anew."""
    details: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """See the module's text. All methods are called from the engine's thread."""

    @property
    def info(self) -> EngineInfo:
        """Known once the engine is made."""

    def start(self, order: RunSlice) -> None:
        """Take in a batch or leases. Raises OutOfMemory or BadOrder; then nothing was taken.

        Leased: KV for the prompt and each first lease is set aside; `iteration_tokens` and
        `prefill_first` hold for all that runs from now on. `renewals` are not looked at."""

    def step(self) -> StepReport:
        """One iteration over what runs. Calling it without work answers an empty report.

        Raises EngineError; then everything that ran was dropped, and the engine can go on."""

    def cancel(self, request_id: str) -> None:
        """The request makes no more tokens; in a closed batch its row idles until the end, and
        its slice result says `cancelled`. A lease ends at once and without a word. Unknown ids
        are ignored."""

    @property
    def busy(self) -> bool:
        """True while `step` has something to do."""

    def memory(self) -> WorkerMemory:
        """Telemetry now."""

    def close(self) -> None:
        """Free the model and the cache."""


@runtime_checkable
class LeasedEngine(Engine, Protocol):
    """What an engine whose `info.forms` has "leased" does beside."""

    def renew(self, request_id: str, until: int) -> None:
        """The request may make output up to position `until`. Unknown ids, and ends that are not
        later than the present one, are ignored."""

    def park(self, request_id: str) -> None:
        """The request's lease ends after the iteration that runs, its KV is freed then, and the
        report of a step says so (`left`), unless it has finished by then. Unknown ids are
        ignored. The engine is busy until it is said."""


@runtime_checkable
class Interruptible(Protocol):
    """An engine whose steps may take long without need: one that only waits."""

    def interrupt(self) -> None:
        """Something new has come: the running step shall return as soon as it can. The only
        method that is called from other threads."""
