"""The watch: beats that are due, silence of workers and gateways, recalls without an answer."""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.gateway_events import advice, gateway_gone
from services.scheduler.core.predict import predicted_wait_s
from services.scheduler.core.state import State
from services.scheduler.core.worker_events import batch_overdue, worker_lost
from shared.messages import SchedulerBeat


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
    share = books.constants.memory_share
    books.send(
        SchedulerBeat(
            epoch=books.epoch,
            waiting=books.waiting,
            running=books.workers.running_requests(),
            workers=len(usable),
            kv_usage=books.workers.kv_usage(),
            context_tokens_max=min(
                (min(w.info.context_tokens_max, w.budget_tokens(share)) for w in usable), default=0
            ),
            predicted_wait_s=predicted_wait_s(books),
            advice=advice(books),
        )
    )


def watch(books: Books, now: float) -> None:
    """Look for everything that did not happen."""
    constants = books.constants
    books.watch_at = now + constants.watch_s
    books.stirred = True
    for name, worker in list(books.workers.active.items()):
        if now - worker.seen_at > constants.worker_timeout_s:
            worker_lost(books, name, now)
            continue
        for batch in [b for b in worker.batches.values() if now > b.due_at]:
            batch_overdue(books, worker, batch, now)
    for gateway, seen_at in list(books.gateways.items()):
        if now - seen_at > constants.gateway_timeout_s:
            gateway_gone(books, gateway, now, for_good=False)
    _repeat_recalls(books, now)
    books.requests.forget(now)


def _repeat_recalls(books: Books, now: float) -> None:
    repeat_s = books.constants.recall_repeat_s
    recalling = [r for r in books.requests.open.values() if r.state is State.RECALLING]
    for request in recalling:
        if now - request.since < repeat_s * request.recalls:
            continue
        if request.recalls >= books.constants.recalls_max:
            moves.give_up(books, request, "its gateway does not answer recalls", now)
        else:
            moves.say_recall(books, request)
