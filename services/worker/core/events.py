"""What the worker's core hears from its engine and its shell, and what it asks of the engine.

Messages of the mesh are events and commands themselves (`shared.messages`); only what never
travels is defined here.
"""

from dataclasses import dataclass

from services.worker.engines.api import StepReport
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    Park,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    TokenBatch,
    WorkerBeat,
    WorkerMemory,
)


@dataclass(frozen=True, slots=True)
class EngineStepped:
    """One iteration is over; its slice ends carry queue times. Results of requests that were
    withdrawn before their batch began are among them."""

    report: StepReport
    memory: WorkerMemory | None = None
    """Of a closed batch only when it changed by more than the iteration itself."""


@dataclass(frozen=True, slots=True)
class BatchRefused:
    """The engine did not run this batch, or dropped it."""

    order: RunSlice
    reason: str
    memory: WorkerMemory | None = None


@dataclass(frozen=True, slots=True)
class BatchBegan:
    """The engine took this batch, or these leases, in."""

    batch_id: str
    memory: WorkerMemory
    queue_s: float = 0.0
    """From the order's receipt."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The line to the broker was cut and is back; the queue is a new one."""


@dataclass(frozen=True, slots=True)
class StopWanted:
    """This process is asked to end."""


@dataclass(frozen=True, slots=True)
class TokensSent:
    """The broker has the token batch."""

    gateway: str


@dataclass(frozen=True, slots=True)
class TokensNotSent:
    """The broker does not have it; it is to be tried again."""

    batch: TokenBatch
    unroutable: bool = False
    """The gateway has no queue now."""


LocalEvent = (
    EngineStepped
    | BatchRefused
    | BatchBegan
    | Reconnected
    | StopWanted
    | TokensSent
    | TokensNotSent
)
Order = RunSlice | Park | Drop | SendTokens | DrainWorker | SchedulerBeat
"""What a scheduler says to a worker."""
Event = LocalEvent | Order | FinishAck


@dataclass(frozen=True, slots=True)
class StartBatch:
    """Give this to the engine, behind what waits there."""

    order: RunSlice


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The engine shall stop with attempts up to this one of a request."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class RenewLease:
    """The engine shall let this attempt go on up to this output position."""

    request_id: str
    attempt: int
    until: int


@dataclass(frozen=True, slots=True)
class ParkLease:
    """The engine shall let go of this attempt after the iteration that runs, and say so."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Batches that wait in the engine's queue shall come back as refused."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing runs or waits here any more."""


EngineCommand = StartBatch | RenewLease | ParkLease | CancelRequest | GiveBack
Command = EngineCommand | Leave | TokenBatch | SliceDone | WorkerBeat
