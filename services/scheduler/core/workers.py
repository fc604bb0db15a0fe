"""The book of workers: who can run slices, what each was given, and how loaded it is."""

from dataclasses import dataclass, field

from services.scheduler.core.credit import Credit
from services.scheduler.core.policies.order import Queue
from shared.memory import token_budget
from shared.messages import WorkerInfo, WorkerMemory

ASKED_S = 10.0
"""A worker that lives has answered a question by then."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One RunSlice that has not been answered."""

    batch_id: str
    request_ids: tuple[str, ...]
    estimate_s: float
    dispatched_at: float
    due_at: float
    """After this the order counts as lost."""


@dataclass(slots=True)
class Worker:
    """One worker process."""

    info: WorkerInfo
    memory: WorkerMemory
    seen_at: float
    draining: bool = False
    heard_s: float = 0.0
    """What its last beat said of our own beats."""
    cool_until: float = 0.0
    batches: dict[str, Batch] = field(default_factory=dict)
    """Closed: in the order in which the worker runs them. Changed by `give` and `end` only."""
    load_s: float = 0.0
    """Closed: the sum of the estimates of its batches; exactly 0 when it has none."""
    credit: Credit = field(default_factory=Credit)
    """Leased: what runs here."""
    line: Queue | None = None
    """With early binding: who waits for this worker."""
    waiting_tokens: int = 0
    """Input tokens of those in line."""
    asked: dict[str, float] = field(default_factory=dict)
    """Request id to when this worker was asked for tokens of it, the latest last."""

    def ask(self, request_id: str, now: float) -> None:
        """It is asked for tokens now; who was asked for long ago is forgotten."""
        self.asked.pop(request_id, None)
        self.asked[request_id] = now
        while now - self.asked[first := next(iter(self.asked))] > ASKED_S:
            del self.asked[first]

    def give(self, batch: Batch) -> None:
        """One more closed batch, behind those it has."""
        self.batches[batch.batch_id] = batch
        self.load_s += batch.estimate_s

    def end(self, batch_id: str) -> Batch | None:
        """It does not have this batch any more; None if it did not. The load is summed anew, so
        that rounding errors do not pile up."""
        batch = self.batches.pop(batch_id, None)
        if batch is not None:
            self.load_s = sum((b.estimate_s for b in self.batches.values()), start=0.0)
        return batch

    def head(self) -> Batch | None:
        """The batch it should be running."""
        return next(iter(self.batches.values()), None)

    def budget_tokens(self, share: float) -> int:
        return token_budget(self.memory.kv_tokens_capacity, share)


@dataclass(slots=True)
class Workers:
    """By boot id, in the order in which they joined."""

    lost_max: int
    active: dict[str, Worker] = field(default_factory=dict)
    lost: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """What (request, attempt) a lost worker may still be running, should it come back."""

    foreign: tuple[str, str] | None = None
    """The last worker that was not taken in, and its model: a mesh serves one model."""

    @property
    def model(self) -> str:
        """What this mesh serves: the model of the worker that is here longest; empty: none is."""
        first = next(iter(self.active.values()), None)
        return first.info.model if first else ""

    def remember_lost(self, worker: str, running: tuple[tuple[str, int], ...]) -> None:
        self.lost[worker] = running
        if len(self.lost) > self.lost_max:
            del self.lost[next(iter(self.lost))]

    def kv_usage(self) -> float:
        """Share of all KV slots in use, 0 to 1."""
        memories = [worker.memory for worker in self.active.values()]
        capacity = sum(memory.kv_tokens_capacity for memory in memories)
        used = sum(memory.kv_tokens_used for memory in memories)
        return min(1.0, used / capacity) if capacity > 0 else 0.0
