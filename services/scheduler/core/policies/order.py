"""Order: who is next? Each answer sorts the waiting requests; priority classes come first."""

from collections.abc import Callable, Sequence

from services.scheduler.core.state import Request

Order = Callable[[Sequence[Request]], list[Request]]


def fcfs(waiting: Sequence[Request]) -> list[Request]:
    """First come, first served, by arrival in the mesh: a request that re-enters after a slice
    keeps its place (the papers leave open whether it goes to the tail)."""
    return sorted(waiting, key=lambda r: (r.spec.priority, r.number))


def by_length(waiting: Sequence[Request]) -> list[Request]:
    """Shortest input first: what the dynamic programme needs. Priorities do not count, since the
    round that follows places everybody."""
    return sorted(waiting, key=lambda r: (r.input_tokens, r.number))


ORDERS: dict[str, Order] = {"fcfs": fcfs, "by-length": by_length}
