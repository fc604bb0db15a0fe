"""A broker in virtual time: what docs/protocol.md promises of the bus, and no more.

At least once; in order from one sender to one queue as long as no line breaks; durable queues keep
what is in them, exclusive ones die with their reader's line. A line that breaks loses a random end
of what was under way, and what was not confirmed is said again when it is back: so messages come
twice and out of turn. A mute line (half open) swallows everything both ways until that is noticed.
In a `harsh` broker each message may also be repeated, delayed past others and, where the protocol
mends it, lost.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from shared.messages import Resume, SchedulerBeat, TokensWanted
from sim.network import MENDED
from sim.world import World

HOP_S = 0.001
"""From a sender's line to the reader's."""
UNSETTLED_S = 0.002
"""What a reader was given so lately may not have been settled when it dies: it comes again."""
RECONNECT_S = (0.1, 1.5)
"""Between the loss of a line and the new one: backoff with jitter."""
BACKLOG_MAX = 3_000
"""A hundredth of it is much for these small worlds: more is a message that begets messages."""
INBOX, HISTORY = "inbox", "history"
DURABLE = (INBOX, HISTORY)

LOSABLE = tuple(kind for kind in MENDED if kind not in (Resume, TokensWanted))
"""What a harsh broker loses. The two are what mends: were they lost too, of a durable queue, the
next question would come minutes later."""

Told = Callable[[str], None]
"""Called with `sent`, `unroutable` or `failed`."""


class Reader(Protocol):
    """A process that has a line."""

    name: str
    reads: tuple[str, ...]
    line: "Line"

    def take(self, message: Any) -> None: ...

    def reconnected(self) -> None: ...


@dataclass(slots=True, eq=False)
class Envelope:
    """One sending."""

    queue: str
    message: Any
    told: Told | None
    until: float
    """No new try after this."""
    arrived_at: float | None = None
    lost: bool = False


@dataclass(slots=True)
class Line:
    """One process's connections to the broker."""

    up: bool = True
    mute: bool = False
    """Half open, and neither side has noticed."""
    hears: bool = True
    """The consuming connection is there; the publishing one may outlive it."""
    slow_s: float = 0.0
    flying: deque[Envelope] = field(default_factory=deque)
    """Not confirmed, or only lately."""
    unsent: list[Envelope] = field(default_factory=list)
    last_at: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Queue:
    """One queue; the first reader is the active one."""

    readers: list[Reader] = field(default_factory=list)
    backlog: deque[Any] = field(default_factory=deque)
    given: deque[tuple[float, Any]] = field(default_factory=deque)
    """Handed out lately, or into a mute line: to be given again if the reader's line is lost."""


@dataclass(frozen=True, slots=True)
class Weather:
    """Chances per message of a harsh broker, while the storm lasts."""

    repeat: float = 0.0
    late: float = 0.0
    lose: float = 0.0
    late_s: tuple[float, float] = (0.2, 3.0)


CALM = Weather()


