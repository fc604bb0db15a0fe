"""The network between services in virtual time: delay, and on bad days repeats, delays and loss.

In calm weather messages between two services arrive in the order in which they were sent, as the
broker promises. Only what the protocol mends by itself may be lost (docs/protocol.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple

from shared.messages import (
    Drop,
    GatewayBeat,
    Message,
    Park,
    Recall,
    Resume,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    TokenBatch,
    TokensWanted,
    WorkerBeat,
    decode,
    encode,
)
from sim.world import World

MENDED = (
    Recall,
    Resume,
    SchedulerBeat,
    GatewayBeat,
    WorkerBeat,
    TokenBatch,
    TokensWanted,
    SendTokens,
    Drop,
    Park,
    RunSlice,
    SliceDone,
)
"""What may be lost without anybody sending it again by itself."""
DELAY_S = 0.001
"""One way, broker included: measured on one machine at low load."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per message until `until_s`, and who dies when."""

    repeat: float = 0.0
    late: float = 0.0
    lose: float = 0.0
    late_s: tuple[float, float] = (0.5, 4.0)
    until_s: float = float("inf")
    worker_losses_s: tuple[float, ...] = ()
    """At each, one worker dies without a word."""
    worker_back_s: float | None = 5.0
    """So much later a new one joins in its place; None: never."""
    leader_losses_s: tuple[float, ...] = ()
    leader_away_s: float = 1.0
    """Until a standby takes over."""

    @property
    def calm(self) -> bool:
        """Messages arrive once and in order."""
        return not (self.repeat or self.late or self.lose)


CALM = Faults()

Moment = Literal["sent", "got"]


class Seen(NamedTuple):
    """One line of the transcript of messages."""

    at: float
    moment: Moment
    message: Message


class Network:
    """Carries messages. `log`: where every sending and every arrival is written down, if wanted."""

    def __init__(
        self,
        world: World,
        rng: Random,
        *,
        delay_s: float = DELAY_S,
        faults: Faults = CALM,
        encoded: bool = False,
        log: list[Seen] | None = None,
    ) -> None:
        """`encoded`: every message passes through its wire format."""
        self.log = log
        self.carried = 0
        self._world = world
        self._rng = rng
        self._delay_s = delay_s
        self._faults = faults
        self._encoded = encoded
        self._plain = faults.calm and not encoded and log is None

    def carry(
        self, message: Message, deliver: Callable[[Any, Any], None], extra: Any = None
    ) -> None:
        """`deliver(message, extra)` when it arrives. `extra` is what a real receiver would see for
        itself: it is not part of the message, and not written down."""
        self.carried += 1
        if self._plain:
            self._world.after(self._delay_s, deliver, message, extra)
            return
        if self.log is not None:
            self.log.append(Seen(self._world.now, "sent", message))
        faults, rng, copies = self._faults, self._rng, 1
        stormy = not faults.calm and self._world.now < faults.until_s
        if stormy:
            if isinstance(message, MENDED) and rng.random() < faults.lose:
                return
            copies += rng.random() < faults.repeat
        for _ in range(copies):
            late = stormy and rng.random() < faults.late
            delay_s = rng.uniform(*faults.late_s) if late else self._delay_s
            copy: Message = decode(encode(message)) if self._encoded else message
            self._world.after(delay_s, self._arrive, copy, deliver, extra)

    def _arrive(self, message: Message, deliver: Callable[[Any, Any], None], extra: Any) -> None:
        if self.log is not None:
            self.log.append(Seen(self._world.now, "got", message))
        deliver(message, extra)
