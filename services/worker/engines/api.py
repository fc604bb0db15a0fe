"""What an engine does: it holds a model and its KV cache, and advances orders one iteration a call.

Theory of operation. The worker's shell owns one thread in which it calls the engine; nothing else
ever touches it, so an engine needs no locks. The shell gives it orders (`start`), then calls
`step` as long as the engine has work; between two steps it may cancel requests and add orders.
A step reports the tokens of one iteration, and the results of the slices that ended in it.
"""

from dataclasses import dataclass, field
from typing import Protocol

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
    """A batch (closed) or one lease ended."""

    batch_id: str
    results: tuple[SliceResult, ...]
    timings: SliceTimings


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one iteration did."""

    tokens: tuple[StepTokens, ...] = ()
    ended: tuple[SliceEnd, ...] = ()
    prefill_s: float = 0.0
    decode_s: float = 0.0
    batch_size: int = 0
    """Sequences in this iteration."""


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
    details: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """See the module's text. All methods are called from the engine's thread."""

    @property
    def info(self) -> EngineInfo:
        """Known once the engine is made."""

    def start(self, order: RunSlice) -> None:
        """Take in a batch or leases. Raises OutOfMemory or BadOrder; then nothing was taken."""

    def step(self) -> StepReport:
        """One iteration over what runs. Calling it without work answers an empty report.

        Raises EngineError; then everything that ran was dropped, and the engine can go on."""

    def cancel(self, request_id: str) -> None:
        """The request makes no more tokens; in a closed batch its row idles until the end.
        Its slice result says `cancelled`. Unknown ids are ignored."""

    @property
    def busy(self) -> bool:
        """True while `step` has something to do."""

    def memory(self) -> WorkerMemory:
        """Telemetry now."""

    def close(self) -> None:
        """Free the model and the cache."""
