"""The seats of a pretend worker that are to be prefilled, in order of arrival."""

from collections import deque
from collections.abc import Iterator

from services.worker.core.pretend_blocks import BlockPool
from services.worker.core.pretend_seats import Seat

Chunks = list[tuple[Seat, int]]
"""Prefill of one iteration: who, and how many tokens."""


class PrefillLine:
    """Late seats sit one iteration out: it was composed before they came."""

    def __init__(self, pool: BlockPool) -> None:
        self.cached_tokens = 0
        """Found in the prefix cache, in all."""
        self._pool = pool
        self._seats: deque[Seat] = deque()
        self._late: list[Seat] = []

    def __len__(self) -> int:
        return len(self._seats)

    def add(self, seat: Seat, *, late: bool) -> None:
        self._seats.append(seat)
        if late:
            seat.late = True
            self._late.append(seat)

    def remove(self, seat: Seat) -> None:
        """It leaves before its prefill is over, if it is here."""
        if seat in self._seats:
            self._seats.remove(seat)

    def chunks(self, room: int) -> Chunks:
        """What an iteration with room for so many tokens prefills. Who gets its first chunk finds
        what is left of its KV."""
        chunks = []
        for seat in self._seats:
            if room <= 0 or seat.late:
                break
            if seat.cached < 0:
                seat.cached = seat.filled = self._pool.find(seat)
                self.cached_tokens += seat.cached
            tokens = min(seat.input_tokens - seat.filled, room)
            chunks.append((seat, tokens))
            room -= tokens
        return chunks

    @property
    def has_late(self) -> bool:
        return bool(self._late)

    def admit_late(self) -> None:
        """The iteration that they missed is under way: they are like the others."""
        for seat in self._late:
            seat.late = False
        self._late.clear()

    def over(self) -> Iterator[Seat]:
        """Take out those whose prefill is over."""
        seats = self._seats
        while seats and seats[0].filled >= seats[0].input_tokens:
            yield seats.popleft()
