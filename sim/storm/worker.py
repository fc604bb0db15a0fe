"""A worker of a storm: the real core, the real loop around an engine, and the worker's lines."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from services.worker.core.events import (
    CancelRequest,
    Command,
    EngineStepped,
    GiveBack,
    Leave,
    ParkLease,
    Reconnected,
    RenewLease,
    StartBatch,
    StopWanted,
    TokensNotSent,
    TokensSent,
)
from services.worker.core.worker import Worker
from services.worker.engines.api import EngineInfo
from services.worker.loop import EngineFailed, EngineReady, EngineThread, Report
from shared.messages import SliceDone, TokenBatch, WorkerBeat, WorkerMemory
from sim.storm.broker import INBOX, Broker
from sim.storm.engine import StormEngine
from sim.storm.process import Process
from sim.world import World

TOKENS_S = 10.0
"""As the real shell's deadlines."""
RESULT_S = 30.0
BEAT_PATIENCE_S = 1.0
MakeCore = Callable[[str, str, EngineInfo, WorkerMemory, float], Worker]


class WorkerJudge(Protocol):
    """Who watches what a worker does."""

    def worker_did(self, worker: "StormWorker", event: Any, commands: list[Command]) -> None: ...


class StormWorker(Process):
    """See the module's text."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        boot: str,
        make: MakeCore,
        engine: StormEngine,
        step_s: float,
        judge: WorkerJudge,
    ) -> None:
        super().__init__(world, broker, boot, (boot,))
        self.engine = engine
        self.slow = 1.0
        """Factor on the time of an iteration."""
        self.draining = False
        self._step_s = step_s
        self._judge = judge
        self._thread = EngineThread(lambda: engine, self._report)
        self._reports: deque[Report] = deque()
        self._turning = False
        self.core = make(boot, boot, engine.info, engine.memory(), self.now())

    def start(self) -> None:
        self.connect()
        self.wake()
        self.arm()

    # -------------------------------------------------------------------------------- events in

    def handle(self, message: Any) -> None:
        commands = self.core.handle(message, self.now())
        self._judge.worker_did(self, message, commands)
        self._perform(commands)
        self._take_reports()
        self._turn_soon()

    def wake(self) -> None:
        commands = self.core.wake(self.now())
        self._judge.worker_did(self, None, commands)
        self._perform(commands)

    def deadline(self) -> float | None:
        return self.core.deadline()

    def reconnected(self) -> None:
        self.handle(Reconnected())

    def drain(self) -> None:
        """SIGTERM."""
        self.draining = True
        if not self.frozen:
            self.handle(StopWanted())
            self.arm()

    def residents(self) -> tuple[Any, ...]:
        """What it lists when it is asked to."""
        commands = self.core.handle(Reconnected(), self.now())
        beats = [command for command in commands if isinstance(command, WorkerBeat)]
        return beats[0].residents if beats else ()

    # ------------------------------------------------------------------------------- the engine

    def _report(self, report: Report) -> None:
        assert not isinstance(report, EngineReady | EngineFailed), "its engine has no thread"
        self._reports.append(report)

    def _take_reports(self) -> None:
        while self._reports:
            report: Any = self._timeless(self._reports.popleft())
            commands = self.core.handle(report, self.now())
            self._judge.worker_did(self, report, commands)
            self._perform(commands)

    def _timeless(self, report: Any) -> Any:
        """Without the time that this machine's own clock saw an order wait: one seed, one world."""
        if isinstance(report, EngineStepped) and report.report.ended:
            ended = tuple(
                replace(end, timings=msgspec.structs.replace(end.timings, queue_s=0.0))
                for end in report.report.ended
            )
            return replace(report, report=replace(report.report, ended=ended))
        return report

    def _turn_soon(self) -> None:
        if not self._turning and (self._thread.has_news or self.engine.busy):
            self._turning = True
            self.world.after(self._step_s * self.slow, self._turn)

    def _turn(self) -> None:
        self._turning = False
        if not self.alive:
            return
        if self.frozen:
            return  # `thaw` goes on
        self._thread.turn(self.engine)
        self._take_reports()
        self._turn_soon()
        self.arm()

    def thaw(self) -> None:
        super().thaw()
        if self.alive:
            self._turn_soon()

    # ------------------------------------------------------------------------------ commands out

    def _perform(self, commands: list[Command]) -> None:
        thread = self._thread
        for command in commands:
            match command:
                case TokenBatch():
                    self.say(command.gateway, command, self._tokens(command), TOKENS_S)
                case SliceDone():
                    self.say(INBOX, command, None, RESULT_S)
                case WorkerBeat():
                    self._beat(command)
                case StartBatch():
                    thread.submit(command.order)
                case RenewLease():
                    thread.renew(command.request_id, command.attempt, command.until)
                case ParkLease():
                    thread.park(command.request_id, command.attempt)
                case CancelRequest():
                    thread.cancel(command.request_id, command.attempt)
                case GiveBack():
                    thread.give_back(command.reason)
                case Leave():
                    self.world.after(0.05, self.die)
        self._turn_soon()

    def _beat(self, beat: WorkerBeat) -> None:
        """One that lists what is here is said until it is heard; of the others the newest."""
        if beat.residents_listed or self.line.up:
            patience_s = RESULT_S if beat.residents_listed else BEAT_PATIENCE_S
            self.say(INBOX, beat, None, patience_s)

    def _tokens(self, batch: TokenBatch) -> Callable[[str], None]:
        def told(result: str) -> None:
            if not self.alive:
                return
            if result == "sent":
                self._heard(TokensSent(batch.gateway))
            else:
                self._heard(TokensNotSent(batch, unroutable=result == "unroutable"))

        return told

    def _heard(self, event: Any) -> None:
        """A confirm; a stopped process hears of it when it goes on."""
        self.take(event)
