"""The engine's thread: what waits for the engine, and the loop that turns it.

Everything that touches the model happens here. The event loop only appends to bounded queues under
a lock that is never held during an iteration, and hears back through `report`, which must be safe
to call from this thread. Cancellations are applied between two iterations.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from services.worker.core.events import BatchBegan, BatchRefused, EngineStepped
from services.worker.core.worker import BATCHES_MAX, QUEUE_FULL
from services.worker.engines.api import (
    Engine,
    EngineError,
    EngineInfo,
    OutOfMemory,
    SliceEnd,
    StepReport,
)
from shared.messages import (
    RequestSpec,
    RunSlice,
    Sampling,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from shared.tokens import count, pack

CLOSE_S = 10.0
"""How long a closing thread may take for its last iteration."""
WARM_UP_PROMPTS = (8, 5)
"""Input tokens of the rows of the first slice, which only warms caches and allocators."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The model is loaded and warm."""

    info: EngineInfo
    memory: WorkerMemory


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The thread has ended by this error."""

    error: BaseException


Report = EngineReady | EngineFailed | BatchBegan | BatchRefused | EngineStepped


@dataclass(slots=True)
class _Waiting:
    """A batch that the engine has not begun."""

    order: RunSlice
    received_s: float
    withdrawn: list[SliceResult] = field(default_factory=list)


@dataclass(slots=True)
class _Begun:
    """A batch that the engine runs."""

    order: RunSlice
    queue_s: float
    withdrawn: list[SliceResult]


class EngineThread:
    """See the module's text. All methods but `_run`'s are called from the event loop."""

    def __init__(self, make: Callable[[], Engine], report: Callable[[Report], None]) -> None:
        self._make = make
        self._report = report
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._cancels: dict[str, int] = {}
        self._closing = False
        self._begun: dict[str, _Begun] = {}
        """By batch; only the thread uses it."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and serve. The first report is `EngineReady` or `EngineFailed`."""
        self._thread.start()

    def submit(self, order: RunSlice) -> None:
        """Put a batch behind the others; refused by a report if too many wait."""
        with self._changed:
            if len(self._waiting) < BATCHES_MAX:
                self._waiting.append(_Waiting(order, time.monotonic()))
                self._changed.notify()
                return
        self._report(BatchRefused(order, QUEUE_FULL))

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop with attempts up to this one: at once if they wait, else before the next
        iteration. Cancellations are as many as requests are here, so they need no own limit."""
        with self._changed:
            for waiting in self._waiting:
                _withdraw(waiting, request_id, attempt)
            self._cancels[request_id] = max(attempt, self._cancels.get(request_id, 0))
            self._changed.notify()

    def give_back(self, reason: str) -> None:
        """Refuse all batches that wait."""
        with self._changed:
            returned = list(self._waiting)
            self._waiting.clear()
        for waiting in returned:
            self._report(BatchRefused(waiting.order, reason))

    def close(self) -> None:
        """End the thread after the iteration that runs. Blocks for at most `CLOSE_S`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    # ------------------------------------------------------------------- inside the thread

    def _run(self) -> None:
        try:
            engine = self._make()
            try:
                warm_up(engine)
                self._report(EngineReady(engine.info, engine.memory()))
                while self._turn(engine):
                    pass
            finally:
                engine.close()
        except BaseException as error:
            self._report(EngineFailed(error))

    def _turn(self, engine: Engine) -> bool:
        """Take in what came, then one iteration. False once the thread shall end."""
        with self._changed:
            while not (self._waiting or self._cancels or self._closing or engine.busy):
                self._changed.wait()
            if self._closing:
                return False
            cancels, self._cancels = self._cancels, {}
            starting = self._startable(engine)
        for request_id, attempt in cancels.items():
            self._cancel_begun(engine, request_id, attempt)
        for waiting in starting:
            self._begin(engine, waiting)
        if engine.busy:
            self._step(engine)
        return True

    def _startable(self, engine: Engine) -> list[_Waiting]:
        """Closed batches one after the other; leases all at once."""
        if not self._waiting or (engine.busy and self._waiting[0].order.form == "closed"):
            return []
        if self._waiting[0].order.form == "closed":
            return [self._waiting.popleft()]
        leases = []
        while self._waiting and self._waiting[0].order.form == "leased":
            leases.append(self._waiting.popleft())
        return leases

    def _cancel_begun(self, engine: Engine, request_id: str, attempt: int) -> None:
        attempts = [
            order.attempt
            for batch in self._begun.values()
            for order in batch.order.orders
            if order.spec.request_id == request_id
        ]
        if attempts and max(attempts) <= attempt:
            engine.cancel(request_id)

    def _begin(self, engine: Engine, waiting: _Waiting) -> None:
        order, queue_s = waiting.order, time.monotonic() - waiting.received_s
        if not order.orders:
            end = SliceEnd(order.batch_id, tuple(waiting.withdrawn), SliceTimings(queue_s=queue_s))
            self._report(EngineStepped(StepReport(ended=(end,))))
            return
        try:
            engine.start(order)
        except EngineError as error:
            self._report(BatchRefused(order, _reason(error), engine.memory()))
            return
        self._begun[order.batch_id] = _Begun(order, queue_s, waiting.withdrawn)
        self._report(BatchBegan(order.batch_id, engine.memory()))

    def _step(self, engine: Engine) -> None:
        try:
            report = engine.step()
        except EngineError as error:
            memory = engine.memory()
            for batch in self._begun.values():
                self._report(BatchRefused(batch.order, _reason(error), memory))
            self._begun.clear()
            return
        if report.ended:
            ended = tuple(self._end(end) for end in report.ended)
            report = StepReport(
                tokens=report.tokens,
                ended=ended,
                prefill_s=report.prefill_s,
                decode_s=report.decode_s,
                batch_size=report.batch_size,
            )
            self._report(EngineStepped(report, engine.memory()))
        elif report.tokens:
            self._report(EngineStepped(report))

    def _end(self, end: SliceEnd) -> SliceEnd:
        begun = self._begun.pop(end.batch_id)
        return SliceEnd(
            end.batch_id,
            (*end.results, *begun.withdrawn),
            msgspec.structs.replace(end.timings, queue_s=begun.queue_s),
        )


