"""Arrivals: Poisson visits to a mesh in real time, and what is sampled meanwhile."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from bench.crowd import Crowd, Visit

TICK_S = 0.02


@dataclass(slots=True)
class Arrivals:
    """Sends visits at a rate until told to end; `later` holds those that come back."""

    crowd: Crowd
    rng: Random
    make: Callable[[], Visit]
    behind_s_max: float = 0.0
    """How late a visit came at worst; more than a little says that this process was too slow."""
    later: list[tuple[float, Visit]] = field(default_factory=list)

    def run(
        self, rate: float, seconds: float, every_s: float, sample: Callable[[], None]
    ) -> tuple[float, float]:
        """`rate` visits a second for so long, `sample` called every so often; returns when it began
        and ended (monotonic)."""
        began = now = time.monotonic()
        end, next_at, sample_at = began + seconds, began, began
        while now < end:
            while next_at <= now:
                self.behind_s_max = max(self.behind_s_max, now - next_at)
                if rate <= 0:
                    next_at = end
                    break
                self.crowd.send(self.make())
                next_at += self.rng.expovariate(rate)
            self._come_back(now)
            if now >= sample_at:
                sample_at += every_s
                sample()
            self.crowd.look(min(TICK_S, next_at - now, end - now))
            now = time.monotonic()
        return began, now

    def drain(self, longest_s: float, every_s: float, sample: Callable[[], None]) -> int:
        """Nobody comes any more; how many were still there after so long."""
        self.later.clear()
        end = time.monotonic() + longest_s
        while len(self.crowd) and time.monotonic() < end:
            left = min(every_s, max(0.0, end - time.monotonic()))
            until = time.monotonic() + left
            while len(self.crowd) and time.monotonic() < until:
                self.crowd.look(TICK_S)
            sample()
        left_over = len(self.crowd)
        self.crowd.hang_up()
        return left_over

    def _come_back(self, now: float) -> None:
        due = [visit for at, visit in self.later if at <= now]
        if due:
            self.later[:] = [(at, visit) for at, visit in self.later if at > now]
            for visit in due:
                self.crowd.send(visit)
