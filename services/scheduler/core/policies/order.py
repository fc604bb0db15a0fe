"""Order: who is next? The pool of closed policies is sorted; leased requests wait in a queue.

`ORDERS` are the ranks of the pool, `queues.QUEUES` the queues. Both serve lower `priority` first.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from services.scheduler.core.policies.ranks import Claim, Turn
from services.scheduler.core.state import Request

Order = Callable[[Request], int]
"""Lower ranks first; of equal ranks who came first."""


class Queue(Protocol):
    """The waiting requests of one place, in the order of a policy.

    What a request's rank is made of (its input, its predictions) is read when it is pushed: one
    that has changed is to be taken out first and pushed again. Time must not go backwards.
    """

    def push(self, request: Request, now: float) -> None:
        """It waits here; if it did already, it is ranked anew."""

    def remove(self, request: Request) -> None:
        """It does not wait here any more; nothing happens if it did not."""

    def head(self, now: float) -> Request | None:
        """Who is next; it stays."""

    def ordered(self, now: float) -> list[Request]:
        """All of them as they would be served if nobody came: O(n log n), not for every event."""

    def first(self, count: int, now: float) -> list[Request]:
        """The first few of them, the head first."""

    def ahead_tokens(self, request: Request, now: float) -> float | None:
        """Input of those of its priority that are served before this newcomer, which is not in it,
        if nobody else comes; None: of all that wait."""

    def turn_of(self, request: Request, now: float) -> Turn | None:
        """Where this newcomer, which is not in it, would stand, as long as one tenant waits; its
        key counts from now. None: that cannot be told."""

    def turns(self, most: int, now: float) -> list[tuple[Turn, Request]] | None:
        """Where all stand, in order; None: that cannot be told, or they are more than so many."""

    def charge(self, request: Request, prefill_tokens: int, decode_tokens: int) -> None:
        """Service that a request has been given, here or after it left. Only `fair` keeps
        accounts; prefill is to be charged at placement, before the next head is asked for."""

    def given(self, tenant: str) -> float:
        """Weighted service that this tenant was given; 0 where nobody keeps accounts."""

    @property
    def waiting_tenants(self) -> Mapping[str, int]:
        """How many requests of each tenant wait, where accounts are kept."""

    def stand_behind(self, crowd: frozenset[str]) -> None:
        """These tenants come after all others of their priority, where accounts are kept."""

    def weight(self, tenant: str) -> float:
        """Its share beside others'; 0 where nobody keeps accounts."""

    def price(self, tenant: str, prefill_tokens: int, decode_tokens: int) -> float:
        """What so much service adds to what this tenant was given."""

    def lead(self, tenant: str, other: str) -> float:
        """How much more the one was given than the other since both wait; they do."""

    def claim(self) -> Claim | None:
        """The tenant that was given least of those who wait in the most urgent class; exact while
        all are of one class. None: nobody waits there, or nobody keeps accounts."""

    def put_off(self, tenant: str) -> None:
        """Its turn comes after everybody else's of its priority, where accounts are kept."""

    def let_in(self, tenants: Collection[str]) -> None:
        """It does not any more."""

    @property
    def those_put_off(self) -> Collection[str]:
        """Whose turn comes so."""

    def __len__(self) -> int: ...


def fcfs(request: Request) -> int:
    """First come, first served, by arrival in the mesh: a request that re-enters after a slice
    keeps its place (the papers leave open whether it goes to the tail)."""
    return request.spec.priority


def by_length(request: Request) -> int:
    """Shortest input first: what the dynamic programme needs. Priorities do not count, since the
    round that follows places everybody."""
    return request.input_tokens


ORDERS: dict[str, Order] = {"fcfs": fcfs, "by-length": by_length}
