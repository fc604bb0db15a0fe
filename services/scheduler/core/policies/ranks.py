"""Ranks: a queue's classes. Lower `priority` first; in it, who lost its place for want of memory.

Within a rank a lane keeps the order. A rank that empties is dropped with its lane, so clients that
think of many priorities leave nothing behind.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from services.scheduler.core.policies.lanes import Key, Lane, Sorted
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request

Rank = tuple[int, bool, bool]
"""(priority, not a victim, late): the least is served first. Only `volume` looks at lateness."""
Turn = tuple[Rank, float]
"""A place in an order: the rank, and in it the least key first."""


class Claim(NamedTuple):
    """A tenant that waits and was given least of all that do, in the most urgent class."""

    tenant: str
    priority: int
    head: Request | None
    """Its next request; None: it came back from a worker without memory, and goes first."""


def _latest_victim_first(request: Request) -> Key:
    """As vLLM pushes them to the front one by one, the last admitted first [C]: the latest to be
    evicted leads, and of those evicted at once the earliest arrival."""
    return (-request.evicted_at,)


class Ranked:
    """A queue whose order within a rank is that of the lanes it is given."""

    def __init__(self, lane: Callable[[], Lane], constants: Constants) -> None:
        self._lane = lane
        self._victims_first = constants.victims_first
        self._lanes: dict[Rank, Lane] = {}
        self._ranks: list[Rank] = []
        self._home: dict[str, Rank] = {}

    def push(self, request: Request, now: float) -> None:
        rank = self._rank(request, now)
        victim = not rank[1]
        if self._home.get(request.request_id, rank) != rank:
            self._take_out(request)
        if rank not in self._lanes:
            self._lanes[rank] = Sorted(_latest_victim_first) if victim else self._lane()
            insort(self._ranks, rank)
        self._home[request.request_id] = rank
        self._lanes[rank].push(request)

    def remove(self, request: Request) -> None:
        self._take_out(request)

    def _take_out(self, request: Request) -> None:
        """Of its rank. Whoever only changes ranks has not left the queue."""
        rank = self._home.pop(request.request_id, None)
        if rank is None:
            return
        lane = self._lanes[rank]
        lane.remove(request)
        if not lane:
            del self._lanes[rank]
            del self._ranks[bisect_left(self._ranks, rank)]

    def head(self, now: float) -> Request | None:
        return self._lanes[self._ranks[0]].head(now) if self._ranks else None

    def ordered(self, now: float) -> list[Request]:
        return [request for rank in self._ranks for request in self._lanes[rank].ordered(now)]

    def first(self, count: int, now: float) -> list[Request]:
        """The first few, the head first; O(n log n)."""
        return self.ordered(now)[:count]

    def ahead_tokens(self, request: Request, now: float) -> float | None:
        """All of its priority."""
        return None

    def turn_of(self, request: Request, now: float) -> Turn | None:
        """Not told."""
        return None

    def turns(self, most: int, now: float) -> list[tuple[Turn, Request]] | None:
        """Not told."""
        return None

    def charge(self, request: Request, prefill_tokens: int, decode_tokens: int) -> None:
        """Nobody keeps accounts."""

    def given(self, tenant: str) -> float:
        """Nobody keeps accounts."""
        return 0.0

    @property
    def waiting_tenants(self) -> Mapping[str, int]:
        """How many requests of each tenant wait; nothing where nobody keeps accounts."""
        return {}

    def stand_behind(self, crowd: frozenset[str]) -> None:
        """These tenants come after all others of their priority, where accounts are kept."""

    def weight(self, tenant: str) -> float:
        """Nobody keeps accounts."""
        return 0.0

    def lead(self, tenant: str, other: str) -> float:
        """Nobody keeps accounts."""
        return 0.0

    def price(self, tenant: str, prefill_tokens: int, decode_tokens: int) -> float:
        """Nobody keeps accounts."""
        return 0.0

    def claim(self) -> Claim | None:
        """Nobody keeps accounts."""
        return None

    def put_off(self, tenant: str) -> None:
        """Its turn comes after all others', where accounts are kept."""

    def let_in(self, tenants: Collection[str]) -> None:
        """Not any more."""

    @property
    def those_put_off(self) -> Collection[str]:
        """Whose turn comes after all others'."""
        return ()

    def _rank(self, request: Request, now: float) -> Rank:
        victim = self._victims_first and request.evicted_at > 0
        return (request.spec.priority, not victim, False)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._home

    def __len__(self) -> int:
        return len(self._home)
