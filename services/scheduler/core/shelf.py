"""The shelf: the pool of a closed policy, kept in the orders that its rounds ask for.

A policy that gives work to every worker as it falls idle makes a thousand small rounds a second;
sorting ten thousand requests for each would cost more than all else. A sorted list with a binary
search and one shift of memory is quick enough up to some 100,000 requests.
"""

from bisect import bisect_left, insort

from services.scheduler.core.policies.order import ORDERS
from services.scheduler.core.state import Request


class Shelf:
    """Every open closed request in state WAITING is here, ranked as it was when it was pushed."""

    def __init__(self, order: str, *, by_length: bool) -> None:
        """`order` is one of ORDERS; `by_length`: rounds also want the requests by input length."""
        self._rank = ORDERS[order]
        self.requests: dict[int, Request] = {}
        """By number."""
        self.order: list[tuple[int, int]] = []
        """(rank, number) in the policy's order."""
        self.lengths: list[tuple[int, int]] = []
        """(input tokens, number), ascending; empty if nobody asks for it."""
        self._by_length = by_length and order != "by-length"
        if by_length and order == "by-length":
            self.lengths = self.order
        self._ranks: dict[int, tuple[int, int]] = {}
        """Number to (rank, input tokens) when it was pushed."""

    def __len__(self) -> int:
        return len(self.order)

    def push(self, request: Request) -> None:
        """It waits."""
        number, rank, length = request.number, self._rank(request), request.input_tokens
        assert number not in self.requests
        self.requests[number] = request
        self._ranks[number] = (rank, length)
        insort(self.order, (rank, number))
        if self._by_length:
            insort(self.lengths, (length, number))

    def remove(self, request: Request) -> None:
        """It does not wait any more."""
        number = request.number
        del self.requests[number]
        rank, length = self._ranks.pop(number)
        del self.order[bisect_left(self.order, (rank, number))]
        if self._by_length:
            del self.lengths[bisect_left(self.lengths, (length, number))]
