"""Levels: the multi-level feedback queue. Who has been served long lets others pass.

FastServe's skip-join [C, as the research note reads it], adapted to leases [T]. The quantum of
level q is `mlfq_quantum_s` x 2^q. A request joins the first level whose quantum covers its prefill
and sinks when its service (that prefill, and its output at the present time per token) has used up
its quanta from there on. Levels are first in, first out. After `mlfq_idle_s` without service it
counts as the last of the first level; FastServe moves it there and starts anew, here that holds
for one placement. A lease longer than a level's quantum makes this coarser than FastServe, which
looks again at every iteration.
"""

from collections.abc import Callable

from services.scheduler.core.policies.estimates import Estimates
from services.scheduler.core.policies.lanes import Sorted, waiting_since
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request


def level(request: Request, constants: Constants, estimates: Estimates) -> int:
    """Where its service has brought it: 0 is served first."""
    last = max(1, constants.mlfq_levels) - 1
    quantum_s, prefill_s = constants.mlfq_quantum_s, estimates.prefill_s(request)
    place = 0
    while place < last and quantum_s < prefill_s:
        place, quantum_s = place + 1, 2 * quantum_s
    left_s = prefill_s + request.output_tokens * estimates.token_s() - quantum_s
    while place < last and left_s > 0:
        place, quantum_s = place + 1, 2 * quantum_s
        left_s -= quantum_s
    return place


class Levels:
    """A lane of levels. Within one the longest wait leads, so only the heads can be next, whether
    or not they have waited long enough to count as of the first level: O(levels)."""

    def __init__(self, level_of: Callable[[Request], int], idle_s: float) -> None:
        self._level_of = level_of
        self._idle_s = idle_s
        self._levels: dict[int, Sorted] = {}
        self._home: dict[str, int] = {}

    def push(self, request: Request) -> None:
        self.remove(request)
        place = self._home[request.request_id] = self._level_of(request)
        if place not in self._levels:
            self._levels[place] = Sorted(lambda r: (waiting_since(r),))
        self._levels[place].push(request)

    def remove(self, request: Request) -> None:
        place = self._home.pop(request.request_id, None)
        if place is not None:
            self._levels[place].remove(request)

    def head(self, now: float) -> Request | None:
        heads = [
            (self._key(request, place, now), request)
            for place, lane in self._levels.items()
            if (request := lane.head(now)) is not None
        ]
        return min(heads, key=lambda pair: pair[0])[1] if heads else None

    def ordered(self, now: float) -> list[Request]:
        keyed = [
            (self._key(request, place, now), request)
            for place, lane in self._levels.items()
            for request in lane.ordered(now)
        ]
        return [request for _, request in sorted(keyed, key=lambda pair: pair[0])]

    def __len__(self) -> int:
        return len(self._home)

    def _key(self, request: Request, place: int, now: float) -> tuple[int, float, int]:
        since = waiting_since(request)
        if place > 0 and now - since >= self._idle_s:
            return 0, since + self._idle_s, request.number
        return place, since, request.number
