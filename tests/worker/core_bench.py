"""A worker's core on a bench: a clock, and short names for what is asked of it."""

from collections.abc import Sequence
from dataclasses import replace

from services.worker.core.events import (
    Command,
    EngineStepped,
)
from services.worker.core.worker import Worker
from services.worker.engines.api import EngineInfo, SliceEnd, StepReport, StepTokens
from shared.messages import (
    FinishReason,
    SliceResult,
    SliceTimings,
    TokenBatch,
    WorkerMemory,
)
from shared.tokens import unpack

ENGINE = EngineInfo(
    engine="padded", forms=("closed",), model="tiny", context_tokens_max=100, vocabulary_size=300
)
MEMORY = WorkerMemory(kv_tokens_capacity=1_000)
TIMINGS = SliceTimings(iterations=3, batch_size=1)


LEASED_ENGINE = replace(ENGINE, engine="leaser", forms=("leased",), kv_block_tokens=16)


class Bench:
    """A worker under test, and its clock."""

    def __init__(self, engine: EngineInfo = ENGINE) -> None:
        self.now = 100.0
        self.core = Worker("worker-1", "w", engine, MEMORY, self.now)
        assert kinds(self.core.wake(self.now)) == ["WorkerBeat"]

    def do(self, event: object, after_s: float = 0.0) -> list[Command]:
        """Handle an event, `after_s` later."""
        self.now += after_s
        return self.core.handle(event, self.now)  # type: ignore[arg-type]

    def wake(self) -> list[Command]:
        """Go on to the deadline."""
        deadline = self.core.deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.core.wake(self.now)

    def make(
        self,
        request_id: str,
        position: int,
        ids: Sequence[int],
        finish: FinishReason | None = None,
        *,
        attempt: int = 1,
        after_s: float = 0.0,
    ) -> list[Command]:
        """The engine reports tokens."""
        tokens = StepTokens(request_id, attempt, position, tuple(ids), finish)
        return self.do(EngineStepped(StepReport(tokens=(tokens,))), after_s)

    def end(self, batch_id: str, *results: SliceResult) -> list[Command]:
        """The engine reports the end of a batch."""
        return self.do(
            EngineStepped(StepReport(ended=(SliceEnd(batch_id, results, TIMINGS),)), MEMORY)
        )


def kinds(commands: Sequence[object]) -> list[str]:
    """The commands' names."""
    return [type(command).__name__ for command in commands]


def only(kind: type, commands: Sequence[Command]) -> list:  # type: ignore[type-arg]
    """Those of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def runs_of(commands: Sequence[Command]) -> list[tuple[str, int, list[int], FinishReason | None]]:
    """All token runs among the commands, in short."""
    return [
        (run.request_id, run.position, list(unpack(run.ids)), run.finish_reason)
        for batch in only(TokenBatch, commands)
        for run in batch.runs
    ]


def result(request_id: str, finish: FinishReason | None = None, position: int = 0) -> SliceResult:
    """A slice's result."""
    return SliceResult(request_id=request_id, attempt=1, position=position, finish_reason=finish)
