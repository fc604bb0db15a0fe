"""An engine that makes known tokens, one iteration per permit: for tests of what is around it.

Request r's token at position p is p + 1. It keeps its own truth and complains about what would
hurt a real engine: a closed batch started while one runs, or calls from two threads.
"""

import threading

from services.worker.engines.api import (
    EngineError,
    EngineInfo,
    OutOfMemory,
    SliceEnd,
    StepReport,
    StepTokens,
)
from shared.messages import FinishReason, RunSlice, SliceResult, SliceTimings, WorkerMemory
from shared.tokens import count, pack

PATIENCE_S = 30.0


class ScriptedEngine:
    """See the module's text."""

    def __init__(self, *, free_running: bool = False) -> None:
        self.permits = threading.Semaphore(0)
        self.free_running = free_running
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.steps = 0
        self.fail_next: EngineError | None = None
        self.closed = False
        self._order: RunSlice | None = None
        self._made: dict[str, int] = {}
        self._ended: dict[str, FinishReason] = {}
        self._thread: int | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            engine="scripted",
            forms=("closed",),
            model="scripted",
            context_tokens_max=1_000,
            vocabulary_size=1_000,
        )

    @property
    def busy(self) -> bool:
        return self._order is not None

    def start(self, order: RunSlice) -> None:
        self._check_thread()
        assert not self.busy, "a second closed batch"
        if order.batch_id == "warm-up":
            raise EngineError("no need")
        if len(order.orders) > 3:
            raise OutOfMemory("at most 3")
        self.started.append(order.batch_id)
        self._order = order
        self._made = {share.spec.request_id: 0 for share in order.orders}
        self._ended = {}

    def step(self) -> StepReport:
        self._check_thread()
        if self._order is None:
            return StepReport()
        if not self.free_running:
            assert self.permits.acquire(timeout=PATIENCE_S)
        self.steps += 1
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            self._order = None
            raise error
        tokens = []
        for share in self._order.orders:
            name, before = share.spec.request_id, count(share.tokens)
            if name in self._ended or self._made[name] >= share.lease_tokens:
                continue
            position = before + self._made[name]
            self._made[name] += 1
            if position + 1 >= share.spec.max_tokens:
                self._ended[name] = "length"
            tokens.append(
                StepTokens(name, share.attempt, position, (position + 1,), self._ended.get(name))
            )
        done = all(
            o.spec.request_id in self._ended or self._made[o.spec.request_id] >= o.lease_tokens
            for o in self._order.orders
        )
        return StepReport(tuple(tokens), (self._end(),) if done else (), decode_s=0.001)

    def cancel(self, request_id: str) -> None:
        self._check_thread()
        self.cancelled.append(request_id)
        if request_id in self._made:
            self._ended.setdefault(request_id, "cancelled")

    def memory(self) -> WorkerMemory:
        used = 100 if self.busy else 0
        return WorkerMemory(kv_tokens_capacity=500, kv_tokens_used=used)

    def close(self) -> None:
        self.closed = True

    def _end(self) -> SliceEnd:
        assert self._order is not None
        results = tuple(
            SliceResult(
                request_id=o.spec.request_id,
                attempt=o.attempt,
                position=count(o.tokens),
                tokens=pack(count(o.tokens) + n + 1 for n in range(self._made[o.spec.request_id])),
                finish_reason=self._ended.get(o.spec.request_id),
            )
            for o in self._order.orders
        )
        end = SliceEnd(self._order.batch_id, results, SliceTimings(batch_size=len(results)))
        self._order = None
        return end

    def _check_thread(self) -> None:
        current = threading.get_ident()
        assert self._thread in (None, current), "the engine was called from two threads"
        self._thread = current
