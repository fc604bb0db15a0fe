"""How long running seats wait between two of their tokens, without touching them at every step.

All running seats have the same steps, so one log of steps serves all. Only a seat that has just
begun to run waited for something else: from its own last token to the end of its first step.
"""

from services.worker.core.pretend_parts import GapLog
from services.worker.core.pretend_seats import Jump, Seat, Stage


class Gaps:
    """The log, and who has not run a step yet."""

    def __init__(self) -> None:
        self.stepped_at = 0.0
        """The end of the last decode step."""
        self._log = GapLog()
        self._fresh: list[Seat] = []

    def begins(self, seat: Seat, step: int) -> None:
        """It runs from after this step on. Its `last_at` says when its newest token was there."""
        seat.gap_from, seat.stepped = step, False
        self._fresh.append(seat)

    def stepped(self, jump: Jump, before: int) -> None:
        """A jump with decodes is over; `before`: the steps before it."""
        first, steps = before + 1, jump.steps
        first_end = jump.start + jump.first_s
        first_gap_s = first_end - self.stepped_at
        # The steps' times grow evenly, so the last is as far above the mean as the first below.
        last_s = 2 * (jump.end - jump.start) / steps - jump.first_s
        if steps == 1 or first_gap_s > last_s:
            self._log.add(first, first_gap_s)
        if steps > 1:
            self._log.add(before + steps, last_s)
        for seat in self._fresh:
            if seat.stage is Stage.RUNNING:
                seat.gap_s = max(seat.gap_s, first_end - seat.last_at)
                seat.gap_from, seat.stepped = first, True
        self._fresh.clear()
        self.stepped_at = jump.end

    def longest(self, seat: Seat) -> float:
        """Of a seat since its last report."""
        if not seat.stepped or seat.stage is not Stage.RUNNING:
            return seat.gap_s
        return max(seat.gap_s, self._log.longest_after(seat.gap_from))

    def last_at(self, seat: Seat) -> float:
        """When its newest token was there, as of the last completed jump."""
        return self.stepped_at if seat.stepped and seat.stage is Stage.RUNNING else seat.last_at

    def ends(self, seat: Seat, step: int, *, last: bool) -> None:
        """It runs no more after this step; `last`: nobody does."""
        if seat.stepped:
            seat.gap_s, seat.last_at = self.longest(seat), self.stepped_at
            seat.gap_from = step
        if last:
            self._log.clear()
