"""The simulated engine's time: how it waits, and how it is woken."""

import threading
import time
from typing import Protocol

TICK_S = 0.02
"""Tokens are told this often at least; a gateway's reader does not see the difference."""


class Clock(Protocol):
    """The engine's time, in seconds of the profile."""

    tick_s: float
    """The longest that a step may take without need."""

    def now(self) -> float: ...

    def wait_until(self, at: float) -> None:
        """Return then, or when interrupted."""

    def interrupt(self) -> None:
        """From any thread: the present or the next wait returns at once."""


class WallClock:
    """Real time, `speed` times faster."""

    def __init__(self, speed: float) -> None:
        self.tick_s = TICK_S * speed
        self._speed = speed
        self._interrupted = threading.Event()

    def now(self) -> float:
        return time.monotonic() * self._speed

    def wait_until(self, at: float) -> None:
        self._interrupted.wait(max(0.0, (at - self.now()) / self._speed))
        self._interrupted.clear()

    def interrupt(self) -> None:
        self._interrupted.set()


class AgendaClock:
    """Real time, `speed` times faster, for an engine whose owner calls it when it is time: nothing
    waits here."""

    def __init__(self, speed: float, tick_s: float) -> None:
        """`tick_s`: how often the owner can call, in real seconds."""
        self.tick_s = tick_s * speed
        self._speed = speed

    def now(self) -> float:
        return time.monotonic() * self._speed

    def real_s(self, at: float) -> float:
        """A time of this clock on the monotonic one."""
        return at / self._speed

    def wait_until(self, at: float) -> None:
        """It is time already, or the owner did not mind."""

    def interrupt(self) -> None:
        """Nobody waits."""
