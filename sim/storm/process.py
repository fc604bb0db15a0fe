"""A process in virtual time: it has a clock of its own, may be stopped and go on, and may die."""

from typing import Any

from sim.storm.broker import Broker, Line, Told
from sim.world import World

HAIR_S = 1e-7


class Process:
    """What all services have in common; each has a core of its own beside."""

    def __init__(self, world: World, broker: Broker, name: str, reads: tuple[str, ...]) -> None:
        self.world, self.broker = world, broker
        self.name = name
        self.reads = reads
        self.line = Line()
        self.alive = True
        self.frozen = False
        self.ahead_s = 0.0
        """How far its monotonic clock is before the world's; jumps are forward only."""
        self._least = 0.0
        """Its clock never shows less: sums of floats may fall short of a deadline by a hair."""
        self._socket: list[Any] = []
        """Delivered while it was stopped."""
        self._armed_at = float("inf")
        """Of the world's clock."""

    def now(self) -> float:
        """By its own clock."""
        return max(self.world.now + self.ahead_s, self._least)

    # ------------------------------------------------------------------------ what a service does

    def handle(self, message: Any) -> None:
        """A delivery."""
        raise NotImplementedError

    def wake(self) -> None:
        """Its deadline came."""
        raise NotImplementedError

    def deadline(self) -> float | None:
        """By its own clock."""
        raise NotImplementedError

    def reconnected(self) -> None:
        """Its line is back, and its exclusive queues are empty."""

    # ------------------------------------------------------------------------------------- wires

    def connect(self) -> None:
        self.broker.connect(self)
        self.arm()

    def say(self, queue: str, message: Any, told: Told | None = None, patience: float = 30) -> None:
        self.broker.publish(self, queue, message, told, patience)

    def take(self, message: Any) -> None:
        """A delivery arrives at the process; if it is stopped, in its socket."""
        if not self.alive:
            return
        if self.frozen:
            self._socket.append(message)
        else:
            self.handle(message)
            self.arm()

    def arm(self) -> None:
        """Be woken at the core's deadline; an earlier alarm that is set looks for itself."""
        deadline = self.deadline() if self.alive else None
        if deadline is not None:
            at = max(self.world.now, deadline - self.ahead_s)
            if at < self._armed_at:
                self._armed_at = at
                self.world.at(at, self._alarm, at)

    def _alarm(self, at: float) -> None:
        if at != self._armed_at:
            return
        self._armed_at = float("inf")
        if self.alive and not self.frozen:
            deadline = self.deadline()
            if deadline is not None and deadline <= self.now() + HAIR_S:
                self._least = max(self._least, deadline)
                self.wake()
            self.arm()

    # -------------------------------------------------------------------------------- misfortune

    def die(self, noticed_s: float = 0.0) -> None:
        """At once and without a word (kill -9); with `noticed_s` its host goes too."""
        if self.alive:
            self.alive = False
            self.broker.kill(self, noticed_s)

    def freeze(self) -> None:
        """SIGSTOP, or a hang."""
        self.frozen = True

    def thaw(self) -> None:
        """It goes on, and does not know how long it was away."""
        if not (self.alive and self.frozen):
            return
        self.frozen = False
        socket, self._socket = self._socket, []
        for message in socket:
            self.take(message)
        self._armed_at = float("inf")
        self.arm()

    def jump(self, seconds: float) -> None:
        """Its clock is suddenly later."""
        self.ahead_s += seconds
        self._armed_at = float("inf")
        self.arm()
