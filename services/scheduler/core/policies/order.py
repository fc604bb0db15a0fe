"""Order: who is next? A round of closed batches sorts the pool; leased requests wait in a queue.

`ORDERS` are the sorts, `queues.QUEUES` the queues. Both serve lower `priority` first.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from services.scheduler.core.state import Request

Order = Callable[[Sequence[Request]], list[Request]]


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

    def charge(self, request: Request, prefill_tokens: int, decode_tokens: int) -> None:
        """Service that a request has been given, here or after it left. Only `fair` keeps
        accounts; prefill is to be charged at placement, before the next head is asked for."""

    def __len__(self) -> int: ...


def fcfs(waiting: Sequence[Request]) -> list[Request]:
    """First come, first served, by arrival in the mesh: a request that re-enters after a slice
    keeps its place (the papers leave open whether it goes to the tail)."""
    return sorted(waiting, key=lambda r: (r.spec.priority, r.number))


def by_length(waiting: Sequence[Request]) -> list[Request]:
    """Shortest input first: what the dynamic programme needs. Priorities do not count, since the
    round that follows places everybody."""
    return sorted(waiting, key=lambda r: (r.input_tokens, r.number))


ORDERS: dict[str, Order] = {"fcfs": fcfs, "by-length": by_length}
