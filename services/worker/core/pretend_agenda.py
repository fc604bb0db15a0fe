"""What running seats will report next: a heap under the engine's steps."""

import heapq
from collections.abc import Iterator

from services.worker.core.pretend_seats import Seat, Stage


class Agenda:
    """One entry counts for each seat: the one at its `event_step`. Older ones are passed over."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Seat]] = []
        self._ticks = 0

    def put(self, seat: Seat, step: int) -> None:
        """It has something to report at this step, and not where it had before."""
        if step != seat.event_step:
            seat.event_step = step
            self._ticks += 1
            heapq.heappush(self._heap, (step, self._ticks, seat))

    def next_step(self) -> int:
        """The first step at which a running seat has something to report. There is one."""
        while True:
            step, _, seat = self._heap[0]
            if seat.event_step == step and seat.stage is Stage.RUNNING:
                return step
            heapq.heappop(self._heap)

    def due(self, step: int) -> Iterator[Seat]:
        """Take out the seats whose step has come."""
        heap = self._heap
        while heap and heap[0][0] <= step:
            at, _, seat = heapq.heappop(heap)
            if seat.event_step == at and seat.stage is Stage.RUNNING:
                yield seat
