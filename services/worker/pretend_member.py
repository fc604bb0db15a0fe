"""One of the many workers that a process pretends to be: a core and an engine, without a thread.

The core and the engine are those of a plain simulated worker; only who calls them when differs.
The host calls `turn` when `due_at` has come and `handle` for what arrives, and gets back what is
to be sent.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from services.worker.core.events import (
    BatchBegan,
    CancelRequest,
    Command,
    Event,
    GiveBack,
    Leave,
    ParkLease,
    RenewLease,
    StartBatch,
)
from services.worker.core.worker import Worker
from services.worker.engines.simulated import SimulatedEngine, make_simulated
from services.worker.engines.simulated_clock import AgendaClock
from services.worker.loop import EngineFailed, EngineReady, EngineThread, Report
from services.worker.settings import WorkerSettings
from shared.messages import SliceDone, TokenBatch, WorkerBeat, WorkerMemory

Outgoing = TokenBatch | SliceDone | WorkerBeat
"""What a member wants to have sent."""


class Member:
    """See the module's text. All times are monotonic seconds."""

    def __init__(
        self,
        worker: str,
        name: str,
        settings: WorkerSettings,
        tick_s: float,
        began: Callable[[BatchBegan], None],
    ) -> None:
        """`worker` is its id, `tick_s` how often the host calls, `began` hears of each order that
        the engine takes in. Raises SetupError."""
        self.worker = worker
        self._began = began
        self._clock = AgendaClock(settings.simulated_speed, tick_s)
        own = settings.model_copy(update={"name": name})
        self._engine: SimulatedEngine = make_simulated(own, self._clock)
        self._turns = EngineThread(lambda: self._engine, self._on_report)
        self._reports: deque[Event] = deque()
        now = time.monotonic()
        self._core = Worker(worker, name, self._engine.info, self._engine.memory(), now)
        self._engine_at = math.inf
        self.due_at = now
        """When `turn` has something to do; infinite once it has left."""

    @property
    def left(self) -> bool:
        """It is over."""
        return self.due_at == math.inf

    @property
    def memory(self) -> WorkerMemory:
        """As last told."""
        return self._core.memory

    def turn(self, now: float) -> list[Outgoing]:
        """Its engine's next iterations, and whatever of its core is due."""
        if self._turns.has_news or self._engine_at <= now:
            self._turns.turn(self._engine)
            at = self._engine.next_tokens_at()
            self._engine_at = math.inf if at is None else self._clock.real_s(at)
        out = self._take_reports(now)
        if (self._core.deadline() or now) <= now:
            out += self._perform(self._core.wake(now))
        self._plan(now)
        return out

    def handle(self, event: Event, now: float) -> list[Outgoing]:
        """Something arrived for it. The engine hears of it at its next turn."""
        out = self._perform(self._core.handle(event, now))
        out += self._take_reports(now)
        self._plan(now)
        return out

    def _plan(self, now: float) -> None:
        deadline = self._core.deadline()
        if deadline is None:
            self.due_at = math.inf
        elif self._turns.has_news:
            self.due_at = now
        else:
            self.due_at = min(deadline, self._engine_at)

    def _on_report(self, *reports: Report) -> None:
        for report in reports:
            assert not isinstance(report, EngineReady | EngineFailed), "its engine has no thread"
            self._reports.append(report)

    def _take_reports(self, now: float) -> list[Outgoing]:
        out: list[Outgoing] = []
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, BatchBegan):
                self._began(report)
            out += self._perform(self._core.handle(report, now))
        return out

    def _perform(self, commands: list[Command]) -> list[Outgoing]:
        """Give the engine its commands; the rest is to be sent."""
        out: list[Outgoing] = []
        for command in commands:
            match command:
                case TokenBatch() | SliceDone() | WorkerBeat():
                    out.append(command)
                case StartBatch():
                    self._turns.submit(command.order)
                case RenewLease():
                    self._turns.renew(command.request_id, command.attempt, command.until)
                case ParkLease():
                    self._turns.park(command.request_id, command.attempt)
                case CancelRequest():
                    self._turns.cancel(command.request_id, command.attempt)
                case GiveBack():
                    self._turns.give_back(command.reason)
                case Leave():
                    pass
        return out
