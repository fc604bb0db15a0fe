"""Readers: who reads slowly pauses at the end of its lease, so that nobody buffers without end.

The gateway says when a client falls behind and when it has caught up. In between its request gets
no new lease: what its lease still covers is made, then it rests on its worker, and after
`PAUSED_KEEP_S` it parks there, so that its memory goes to others. A parked or waiting request of a
slow reader stands in no line. Nothing is lost: it goes on from its tokens.
"""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.renewing import margin_tokens
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker
from shared.messages import Reading

PAUSED_KEEP_S = 2.0
"""Its KV is kept so long after its lease is used up: many readers stop only for a moment, and
coming back costs a prefill [T]."""


def reading(books: Books, event: Reading, now: float) -> None:
    """Its client fell behind, or caught up. Late and repeated words are told by their turn."""
    request = books.requests.of_gateway(event.request_id, event.gateway)
    if request is None or request.state is State.DONE or event.turn <= request.reading_turn:
        return
    request.reading_turn = event.turn
    set_paused(books, request, now, paused=event.paused)


def set_paused(books: Books, request: Request, now: float, *, paused: bool) -> None:
    """From now on it gets no lease, or leases again."""
    if request.paused == paused:
        return
    if request.state is State.WAITING:
        moves.pause_waiting(books, request, now, paused=paused)
        return
    request.paused = paused
    worker = books.workers.active.get(request.worker)
    if request.state is not State.PLACED or not books.leased or worker is None:
        return
    if paused:
        worker.credit.wanting.pop(request.request_id, None)
    elif request.until < min(
        request.output_tokens + margin_tokens(books) + 1, request.spec.max_tokens
    ):
        worker.credit.wanting[request.request_id] = request
    books.touch(worker)


def park_paused(books: Books, worker: Worker, now: float) -> None:
    """Those that have rested for long enough."""
    for request in list(worker.credit.leases.values()):
        rests = request.paused and request.state is State.PLACED
        used_up = request.until <= request.output_tokens
        if rests and used_up and now - request.heard_at > PAUSED_KEEP_S:
            moves.park(books, request, now)
