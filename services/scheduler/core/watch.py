"""The watch: beats that are due, silence of workers and gateways, recalls without an answer."""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.gateway_events import gateway_gone
from services.scheduler.core.predict import predicted_wait_s
from services.scheduler.core.readers import park_paused
from services.scheduler.core.refusals import advice
from services.scheduler.core.worker_events import batch_overdue, lease_overdue, worker_lost
from services.scheduler.core.workers import Worker
from shared.messages import SchedulerBeat

LEASES_WATCH_S = 1.0
"""Between two looks at every lease: what they look for is seconds old at the least."""
LEASES_LOOKED_MAX = 4_000
"""In one call, about: some 7 ms. With more leases a round of looks takes several calls."""
PARK_REPEAT_S = 1.0
"""A worker answers within an iteration; after this the order or the answer was lost."""


def notice_stall(books: Books, now: float) -> None:
    """If we ourselves were stopped for a while, the others' beats wait in the inbox: their silence
    is not theirs. Time that we slept through does not count against anybody."""
    if books.called_at is not None:
        slept_s = now - books.called_at - books.constants.watch_s
        if slept_s > books.constants.watch_s:
            for worker in books.workers.active.values():
                worker.seen_at += slept_s
            for gateway in books.gateways:
                books.gateways[gateway] += slept_s
    books.called_at = now


def beat(books: Books, now: float) -> None:
    """Say who leads and how full the mesh is."""
    books.beat_at = now + books.constants.beat_s
    active = [w for w in books.workers.active.values() if not w.draining]
    usable = [worker for worker in active if books.preset.form in worker.info.forms]
    books.send(
        SchedulerBeat(
            epoch=books.epoch,
            waiting=books.waiting,
            running=books.board.running,
            workers=len(usable),
            kv_usage=books.workers.kv_usage(),
            context_tokens_max=min(map(books.holds, usable), default=0),
            predicted_wait_s=predicted_wait_s(books),
            advice=advice(books),
        )
    )


def watch(books: Books, now: float) -> None:
    """Look for everything that did not happen."""
    constants = books.constants
    books.watch_at = now + constants.watch_s
    books.stirred = True
    books.waits.look(now, workers=books.board.taking)
    looked_at = _next_looked_at(books, now)
    books.largest_stale = True  # a worker's memory may have changed
    books.board.set_pace(books.pace.prefill_token_s, books.pace.token_s)
    for name, worker in list(books.workers.active.items()):
        if now - worker.seen_at > constants.worker_timeout_s:
            worker_lost(books, name, now)
            continue
        for batch in [b for b in worker.batches.values() if now > b.due_at]:
            batch_overdue(books, worker, batch, now)
        if name in looked_at:
            park_paused(books, worker, now)
            _leases(books, worker, now)
    for gateway, seen_at in list(books.gateways.items()):
        if now - seen_at > constants.gateway_timeout_s:
            gateway_gone(books, gateway, now, for_good=False)
    _repeat_recalls(books, now)
    _give_up_misfits(books, now)
    books.requests.forget(now)


def _next_looked_at(books: Books, now: float) -> set[str]:
    """Leased: workers whose leases are looked at in this call."""
    if not books.leases_unwatched:
        if not books.leased or now - books.leases_watched_at < LEASES_WATCH_S:
            return set()
        books.leases_watched_at = now
        books.leases_unwatched = list(books.workers.active)
    looked_at: set[str] = set()
    leases = 0
    while books.leases_unwatched and leases < LEASES_LOOKED_MAX:
        name = books.leases_unwatched.pop()
        worker = books.workers.active.get(name)
        leases += len(worker.credit.leases) if worker is not None else 0
        looked_at.add(name)
    return looked_at


def _leases(books: Books, worker: Worker, now: float) -> None:
    """Leases that nobody speaks of, and parks without an answer."""
    constants = books.constants
    token_s = constants.overdue_factor * books.pace.token_s
    for request in list(worker.credit.leases.values()):
        paused = request.request_id in worker.credit.wanting or books.shares.is_resting(request)
        silent_s = now - max(request.heard_at, request.since)
        # Of a lease to the end nothing is heard but its end.
        left = request.until - request.output_tokens
        if not paused and silent_s > constants.overdue_s + token_s * left:
            lease_overdue(books, request, now)
    for request in books.parking.values():
        if request.worker == worker.info.worker and now - request.since > PARK_REPEAT_S:
            moves.say_park(books, request)


def _give_up_misfits(books: Books, now: float) -> None:
    """Leased: requests that no worker there is could ever hold."""
    if not books.leased or not len(books.board.workers):
        return
    largest = max(map(books.holds, books.board.workers))
    for request in list(books.requests.pool.values()):
        overdue = now - request.since > books.constants.misfit_s
        if overdue and request.context_tokens > largest:
            detail = f"no worker can hold {request.context_tokens} tokens any more"
            moves.give_up(books, request, detail, now, reason="too_long")


def _repeat_recalls(books: Books, now: float) -> None:
    repeat_s = books.constants.recall_repeat_s
    for request in list(books.requests.recalling.values()):
        if now - request.since < repeat_s * request.recalls:
            continue
        if request.recalls >= books.constants.recalls_max:
            moves.give_up(books, request, "its gateway does not answer recalls", now)
        else:
            moves.say_recall(books, request)
