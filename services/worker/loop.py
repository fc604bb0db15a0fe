"""The engine's thread: what waits for the engine, and the loop that turns it.

Everything that touches the model happens here. The event loop only appends to bounded queues under
a lock that is never held during an iteration, and hears back through `report`, which must be safe
to call from this thread. Cancellations, renewals and parkings are applied between two iterations.

Waking the event loop costs a tenth of an iteration of one row, so that what is not urgent of quick
iterations is told together: for as long as tokens would wait to be joined anyway, and never for
more than a part of a lease's margin. First tokens and ends are told at once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from services.worker.core.events import BatchBegan, BatchRefused, EngineStepped
from services.worker.core.leases import LEASES_MAX
from services.worker.core.outbox import COALESCE_S
from services.worker.core.worker import BATCHES_MAX, QUEUE_FULL
from services.worker.engines.api import (
    Engine,
    EngineError,
    EngineInfo,
    Interruptible,
    LeasedEngine,
    LeaseEnd,
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
HELD_SHARE = 3
"""Of the tokens that are left when a lease is to be renewed, a third may be told late."""
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
    """A batch, or leases, that the engine has not begun."""

    order: RunSlice
    received_s: float
    withdrawn: list[SliceResult] = field(default_factory=list)


@dataclass(slots=True)
class _Begun:
    """A closed batch that the engine runs."""

    order: RunSlice
    queue_s: float
    withdrawn: list[SliceResult]


class EngineThread:
    """See the module's text. All methods but `_run`'s are called from the event loop."""

    def __init__(self, make: Callable[[], Engine], report: Callable[..., None]) -> None:
        """report: called with one or more `Report`s."""
        self._make = make
        self._report = report
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._cancels: dict[str, int] = {}
        self._parks: dict[str, int] = {}
        self._renewals: dict[str, tuple[int, int]] = {}
        """Request -> (attempt, until)."""
        self._closing = False
        self._interrupt: Callable[[], None] = _nothing
        self._begun: dict[str, _Begun] = {}
        """Closed batches; only the thread uses it."""
        self._leases: dict[str, int] = {}
        """Leased requests in the engine, and their attempts; only the thread uses it."""
        self._held: list[Report] = []
        """Of the thread, to be told together; without a thread of its own nothing is held."""
        self._held_max = 0
        self._told_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and serve. The first report is `EngineReady` or `EngineFailed`."""
        self._thread.start()

    def submit(self, order: RunSlice) -> None:
        """Put a batch behind the others; refused by a report if too many wait."""
        with self._changed:
            limit = LEASES_MAX if order.form == "leased" else BATCHES_MAX
            if len(self._waiting) < limit:
                self._waiting.append(_Waiting(order, time.monotonic()))
                self._stir()
                return
        self._report(BatchRefused(order, QUEUE_FULL))

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop with attempts up to this one: at once if they wait, else before the next
        iteration. Cancellations are as many as requests are here, so they need no own limit."""
        with self._changed:
            for waiting in self._waiting:
                _withdraw(waiting, request_id, attempt)
            self._cancels[request_id] = max(attempt, self._cancels.get(request_id, 0))
            self._stir()

    def renew(self, request_id: str, attempt: int, until: int) -> None:
        """Let a lease go on up to this output position, whether it runs, pauses or waits."""
        with self._changed:
            waits = any(_lengthen(w, request_id, attempt, until) for w in self._waiting)
            if not waits:
                self._renewals[request_id] = (attempt, until)
                self._stir()

    def park(self, request_id: str, attempt: int) -> None:
        """End a lease after the iteration that runs; a report says so."""
        with self._changed:
            waits = any(_withdraw(w, request_id, attempt) for w in self._waiting)
            if not waits:
                self._parks[request_id] = attempt
                self._stir()
        if waits:
            left = (LeaseEnd(request_id, attempt),)
            self._report(EngineStepped(StepReport(left=left)))

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
            self._stir()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def _stir(self) -> None:
        """Something new has come. Called with the lock."""
        self._changed.notify()
        self._interrupt()

    # ------------------------------------------------------------------- inside the thread

    def _run(self) -> None:
        try:
            engine = self._make()
            try:
                warm_up(engine)
                if isinstance(engine, Interruptible):
                    self._interrupt = engine.interrupt
                self._report(EngineReady(engine.info, engine.memory()))
                while self._turn(engine):
                    pass
            finally:
                engine.close()
        except BaseException as error:
            self._tell_held()
            self._report(EngineFailed(error))

    def _turn(self, engine: Engine) -> bool:
        """Wait for something to do, then do it. False once the thread shall end."""
        if not engine.busy:
            self._tell_held()
        with self._changed:
            while not (self.has_news or engine.busy):
                self._changed.wait()
            if self._closing:
                return False
        self.turn(engine)
        return True

    def turn(self, engine: Engine) -> None:
        """Take in what came, then one iteration. Whoever turns an engine without a thread of its
        own calls this, and never `start`."""
        with self._changed:
            cancels, self._cancels = self._cancels, {}
            parks, self._parks = self._parks, {}
            renewals, self._renewals = self._renewals, {}
            starting = self._startable(engine)
        if cancels or starting:
            self._tell_held()
        for request_id, attempt in cancels.items():
            self._cancel_begun(engine, request_id, attempt)
        for waiting in starting:
            self._begin(engine, waiting)
        self._change_leases(engine, renewals, parks)
        if engine.busy:
            self._step(engine)

    @property
    def has_news(self) -> bool:
        """Something came that the next turn takes in."""
        return bool(
            self._waiting or self._cancels or self._parks or self._renewals or self._closing
        )

    def _startable(self, engine: Engine) -> list[_Waiting]:
        """Closed batches one after the other; leases all at once, but never beside a batch."""
        if not self._waiting or self._begun:
            return []
        if self._waiting[0].order.form == "closed":
            return [] if engine.busy else [self._waiting.popleft()]
        leases = []
        while self._waiting and self._waiting[0].order.form == "leased":
            leases.append(self._waiting.popleft())
        return leases

    def _change_leases(
        self, engine: Engine, renewals: dict[str, tuple[int, int]], parks: dict[str, int]
    ) -> None:
        if not (renewals or parks) or not isinstance(engine, LeasedEngine):
            return  # the second question is dear: it is about a protocol
        for request_id, (attempt, until) in renewals.items():
            if self._leases.get(request_id) == attempt:
                engine.renew(request_id, until)
        for request_id, attempt in parks.items():
            if self._leases.get(request_id) == attempt:
                engine.park(request_id)

    def _cancel_begun(self, engine: Engine, request_id: str, attempt: int) -> None:
        leased = self._leases.get(request_id)
        if leased is not None and leased <= attempt:
            del self._leases[request_id]
            engine.cancel(request_id)
            self._report(EngineStepped(StepReport(), engine.memory()))
            return
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
            if order.form == "leased":
                return
            end = SliceEnd(order.batch_id, tuple(waiting.withdrawn), SliceTimings(queue_s=queue_s))
            self._report(EngineStepped(StepReport(ended=(end,))))
            return
        try:
            engine.start(order)
        except EngineError as error:
            self._report(BatchRefused(order, _reason(error), engine.memory()))
            return
        if order.form == "leased":
            self._leases.update((o.spec.request_id, o.attempt) for o in order.orders)
            self._held_max = order.margin_tokens // HELD_SHARE
        else:
            self._held_max = 0
            self._begun[order.batch_id] = _Begun(order, queue_s, waiting.withdrawn)
        self._report(BatchBegan(order.batch_id, engine.memory(), queue_s))

    def _step(self, engine: Engine) -> None:
        try:
            report = engine.step()
        except EngineError as error:
            self._lose_all(_reason(error), engine.memory())
            return
        if report.ended:
            report = replace(report, ended=tuple(self._end(end) for end in report.ended))
            self._stepped(report, engine.memory())
        elif report.tokens or report.left or report.prefill_s:
            # A chunk of a long prompt makes no token, but its time counts.
            self._forget_ended(report)
            self._stepped(report, None if self._begun else engine.memory())

    def _stepped(self, report: StepReport, memory: WorkerMemory | None) -> None:
        self._held.append(EngineStepped(report, memory))
        full = len(self._held) > self._held_max or self._thread.ident is None
        if full or _is_urgent(report) or time.monotonic() - self._told_at >= COALESCE_S:
            self._tell_held()

    def _tell_held(self) -> None:
        held, self._held = self._held, []
        self._told_at = time.monotonic()
        if held:
            self._report(*held)

    def _lose_all(self, reason: str, memory: WorkerMemory) -> None:
        """The engine dropped all that ran. What leases have made is good."""
        self._tell_held()
        for batch in self._begun.values():
            self._report(BatchRefused(batch.order, reason, memory))
        self._begun.clear()
        if self._leases:
            left = tuple(
                LeaseEnd(request_id, attempt, evicted=True, detail=reason)
                for request_id, attempt in self._leases.items()
            )
            self._leases.clear()
            self._report(EngineStepped(StepReport(left=left), memory))

    def _forget_ended(self, report: StepReport) -> None:
        ended = [t.request_id for t in report.tokens if t.finish_reason is not None]
        for request_id in (*ended, *(end.request_id for end in report.left)):
            self._leases.pop(request_id, None)

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


def _is_urgent(report: StepReport) -> bool:
    """Somebody waits for a first token, or something ended."""
    told = any(t.finish_reason is not None or not t.position for t in report.tokens)
    return bool(told or report.ended or report.left)


def _nothing() -> None:
    """Other engines' steps need no interruption."""


def _lengthen(waiting: _Waiting, request_id: str, attempt: int, until: int) -> bool:
    """Renew a lease that waits; False if it is not among these."""
    orders = list(waiting.order.orders)
    for place, order in enumerate(orders):
        if order.spec.request_id == request_id and order.attempt == attempt:
            lease_tokens = max(order.lease_tokens, until - count(order.tokens))
            orders[place] = msgspec.structs.replace(order, lease_tokens=lease_tokens)
            waiting.order = msgspec.structs.replace(waiting.order, orders=tuple(orders))
            return True
    return False


def _withdraw(waiting: _Waiting, request_id: str, attempt: int) -> bool:
    """Take a request's attempts up to this one out of a batch that waits; False if none was."""
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
    if len(kept) == len(waiting.order.orders):
        return False
    waiting.order = msgspec.structs.replace(waiting.order, orders=tuple(kept))
    return True


def _reason(error: EngineError) -> str:
    return f"out of memory: {error}" if isinstance(error, OutOfMemory) else str(error)
