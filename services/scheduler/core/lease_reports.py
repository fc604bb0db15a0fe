"""What a worker reports of a lease: progress, its end, that it was parked.

A report names the tokens since the last one. `resident` means that the request is still there and
goes on while its lease lasts; everything else ends its placement and gives its blocks back.
"""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.renewing import margin_tokens
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker
from shared.messages import SliceResult
from shared.tokens import TOKEN_BYTES


def joined_tokens(known: bytes, result: SliceResult) -> bytes | None:
    """Our copy of a request's output with what is reported; None if the two do not meet, so that
    only the gateway knows what it has."""
    begin, new = result.position * TOKEN_BYTES, result.tokens
    overlap = len(known) - begin
    meets = begin >= 0 and 0 <= overlap <= len(new) and not len(new) % TOKEN_BYTES
    if not meets or known[begin:] != new[:overlap]:
        return None
    return known + new[overlap:]


def take_report(
    books: Books, worker: Worker, request: Request, result: SliceResult, now: float
) -> None:
    """One report of a request that this worker holds."""
    joined = joined_tokens(request.tokens, result)
    if joined is None:
        moves.recall(books, request, now)
        return
    first = not request.first_token and len(result.tokens) > 0
    made = (len(joined) - len(request.tokens)) // TOKEN_BYTES
    passed_s = now - request.heard_at
    if first:
        own = request.backlog_tokens
        books.pace.saw_prefill(request.backlog_ahead, passed_s)
        books.firsts.saw(own, request.backlog_ahead - own, request.beside, passed_s)
        worker.credit.prefilled(request, now)
    else:
        books.pace.saw_tokens(made, passed_s)
        _timed(books, worker, request, made, now)
    if made and not request.tokens:
        books.promises.began(request, now)
    request.tokens, request.heard_at = joined, now
    if first or made:
        request.timed_at, request.lease_seconds = now, worker.credit.count(now)
        request.stood = request.output_tokens >= request.until
    if request.output_tokens > request.until:
        worker.credit.extend(request, request.output_tokens)  # it knows of a longer lease than we
    books.lines.charge(request, worker, 0, made)
    books.shares.count(request)
    books.touch(worker)
    if result.finish_reason is not None and result.finish_reason != "cancelled":
        moves.finish(books, request, result.finish_reason, request.output_tokens, now)
    elif request.remaining_tokens <= 0:
        moves.finish(books, request, "length", request.output_tokens, now)
    elif result.resident:
        _progress(books, worker, request, first=first)
    else:
        _stopped(books, worker, request, result, made, now)


def ended_early(books: Books, request: Request, output_tokens: int, now: float) -> None:
    """Its gateway ended it, and has so many tokens. Whoever is given up for being late would else
    never tell that it was."""
    worker = books.workers.active.get(request.worker)
    if worker is not None and request.state is State.PLACED and request.first_token:
        _timed(books, worker, request, output_tokens - request.output_tokens, now)


def _timed(books: Books, worker: Worker, request: Request, made: int, now: float) -> None:
    """How long so many tokens took, beside those that were here meanwhile."""
    seconds = now - request.timed_at
    beside_s = worker.credit.count(now) - request.lease_seconds
    books.crowding.saw(beside_s, made, seconds)
    if request.stood or made <= 0 or seconds <= 0:
        return
    books.promises.timed(books.token_times.expected_s(beside_s / seconds), seconds / made)
    books.token_times.saw(beside_s, made, seconds, now)


def _progress(books: Books, worker: Worker, request: Request, *, first: bool) -> None:
    """It goes on; with little left of its lease it wants the next."""
    if request.state is not State.PLACED:
        return
    left = request.until - request.output_tokens
    if left <= margin_tokens(books):
        if request.until >= request.spec.max_tokens:
            return  # there is no next lease
        if request.paused:
            return  # its client has to catch up first
        worker.credit.wanting[request.request_id] = request
    elif not first:
        # It reports although much is left by our account: it has not heard of its latest lease.
        books.reminded[request.request_id] = request


def _stopped(
    books: Books, worker: Worker, request: Request, result: SliceResult, made: int, now: float
) -> None:
    """Its KV is freed before its end: parked, evicted by the engine, or the worker is leaving."""
    parked = request.state is State.PARKING
    if parked and request.parked_for and not result.evicted:
        if request.parked_for == "move":  # first in line, though nobody was short of memory
            request.evicted_at = now
    elif result.evicted or (parked and not request.paused and not request.makes_way):
        moves.evicted(books, request, now)
    request.makes_way = False
    request.refusals = 0 if made or parked or result.evicted else request.refusals + 1
    if request.refusals > books.constants.refusals_max:
        detail = result.detail or "its slices make no tokens"
        moves.give_up(books, request, f"given up after {request.refusals} tries: {detail}", now)
    else:
        moves.give_back(books, request, now)