class Broker:
    """See the module's text."""

    def __init__(self, world: World, rng: Random) -> None:
        self.world = world
        self.weather = CALM
        self.epoch = 0
        """The one-message queue: the epoch of the latest leader."""
        self.up = True
        self.queues: dict[str, Queue] = {name: Queue() for name in DURABLE}
        self.longest = 0
        """Backlog ever."""
        self.counts: Counter[str] = Counter()
        self._rng = rng

    # -------------------------------------------------------------------------------- lines

    def connect(self, process: Reader) -> None:
        """Its queues are there, and it reads them."""
        process.line.up = process.line.hears = True
        for name in process.reads:
            queue = self.queues.setdefault(name, Queue())
            if process not in queue.readers:
                queue.readers.append(process)
            self._hand_out(name, queue)

    def cut(self, process: Reader, away_s: float | None = None) -> None:
        """Both sides notice at once; it is back after a while."""
        line = process.line
        if not line.up:
            return
        line.up = line.mute = False
        self._drop_flying(line, again=True)
        self._leave(process)
        wait_s = self._rng.uniform(*RECONNECT_S) if away_s is None else away_s
        self.world.after(wait_s, self._reconnect, process)

    def deafen(self, process: Reader, noticed_s: float) -> None:
        """The broker has closed its consuming connection; it goes on publishing until it notices.
        For a leader: a zombie."""
        if process.line.up and process.line.hears:
            process.line.hears = False
            self._leave(process)
            self.world.after(noticed_s, self.cut, process)

    def silence(self, process: Reader, noticed_s: float) -> None:
        """The line is half open until both sides miss the other's heartbeats."""
        if process.line.up and not process.line.mute:
            process.line.mute = True
            self.world.after(noticed_s, self._heartbeats_missed, process)

    def kill(self, process: Reader, noticed_s: float = 0.0) -> None:
        """The process is gone; with `noticed_s` its host too, so that nobody says so."""
        line = process.line
        self._drop_flying(line, again=False)
        if noticed_s and line.up:
            line.mute = True
            self.world.after(noticed_s, self._bury, process)
        else:
            self._bury(process)

    def restart(self, away_s: float, processes: list[Reader]) -> None:
        """All lines break; exclusive queues are gone, durable ones are as they were."""
        self.up = False
        for process in processes:
            self.cut(process, away_s + self._rng.uniform(*RECONNECT_S))
        self.world.after(away_s, self._back)

    def _back(self) -> None:
        self.up = True

    def _heartbeats_missed(self, process: Reader) -> None:
        if process.line.mute:
            self.cut(process)

    def _bury(self, process: Reader) -> None:
        process.line.up = process.line.mute = False
        process.line.unsent.clear()
        self._leave(process)

    def _leave(self, process: Reader) -> None:
        """The broker gives up on this reader."""
        for name in process.reads:
            queue = self.queues.get(name)
            if queue is None or process not in queue.readers:
                continue
            active = queue.readers[0] is process
            queue.readers.remove(process)
            if name not in DURABLE:
                del self.queues[name]
            elif active:
                self._give_back(queue)
                self._hand_out(name, queue)

    def _give_back(self, queue: Queue) -> None:
        """What was not settled comes again, in front."""
        lately = self.world.now - UNSETTLED_S
        again = [message for at, message in queue.given if at >= lately]
        queue.given.clear()
        self.counts["redelivered"] += len(again)
        queue.backlog.extendleft(reversed(again))

    def _drop_flying(self, line: Line, *, again: bool) -> None:
        """A random end of what is under way is lost; what is not confirmed will be said again."""
        now, losing = self.world.now, False
        for envelope in line.flying:
            at = envelope.arrived_at
            if at is not None and at + HOP_S <= now:
                continue
            if at is None:
                losing = losing or self._rng.random() < 0.5
                envelope.lost = losing
            if again:
                self.counts["said again"] += 1
                line.unsent.append(
                    Envelope(envelope.queue, envelope.message, envelope.told, envelope.until)
                )
                envelope.told = None
        line.flying.clear()

    def _reconnect(self, process: Reader) -> None:
        line = process.line
        if line.up or not getattr(process, "alive", True):
            return
        if not self.up or getattr(process, "frozen", False):
            self.world.after(self._rng.uniform(*RECONNECT_S), self._reconnect, process)
            return
        line.last_at.clear()
        line.slow_s = 0.0
        self.connect(process)
        unsent, line.unsent = line.unsent, []
        for envelope in unsent:
            if envelope.until >= self.world.now:
                self._fly(line, envelope)
            elif envelope.told is not None:
                self.world.after(HOP_S, envelope.told, "failed")
        process.reconnected()

    # ----------------------------------------------------------------------------- messages

    def publish(
        self,
        sender: Reader,
        queue: str,
        message: Any,
        told: Told | None = None,
        patience_s: float = 30.0,
    ) -> None:
        """Send it as soon as the line is there; `told` hears what became of it."""
        line = sender.line
        envelope = Envelope(queue, message, told, self.world.now + patience_s)
        if line.up:
            self._fly(line, envelope)
        else:
            line.unsent.append(envelope)

    def _fly(self, line: Line, envelope: Envelope) -> None:
        flying, now = line.flying, self.world.now
        while flying and flying[0].arrived_at is not None and flying[0].arrived_at + HOP_S <= now:
            flying.popleft()
        flying.append(envelope)
        at = now + HOP_S + line.slow_s
        weather, rng = self.weather, self._rng
        if weather is not CALM:
            at = self._weathered(envelope, at)
        queue = envelope.queue
        at = max(at, line.last_at.get(queue, 0.0))
        if weather is CALM or rng.random() >= weather.late:
            line.last_at[queue] = at
        else:
            self.counts["late"] += 1
            at += rng.uniform(*weather.late_s)
        self.world.at(at, self._arrive, line, envelope)

    def _weathered(self, envelope: Envelope, at: float) -> float:
        weather, rng = self.weather, self._rng
        mended = isinstance(envelope.message, LOSABLE)
        if mended and rng.random() < weather.lose:
            self.counts["lost"] += 1
            envelope.lost = True
            if envelope.told is not None:
                self.world.after(HOP_S, envelope.told, "sent")
                envelope.told = None
        elif rng.random() < weather.repeat:
            self.counts["repeated"] += 1
            twin = Envelope(envelope.queue, envelope.message, None, envelope.until)
            delay_s = rng.choice((0.0, HOP_S, rng.uniform(*weather.late_s)))
            self.world.at(at + delay_s, self._arrive, None, twin)
        return at

    def _arrive(self, line: Line | None, envelope: Envelope) -> None:
        if envelope.lost:
            envelope.arrived_at = self.world.now
            return
        if line is not None and line.mute:
            return  # it stays unconfirmed until the line is noticed to be dead
        if not self.up:
            return
        envelope.arrived_at = self.world.now
        queue = self.queues.get(envelope.queue)
        if envelope.told is not None:
            self.world.after(HOP_S, envelope.told, "unroutable" if queue is None else "sent")
            envelope.told = None
        if queue is None:
            self.counts["unroutable"] += not isinstance(envelope.message, SchedulerBeat)
            return
        queue.backlog.append(envelope.message)
        if len(queue.backlog) > self.longest:
            self.longest = len(queue.backlog)
        if queue.readers:
            self._hand_out(envelope.queue, queue)

    def _hand_out(self, name: str, queue: Queue) -> None:
        """Everything to the active reader; into a mute line it vanishes until that is noticed."""
        while queue.backlog and queue.readers:
            reader = queue.readers[0]
            message = queue.backlog.popleft()
            if name in DURABLE:
                given, now = queue.given, self.world.now
                unsettled = reader.line.mute or getattr(reader, "frozen", False)
                given.append((float("inf") if unsettled else now, message))
                while given and given[0][0] < now - UNSETTLED_S:
                    given.popleft()
            if not reader.line.mute:
                reader.take(message)
