"""The world: a virtual clock and what is going to happen, in order.

Things that are due at the same moment happen in the order in which they were put down, so one
seed makes one world. The clock jumps from event to event; idle time costs nothing.
"""

import heapq
from collections.abc import Callable
from typing import Any

EVENTS_AT_ONCE_MAX = 1_000_000
"""At one instant; more is a loop without time in it, a bug in whoever keeps asking."""

Action = Callable[[Any], None]


class World:
    """See the module's text. Seconds, from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """Ever happened."""
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._ticks = 0

    def at(self, when: float, action: Action, what: Any = None) -> None:
        """Call `action(what)` at `when`, or now if that is past."""
        self._ticks = tick = self._ticks + 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, tick, action, what))

    def after(self, delay_s: float, action: Action, what: Any = None) -> None:
        """Call `action(what)` in `delay_s` seconds."""
        self.at(self.now + delay_s, action, what)

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> None:
        """Let everything happen up to and with `until`, or until `stop()` after an event."""
        heap, pop = self._heap, heapq.heappop
        at_once = 0
        while heap and heap[0][0] <= until:
            when, _, action, what = pop(heap)
            if when > self.now:
                self.now, at_once = when, 0
            else:
                at_once += 1
                assert at_once < EVENTS_AT_ONCE_MAX, "time stands still"
            self.events += 1
            action(what)
            if stop is not None and stop():
                return
        if until < float("inf"):
            self.now = max(self.now, until)