def warm_up(engine: Engine) -> None:
    """One tiny slice, so that the first request meets warm caches and allocators. A worker whose
    memory is too small even for that serves nothing anyway, and says so at the first order."""
    orders = tuple(
        SliceOrder(
            spec=RequestSpec(
                request_id=f"warm-up-{index}",
                parent_id="",
                gateway="",
                model="",
                prompt=pack([0] * tokens),
                max_tokens=3,
                sampling=Sampling(temperature=float(index), ignore_eos=True),
            ),
            attempt=1,
            lease_tokens=3,
        )
        for index, tokens in enumerate(WARM_UP_PROMPTS)
    )
    form = engine.info.forms[0]
    try:
        engine.start(
            RunSlice(epoch=0, worker="", batch_id="warm-up", form=form, orders=orders, iterations=3)
        )
    except EngineError:
        return
    while engine.busy:
        engine.step()


def _withdraw(waiting: _Waiting, request_id: str, attempt: int) -> None:
    """Take a request's attempts up to this one out of a batch that waits."""
    kept = []
    for order in waiting.order.orders:
        if order.spec.request_id != request_id or order.attempt > attempt:
            kept.append(order)
            continue
        waiting.withdrawn.append(
            SliceResult(
                request_id=request_id,
                attempt=order.attempt,
                position=count(order.tokens),
                finish_reason="cancelled",
            )
        )
    if len(kept) < len(waiting.order.orders):
        waiting.order = msgspec.structs.replace(waiting.order, orders=tuple(kept))


def _reason(error: EngineError) -> str:
    return f"out of memory: {error}" if isinstance(error, OutOfMemory) else str(error)
