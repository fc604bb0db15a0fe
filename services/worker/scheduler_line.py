"""What the worker says to the scheduler: one message after the other, results never lost.

Results, and beats that list what is here, are sent again until the broker has them. Any other beat
only says how things are now: the latest waits, and one that fails is dropped.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from shared.bus.api import Bus, BusError
from shared.bus.topology import from_worker
from shared.messages import SliceDone, WorkerBeat, WorkerBeats

Said = SliceDone | WorkerBeat | WorkerBeats

WAITING_MAX = 1_000
"""Messages that wait for a broker. Long before, the scheduler has given this worker up; beyond it
the oldest go."""
RESULT_DEADLINE_S = 30.0
BEAT_DEADLINE_S = 1.0
RETRY_S = 0.5
FLUSH_S = 10.0
"""A leaving worker waits this long for its last words to be taken."""


class SchedulerLine:
    """See the module's text."""

    def __init__(
        self,
        bus: Bus,
        boot_id: str,
        log: structlog.stdlib.BoundLogger,
        on_error: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._boot_id = boot_id
        self._log = log
        self._on_error = on_error
        self._waiting: deque[Said] = deque()
        self._stirred = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def put_result(self, done: SliceDone) -> None:
        """Behind everything that waits."""
        self._put(done)

    def put_beat(self, beat: WorkerBeat) -> None:
        """Behind everything that waits, in place of an earlier beat; but one that lists what is
        here keeps its place among the results, since it is true only there."""
        for waiting in self._waiting:
            if isinstance(waiting, WorkerBeat) and not waiting.residents_listed:
                self._waiting.remove(waiting)
                break
        self._put(beat)

    def put_beats(self, beats: WorkerBeats) -> None:
        """Behind everything that waits. They take nobody's place: unless they list what is held,
        say them while the line is `idle`."""
        self._put(beats)

    @property
    def idle(self) -> bool:
        """Everything is sent."""
        return self._idle.is_set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while self._waiting:
                message = self._waiting.popleft()
                if not await self._send(message):
                    self._waiting.appendleft(message)
                    await asyncio.sleep(RETRY_S)
            self._idle.set()

    async def flush(self) -> None:
        """Wait until everything is sent, within a limit."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._idle.wait()
        except TimeoutError:
            self._on_error("not_flushed")

    def _put(self, message: Said) -> None:
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self._on_error("result_dropped")
        self._waiting.append(message)
        self._idle.clear()
        self._stirred.set()

    async def _send(self, message: Said) -> bool:
        """False if it has to be tried again."""
        result = isinstance(message, SliceDone)
        worker = message.worker if isinstance(message, SliceDone) else self._boot_id
        precious = result or _lists(message)
        try:
            await self._bus.publish(
                from_worker(worker),
                message,
                deadline_s=RESULT_DEADLINE_S if result else BEAT_DEADLINE_S,
                persistent=result,
                mandatory=result,
            )
        except BusError as error:
            self._on_error("result_not_sent" if result else "beat_not_sent")
            self._log.warning("worker.not_sent", message=type(message).__name__, error=str(error))
            return not precious
        return True


def _lists(message: Said) -> bool:
    """Whether it says what is held."""
    match message:
        case WorkerBeats():
            return any(beat.residents_listed for beat in message.beats)
        case WorkerBeat():
            return message.residents_listed
        case _:
            return False
