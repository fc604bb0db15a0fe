"""Making room: a large request whose client does not stream gives its place up at a slice's end.

Whoever reads a whole answer at its end sees no gap between tokens. So where memory keeps the head
of the line, which has not begun, and it has waited `yield_after_s`, one of those that run and are
not streamed may make room at the end of its slice: the one that will hold most, if that is at
least twice what the head is expected to hold and its own memory is enough for it. It waits like
others then, by the order's own rules, and computes anew what it held, or fetches it from the host's
memory where the engine keeps it there: that is the price. An option: with everything computed anew
means of time to first token fell and those of the whole did not (research notes, section 3.5).
"""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker

ROOMS_MAX = 8
"""Of one request."""
LARGER = 2.0
"""So many times the head's volume."""


def consider(books: Books, workers: list[Worker], now: float) -> None:
    """At most one, of those whose slice ends on one of these workers."""
    after_s = books.constants.yield_after_s
    if after_s <= 0 or books.lines.early or books.parking:
        return
    head = books.lines.central.head(now)
    if head is None or head.output_tokens or head.waits_for != "memory":
        return
    if now - head.arrived_at < after_s:
        return
    least = LARGER * volume(books, head)
    found: Request | None = None
    for worker in workers:
        needed = worker.credit.blocks_for(head, 1)
        for request in worker.credit.wanting.values():
            if not _may(request) or request.blocks < needed:
                continue
            own = volume(books, request)
            if own > least:
                found, least = request, own
    if found is not None:
        found.rooms_made += 1
        found.parked_for = "turn"
        moves.park(books, found, now)


def _may(request: Request) -> bool:
    running = request.state is State.PLACED and not request.paused and request.first_token
    return running and not request.spec.stream and request.rooms_made < ROOMS_MAX


def volume(books: Books, request: Request) -> float:
    """The memory that it is expected to hold, in tokens x steps: see `standing`."""
    left = books.estimates.left_tokens(request)
    return request.input_tokens * left + left * left / 2
