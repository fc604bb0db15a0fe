"""Draining a worker from outside: who is there, the order to leave, and the wait until it has left.

An onlooker needs no service of its own: it hears the beats that workers send to the scheduler. The
order goes out in answer to a beat, with the epoch that the beat names, again with every beat that
does not say yet that its worker drains. So a new leader in between does no harm, and the onlooker
never passes for one.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from shared.bus.api import Bus, Delivery, Unroutable
from shared.bus.identity import new_id, public_id
from shared.bus.topology import addresses_of, from_worker, onlooker_queue
from shared.config import SetupError
from shared.messages import DrainWorker, SchedulerBeat, WorkerBeat, WorkerBeats

CALL_S_MIN = 1.2
"""Whoever beats twice a second has spoken by then."""
CALL_S_MAX = 5.0
"""Then we go on with who was heard, even if the leader counts more workers, or none speaks."""
SILENCE_S = 3.0
"""After so long without a beat we ask the broker whether the worker's queue is still there. The
scheduler has given it up by then."""
PUBLISH_S = 10.0
NAMED_MAX = 20
"""Workers that a message to people names."""


class UnknownWorker(SetupError):
    """The name says no worker, or several; the text lists those that are there."""


class Ending(Enum):
    """How the wait ended."""

    LEFT = auto()
    """It said goodbye: nothing ran there any more."""
    VANISHED = auto()
    """Its queue is gone without a goodbye."""
    STAYS = auto()
    """The time is over; the order stands."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known of a worker that is to leave."""

    worker: str
    """Its public id."""
    draining: bool
    requests: int
    """As it last listed them, every ten seconds."""
    kv_tokens: int
    """In use, by its last beat."""


class Roll:
    """Who beats: each worker's last word, and the leader's. A handler of deliveries."""

    def __init__(self) -> None:
        self.beats: dict[str, WorkerBeat] = {}
        """The last of each worker, by its id."""
        self.leader: SchedulerBeat | None = None
        self._residents: dict[str, int] = {}
        self._changed = asyncio.Event()

    async def on_delivery(self, delivery: Delivery) -> None:
        """A beat; all else that workers say is passed over."""
        match delivery.message:
            case SchedulerBeat():
                self.leader = delivery.message
            case WorkerBeat() as beat if _said_by(delivery, beat.info.worker):
                self._note(beat)
            case WorkerBeats() as said if _said_by(delivery, said.host):
                for beat in said.beats:
                    self._note(beat)
            case _:
                return
        self._changed.set()

    async def called(self, *, least_s: float = CALL_S_MIN, most_s: float = CALL_S_MAX) -> None:
        """Wait until everybody has spoken whom the leader counts."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while (waited_s := loop.time() - begin) < most_s:
            complete = self.leader is not None and len(self.beats) >= self.leader.workers
            if complete and waited_s >= least_s:
                return
            await self.changed(least_s - waited_s if complete else most_s - waited_s)

    async def changed(self, timeout_s: float) -> None:
        """Wait for a beat of anybody since the last call, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._changed.wait()
        self._changed.clear()

    def find(self, wanted: str) -> str:
        """The id of the one worker of that name, or whose id begins so. Raises UnknownWorker."""
        there = {w: beat for w, beat in self.beats.items() if not beat.leaving}
        named = [w for w, beat in there.items() if wanted in (beat.info.name, w, public_id(w))]
        found = named or [w for w in there if wanted and w.startswith(wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownWorker(
                f"{wanted!r} are several workers: {self._listed(found)}; give more of the id"
            )
        if not there:
            raise UnknownWorker(
                f"there is no worker {wanted!r}: none has spoken within {CALL_S_MAX:g} s; "
                "is this the mesh's broker and virtual host?"
            )
        raise UnknownWorker(f"there is no worker {wanted!r}; there are {self._listed([*there])}")

    def progress(self, worker: str) -> Progress:
        """Of one that was heard."""
        beat = self.beats[worker]
        requests = self._residents.get(worker, 0)
        return Progress(public_id(worker), beat.draining, requests, beat.memory.kv_tokens_used)

    def warnings(self, worker: str) -> list[str]:
        """Why the requests of this worker might not go on at once."""
        others = [
            each
            for each, beat in self.beats.items()
            if each != worker and not beat.draining and not beat.leaving
        ]
        told = []
        if self.leader is None:
            told.append("no scheduler speaks: requests stay where they are until one does")
        if not others:
            told.append("there is no other worker: its requests wait until one joins")
        return told

    def _note(self, beat: WorkerBeat) -> None:
        self.beats[beat.info.worker] = beat
        if beat.residents_listed:
            self._residents[beat.info.worker] = len(beat.residents)

    def _listed(self, workers: list[str]) -> str:
        texts = [
            public_id(w) + (" (drains already)" if self.beats[w].draining else "")
            for w in sorted(workers)
        ]
        more = len(texts) - NAMED_MAX
        return ", ".join(texts[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


async def listen(bus: Bus) -> Roll:
    """The roll call of a mesh, complete as far as can be known. Raises BusUnavailable."""
    roll = Roll()
    await bus.consume(onlooker_queue(new_id("drain")), roll.on_delivery)
    await roll.called()
    return roll


async def drain(
    bus: Bus, roll: Roll, worker: str, timeout_s: float, tell: Callable[[Progress], None]
) -> Ending:
    """Order the worker to leave and wait, at most so long, until it has. `tell` is called with
    each of its beats. Raises BusError if the order does not get to the broker."""
    loop = asyncio.get_running_loop()
    over = loop.time() + timeout_s
    answered: WorkerBeat | None = None
    heard_at = loop.time()
    while True:
        beat = roll.beats[worker]
        if beat is not answered:
            answered, heard_at = beat, loop.time()
            tell(roll.progress(worker))
            if beat.leaving:
                return Ending.LEFT
            if not beat.draining:
                await _order(bus, beat)
        elif loop.time() >= heard_at + SILENCE_S:
            heard_at = loop.time()
            if not await _order(bus, beat):
                return Ending.VANISHED
        if loop.time() >= over:
            return Ending.STAYS
        await roll.changed(min(over, heard_at + SILENCE_S) - loop.time())


async def _order(bus: Bus, beat: WorkerBeat) -> bool:
    """False if the worker's queue is not there; that of one that just reconnects is soon again."""
    order = DrainWorker(epoch=beat.epoch, worker=beat.info.worker)
    try:
        await bus.publish(addresses_of(order)[0], order, deadline_s=PUBLISH_S, persistent=False)
    except Unroutable:
        return False
    return True


def _said_by(delivery: Delivery, worker: str) -> bool:
    """The broker lets nobody else publish under this key."""
    return delivery.routing_key == from_worker(worker).routing_key
