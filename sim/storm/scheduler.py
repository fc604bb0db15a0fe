"""A scheduler process of a storm: it stands by, leads from its first delivery on, and may be a
zombie that leads on although another does."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from services.scheduler.core.scheduler import Scheduler
from shared.messages import (
    Accepted,
    DrainWorker,
    Drop,
    Elected,
    Finished,
    OrderReturned,
    Park,
    PredictionWanted,
    Recall,
    Rejected,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SendTokens,
)
from sim.storm.broker import HISTORY, INBOX, Broker, Told
from sim.storm.process import Process
from sim.world import World

COMMAND_S = 10.0
"""As the real outbox's deadline."""
WAKES_MAX = 1_000
ToWorker = RunSlice | Park | Drop | SendTokens | DrainWorker


class SchedulerJudge(Protocol):
    """Who watches what a leader decides."""

    def leader_did(
        self, scheduler: "SchedulerProcess", event: Any, commands: Sequence[SchedulerCommand]
    ) -> None: ...

    def elected(self, scheduler: "SchedulerProcess") -> None: ...


class SchedulerProcess(Process):
    """See the module's text."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        name: str,
        make: Callable[[], Scheduler],
        listeners: Callable[[], list[str]],
        judge: SchedulerJudge,
    ) -> None:
        """`listeners`: the queues that are bound to the leader's beats."""
        super().__init__(world, broker, name, (INBOX,))
        self.core: Scheduler | None = None
        self.epoch = 0
        self._make = make
        self._listeners = listeners
        self._judge = judge
        self._woken_at, self._woken = -1.0, 0

    def handle(self, message: Any) -> None:
        if self.core is None:
            self._elect()
        self._ask(message)

    def _elect(self) -> None:
        """The inbox is ours: an epoch of our own, and a new core."""
        self.broker.epoch += 1
        self.epoch = self.broker.epoch
        self.core = self._make()
        self._judge.elected(self)
        self._ask(Elected(epoch=self.epoch))

    def _ask(self, event: Any) -> None:
        core = self.core
        if core is None:
            return
        now = self.now()
        commands = core.wake(now) if event is None else core.handle(event, now)
        self._judge.leader_did(self, event, commands)
        for command in commands:
            self._send(command)

    def wake(self) -> None:
        self._woken = self._woken + 1 if self._woken_at == self.world.now else 0
        self._woken_at = self.world.now
        assert self._woken < WAKES_MAX, "the core wants to be woken again and again"
        self._ask(None)

    def deadline(self) -> float | None:
        return None if self.core is None else self.core.deadline()

    def reconnected(self) -> None:
        """The line was lost: another may lead by now."""
        self.core = None

    def _send(self, command: SchedulerCommand) -> None:
        match command:
            case Finished():
                self.say(HISTORY, command, None, COMMAND_S)
            case PredictionWanted():
                raise AssertionError("no estimator of a storm has said that it predicts")
            case SchedulerBeat():
                for queue in self._listeners():
                    self.say(queue, command, None, COMMAND_S)
            case Recall() | Accepted() | Rejected():
                self.say(command.gateway, command, None, COMMAND_S)
            case _:
                self.say(command.worker, command, self._returned(command), COMMAND_S)

    def _returned(self, command: ToWorker) -> Told:
        core = self.core

        def told(result: str) -> None:
            gone = result == "unroutable" or (result == "failed" and isinstance(command, RunSlice))
            if gone and core is self.core and self.alive:
                self.take(OrderReturned(worker=command.worker))

        return told
