"""The world: a virtual clock and what is going to happen, in order.

Things that are due at the same moment happen in the order in which they were put down, so one
seed makes one world. The clock jumps from event to event; idle time costs nothing.
"""

import heapq
from collections.abc import Callable
from typing import Any

EVENTS_AT_ONCE_MAX = 1_000_000
"""At one instant; more is a loop without time in it, a bug in whoever keeps asking."""


class World:
    """See the module's text. Seconds, from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """Ever happened."""
        self.stopped = False
        """Set by whoever has seen enough: `run` then returns after the event."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ticks = 0

    def at(self, when: float, action: Callable[..., None], *what: Any) -> None:
        """Call `action(*what)` at `when`, or now if that is past."""
        self._ticks = tick = self._ticks + 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, tick, action, what))

    def after(self, delay_s: float, action: Callable[..., None], *what: Any) -> None:
        """Call `action(*what)` in `delay_s` seconds."""
        self._ticks = tick = self._ticks + 1
        heapq.heappush(self._heap, (self.now + delay_s, tick, action, what))

    def run(self, until: float) -> None:
        """Let everything happen up to and with `until`, or until `stopped` is set."""
        heap, pop = self._heap, heapq.heappop
        events, at_once = self.events, 0
        while heap and heap[0][0] <= until:
            when, _, action, what = pop(heap)
            if when > self.now:
                self.now, at_once = when, 0
            else:
                at_once += 1
                assert at_once < EVENTS_AT_ONCE_MAX, "time stands still"
            events += 1
            action(*what)
            if self.stopped:
                self.events = events
                return
        self.events = events
        if until < float("inf"):
            self.now = max(self.now, until)
