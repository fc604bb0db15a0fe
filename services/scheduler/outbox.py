"""The outbox: commands on their way to the bus, in order for each receiver, many at once.

A publish returns when the broker confirms, after a millisecond or many. Each receiver has a lane
in which one publish follows the other; lanes run side by side, a bounded number at a time. So a
slow confirm delays neither the core nor other receivers.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shared.bus.api import Address, Bus, BusError
from shared.bus.topology import addresses_of
from shared.messages import Finished, PredictionWanted, SchedulerBeat, SchedulerCommand

IN_FLIGHT_MAX = 64
"""Publishes that wait for their confirm at once: enough to fill a broker's pipeline."""
WAITING_MAX = 20_000
"""Above this the inbox is not read on: about 20 s of a broker's work."""
FINISHED_LANES = 8
"""Endings go to one quorum queue, with slow confirms, and need no order among themselves."""
DEADLINE_S = 10.0
"""Then a command counts as failed; the protocol mends what is lost."""

Lane = tuple[Address, int]
OnError = Callable[[SchedulerCommand, BusError], None]


@dataclass(frozen=True, slots=True)
class _Item:
    command: SchedulerCommand
    headers: Mapping[str, str]


class Outbox:
    """Owned by the service; `tasks` run its lanes."""

    def __init__(self, bus: Bus, tasks: asyncio.TaskGroup, on_error: OnError) -> None:
        self._bus = bus
        self._tasks = tasks
        self._on_error = on_error
        self._lanes: dict[Lane, deque[_Item]] = {}
        self._slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._changed = asyncio.Event()
        self._turn = 0
        self.waiting = 0

    @property
    def full(self) -> bool:
        return self.waiting >= WAITING_MAX

    def put(self, command: SchedulerCommand, headers: Mapping[str, str] | None = None) -> None:
        """Send this after everything that was put before for the same receiver. A beat takes the
        place of one that has not gone out yet."""
        for address in addresses_of(command):
            self._turn += isinstance(command, Finished)
            lane = (address, self._turn % FINISHED_LANES if isinstance(command, Finished) else 0)
            queue = self._lanes.get(lane)
            if queue is None:
                queue = self._lanes[lane] = deque()
                self._tasks.create_task(self._run(lane, queue), name=f"outbox:{address}")
            elif isinstance(command, SchedulerBeat) and queue:
                queue.clear()
                self.waiting -= 1
            queue.append(_Item(command, headers or {}))
            self.waiting += 1

    def clear(self) -> None:
        """Forget what has not gone out: a leadership ended."""
        for queue in self._lanes.values():
            self.waiting -= len(queue)
            queue.clear()

    async def wait_for_room(self) -> None:
        """Return once the outbox is not full."""
        while self.full:
            self._changed.clear()
            await self._changed.wait()

    async def drained(self) -> None:
        """Return once everything has gone out."""
        while self._lanes:
            self._changed.clear()
            await self._changed.wait()

    async def _run(self, lane: Lane, queue: deque[_Item]) -> None:
        address = lane[0]
        try:
            while queue:
                async with self._slots:
                    if queue:
                        item = queue.popleft()
                        self.waiting -= 1
                        await self._publish(address, item)
                self._changed.set()
        finally:
            del self._lanes[lane]
            self._changed.set()

    async def _publish(self, address: Address, item: _Item) -> None:
        command = item.command
        try:
            await self._bus.publish(
                address,
                command,
                item.headers,
                deadline_s=DEADLINE_S,
                persistent=isinstance(command, Finished),
                mandatory=not isinstance(command, SchedulerBeat | PredictionWanted),
            )
        except BusError as error:
            self._on_error(command, error)
