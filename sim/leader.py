"""The leading scheduler in virtual time: the real core, its inbox, its wake-ups and its journal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, NamedTuple, Protocol

from services.scheduler.core.presets import Preset
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared.messages import (
    Accepted,
    Elected,
    Finished,
    OrderReturned,
    PredictionWanted,
    Recall,
    Rejected,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
)
from sim.network import Network
from sim.world import World

WAKES_MAX = 1_000
"""At one instant; beyond that the core asks to be woken for nothing."""
RETURN_S = 0.01
"""Until the broker says that nobody reads a queue."""


class Step(NamedTuple):
    """One call of the core: what the journal records."""

    now: float
    event: SchedulerEvent | None
    """None: `wake`."""
    commands: Sequence[SchedulerCommand]


@dataclass(slots=True)
class Spent:
    """Time of the core's calls, by this machine's clocks: no part of the world.

    The clock that is cheap enough to be read twice a call also counts the time in which others had
    the processor. So its sum is scaled by the process's share of the processor during the run."""

    wall_s: float = 0.0
    calls: int = 0
    longest_s: float = 0.0
    """With what others took of it."""
    _since_wall: float = field(default_factory=perf_counter)
    _since_cpu: float = field(default_factory=process_time)

    def add(self, seconds: float) -> None:
        """One call, by the clock."""
        self.wall_s += seconds
        self.calls += 1
        if seconds > self.longest_s:
            self.longest_s = seconds

    def seconds(self) -> float:
        """CPU seconds of all calls so far."""
        wall_s = perf_counter() - self._since_wall
        return self.wall_s * min(1.0, (process_time() - self._since_cpu) / max(wall_s, 1e-9))


class Receiver(Protocol):
    """A gateway or a worker."""

    def receive(self, message: Any, extra: Any) -> None: ...


class Places(Protocol):
    """Where the leader's words go."""

    world: World
    network: Network

    @property
    def workers(self) -> dict[str, Receiver]: ...

    @property
    def gateways(self) -> dict[str, Receiver]: ...

    def finished(self, message: Finished, extra: Any) -> None: ...


class Leader:
    """See the module's text. Between a death and the next election events wait in the inbox."""

    def __init__(
        self,
        places: Any,
        preset: Preset,
        constants: Constants,
        truth: Callable[[str], int] | None,
        journal: list[Step] | None = None,
    ) -> None:
        self.core: Scheduler | None = None
        self.epoch = 0
        self.spent = Spent()
        self.journal = journal
        self._places: Places = places
        self._world: World = places.world
        self._network: Network = places.network
        self._preset, self._constants, self._truth = preset, constants, truth
        self._inbox: list[SchedulerEvent] = []
        self._armed_at = float("inf")
        self._woken_at, self._woken = -1.0, 0

    def elect(self) -> None:
        """A new leader takes over; what came meanwhile waits for it."""
        self.epoch += 1
        needs_truth = self._preset.needs_truth
        self.core = Scheduler(self._preset, self._constants, self._truth if needs_truth else None)
        self._armed_at = float("inf")
        self.deliver(Elected(epoch=self.epoch))
        waiting, self._inbox = self._inbox, []
        for event in waiting:
            self.deliver(event)

    def die(self, away_s: float) -> None:
        """Without a word; a standby takes over in `away_s`."""
        if self.core is not None:
            self.core = None
            self._world.after(away_s, self.elect)

    def deliver(self, event: SchedulerEvent, extra: Any = None) -> None:
        """An event arrives."""
        core = self.core
        if core is None:
            self._inbox.append(event)
            return
        began = perf_counter()
        commands = core.handle(event, self._world.now)
        self.spent.add(perf_counter() - began)
        self._take(event, commands)

    def _wake(self, armed_at: float) -> None:
        core = self.core
        if core is None or armed_at != self._armed_at:
            return
        now = self._world.now
        deadline = core.deadline()
        if deadline is None or deadline > now:
            self._arm(deadline)
            return
        self._woken = self._woken + 1 if self._woken_at == now else 0
        self._woken_at = now
        assert self._woken < WAKES_MAX, "the core wants to be woken again and again"
        began = perf_counter()
        commands = core.wake(now)
        self.spent.add(perf_counter() - began)
        self._armed_at = float("inf")
        self._take(None, commands)

    def _take(self, event: SchedulerEvent | None, commands: Sequence[SchedulerCommand]) -> None:
        if self.journal is not None:
            self.journal.append(Step(self._world.now, event, commands))
        for command in commands:
            self._carry_out(command)
        assert self.core is not None
        self._arm(self.core.deadline())

    def _arm(self, deadline: float | None) -> None:
        """Wake up then; an earlier wake-up that is armed already looks for itself."""
        if deadline is not None and deadline < self._armed_at:
            self._armed_at = deadline
            self._world.at(deadline, self._wake, deadline)

    def _carry_out(self, command: SchedulerCommand) -> None:
        places, carry = self._places, self._network.carry
        match command:
            case Finished():
                carry(command, places.finished)
            case SchedulerBeat():
                for receiver in [*places.workers.values(), *places.gateways.values()]:
                    carry(command, receiver.receive)
            case PredictionWanted():
                pass  # the simulated estimator has no predictor
            case Recall() | Accepted() | Rejected():
                gateway = places.gateways.get(command.gateway)
                if gateway is not None:
                    carry(command, gateway.receive)
            case _:
                worker = places.workers.get(command.worker)
                if worker is not None:
                    carry(command, worker.receive)
                else:
                    self._world.after(RETURN_S, self._returned, command.worker, self.core)

    def _returned(self, worker: str, core: Scheduler) -> None:
        """The broker could not route an order of this leader."""
        if core is self.core:
            self.deliver(OrderReturned(worker=worker))
