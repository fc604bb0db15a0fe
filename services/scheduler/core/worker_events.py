"""What workers say, and what follows: slices done, beats, residents, losses."""

from dataclasses import replace

from services.scheduler.core import moves
from services.scheduler.core.books import ATTEMPT_MAX, Books, Claim, adopted_batch_id
from services.scheduler.core.lease_reports import joined_tokens, take_report
from services.scheduler.core.state import HELD, Request, State
from services.scheduler.core.workers import Batch, Worker
from shared import tokens
from shared.messages import Drop, Resident, SliceDone, SliceResult, WorkerBeat

MISSED_BEATS = 2
"""Of ours, that a worker has not heard: it is deaf if others hear them."""
HEARD_SLACK_S = 0.25
"""On a beat's way. All workers beat twice a second: after a stop of our own, what the others last
said is half a second old at most, and thus well above a beat too."""
WORKERS_OWN_REASONS = ("draining", "queue full")
"""Refusals that say nothing about the orders."""


def slice_done(books: Books, event: SliceDone, now: float) -> None:
    """A batch ended. What does not match the books is a repeat, or late: ignored."""
    if event.epoch > books.epoch:
        return  # it follows a newer leader, whose placements are none of ours to end
    worker = books.workers.active.get(event.worker)
    batch = None
    if worker is not None:
        worker.seen_at, worker.memory = now, event.memory
        batch = books.end(worker, event.batch_id)
        books.board.update(worker)
    if books.collecting_until is not None:
        _claims_change(books, event)
    if event.refused:
        _refused(books, event, worker, batch, now)
        return
    if batch is not None:
        books.costs.observe(event.timings)
    for result in event.results:
        if worker is not None and not books.leased:
            books.end(worker, adopted_batch_id(result.request_id))
        request = books.requests.open.get(result.request_id)
        if request is None or not _matches(request, event.worker, result):
            if result.resident and worker is not None and books.collecting_until is None:
                # It holds memory for a placement that is over: our `Drop` was lost.
                _drop(books, event.worker, result.request_id, result.attempt)
            continue
        if books.leased and worker is not None:
            take_report(books, worker, request, result, now)
        else:
            _take_result(books, request, result, now)
    if not books.leased:
        for request in _still_placed(books, batch):
            moves.recall(books, request, now)


def _claims_change(books: Books, event: SliceDone) -> None:
    """What ends while a new leader collects is not held any more, whatever a beat said before. A
    lease that only reports progress goes on from there: it may be used up by now, and says so only
    once."""
    for result in event.results:
        end = result.position + tokens.count(result.tokens)
        kept: list[Claim] = []
        for claim in books.claims.get(result.request_id, ()):
            if (claim.worker, claim.attempt) != (event.worker, result.attempt):
                kept.append(claim)
            elif result.resident:
                kept.append(replace(claim, position=max(claim.position, end)))
        books.claims[result.request_id] = kept


def _matches(request: Request, worker: str, result: SliceResult) -> bool:
    held_there = request.state in HELD and request.worker == worker
    return held_there and request.attempt == result.attempt


def _still_placed(books: Books, batch: Batch | None) -> list[Request]:
    """Requests of an ended batch that no result has moved."""
    if batch is None:
        return []
    found = (books.requests.open.get(request_id) for request_id in batch.request_ids)
    return [r for r in found if r and r.state is State.PLACED and r.batch_id == batch.batch_id]


def _take_result(books: Books, request: Request, result: SliceResult, now: float) -> None:
    joined = joined_tokens(request.tokens, result)
    if joined is None:
        # The slice and our copy do not meet: only the gateway knows what it has.
        moves.recall(books, request, now)
        return
    news = len(joined) > len(request.tokens)
    if news and not request.tokens:
        books.promises.began(request, now)
    request.tokens = joined
    if result.finish_reason is not None and result.finish_reason != "cancelled":
        moves.finish(books, request, result.finish_reason, request.output_tokens, now)
    elif request.remaining_tokens <= 0:
        moves.finish(books, request, "length", request.output_tokens, now)
    else:
        request.refusals = 0 if news else request.refusals + 1
        _again(books, request, result.detail or "its slices make no tokens", now)


def _again(books: Books, request: Request, detail: str, now: float) -> None:
    if request.refusals > books.constants.refusals_max:
        moves.give_up(books, request, f"given up after {request.refusals} tries: {detail}", now)
    else:
        moves.give_back(books, request, now)


def _refused(
    books: Books, event: SliceDone, worker: Worker | None, batch: Batch | None, now: float
) -> None:
    """Nothing of the batch ran: its orders wait again, and the worker gets a short rest. Without
    a batch the worker answers `SendTokens`: it has no such tokens."""
    refused = _still_placed(books, batch)
    if books.leased and worker is not None and event.batch_id:
        leases = worker.credit.leases.values()
        refused = [r for r in leases if r.batch_id == event.batch_id and not r.first_token]
    if worker is not None and (batch is not None or refused):
        worker.cool_until = now + books.constants.cooldown_s
        books.resting[worker.info.worker] = worker
        books.board.update(worker)
    for request in refused:
        request.refusals += event.refused not in WORKERS_OWN_REASONS
        _again(books, request, event.refused, now)
    for result in event.results:
        if not event.batch_id:
            _tokens_gone(books, event.worker, result, now)


def _tokens_gone(books: Books, worker: str, result: SliceResult, now: float) -> None:
    """The gateway misses tokens that their maker no longer has, or an order never arrived: only
    the gateway's prefix is left."""
    requests = books.requests
    request = requests.open.get(result.request_id) or requests.done.get(result.request_id)
    if request is None or request.state in (State.COLLECTING, State.RECALLING):
        return
    if request.spec.gateway not in books.gateways:
        return  # it asked, and is gone meanwhile: nobody misses them
    made = ((placement.worker, placement.attempt) for placement in request.placements)
    if (worker, result.attempt) not in made:
        return
    holder, batch_id = books.workers.active.get(request.worker), request.batch_id
    moves.recall(books, request, now)
    batch = holder.batches.get(batch_id) if holder is not None else None
    if holder is not None and batch is not None and request.attempt == result.attempt:
        _forget_empty(books, holder, batch)


def worker_beat(books: Books, event: WorkerBeat, now: float) -> None:
    """It lives; it may be new, or leave, or list what it holds."""
    name = event.info.worker
    if event.leaving:
        books.stirred = True
        if name in books.workers.active:
            worker_lost(books, name, now)
            books.workers_lost -= 1
        books.workers.lost.pop(name, None)
        return
    if _is_deaf(books, event):
        worker_lost(books, name, now)
        return
    worker = books.workers.active.get(name)
    if worker is None and not _same_model(books, event, now):
        return
    news = worker is None or worker.draining != event.draining
    books.stirred |= news or event.residents_listed
    if worker is None:
        worker = Worker(info=event.info, memory=event.memory, seen_at=now)
        if not books.workers.active:
            books.beat_at = now  # gateways that turned clients away want to know at once
        books.workers.active[name] = worker
        worker.credit.block_tokens = max(1, event.info.kv_block_tokens)
        books.board.join(worker)
        for request_id, attempt in books.workers.lost.pop(name, ()):
            _drop(books, name, request_id, attempt)
    worker.info, worker.memory, worker.seen_at = event.info, event.memory, now
    worker.draining, worker.heard_s = event.draining, event.heard_s
    if news:
        books.board.update(worker)
        books.largest_stale = books.lines.stirred = True
        books.touch(worker)
        _empty_line(books, worker, now)
    if event.residents_listed:
        _listed(books, worker, event.residents, now)


def _is_deaf(books: Books, beat: WorkerBeat) -> bool:
    """It speaks but hears nothing, by a line that is dead one way: its leases cannot be renewed.
    Where nobody hears us, it is our own line, or we were stopped ourselves."""
    silent_s = max(books.constants.worker_timeout_s, MISSED_BEATS * books.constants.beat_s)
    if beat.epoch != books.epoch or beat.heard_s <= silent_s:
        return False
    lately_s = books.constants.beat_s + HEARD_SLACK_S
    name = beat.info.worker
    others = (w for other, w in books.workers.active.items() if other != name)
    return any(0.0 < other.heard_s <= lately_s for other in others)


def _same_model(books: Books, event: WorkerBeat, now: float) -> bool:
    """Whether a new worker belongs to this mesh. The first one decides the model; requests for
    another, left from before, cannot be served any more."""
    model = event.info.model
    if books.workers.active and books.workers.model != model:
        books.workers.foreign = (event.info.name, model)
        return False
    books.workers.foreign = None
    if not books.workers.active:
        for request in list(books.requests.pool.values()):
            if request.spec.model != model:
                detail = f"this mesh serves {model!r} now"
                moves.give_up(books, request, detail, now, reason="unknown_model")
    return True


def _listed(books: Books, worker: Worker, residents: tuple[Resident, ...], now: float) -> None:
    """Compare what it holds with what we think it holds."""
    name = worker.info.worker
    if books.collecting_until is not None:
        for resident in residents:
            if not 0 < resident.attempt < ATTEMPT_MAX:
                continue
            claim = Claim(name, resident.attempt, resident.position, resident.until)
            claims = books.claims.setdefault(resident.request_id, [])
            if claim not in claims:
                claims.append(claim)
        return
    held = {(resident.request_id, resident.attempt) for resident in residents}
    for resident in residents:
        if not _known_there(books, name, resident):
            _drop(books, name, resident.request_id, resident.attempt)
    for batch in list(worker.batches.values()):
        if now - batch.dispatched_at >= books.constants.lost_order_s:
            _check_batch(books, worker, batch, held, now)
    for resident in residents:
        _compare_lease(books, worker, resident)
    for request in list(worker.credit.leases.values()):
        old = now - request.since >= books.constants.lost_order_s
        if old and (request.request_id, request.attempt) not in held:
            moves.recall(books, request, now)


def _compare_lease(books: Books, worker: Worker, resident: Resident) -> None:
    """A renewal, or the report that asks for one, may have been lost on its way."""
    request = worker.credit.leases.get(resident.request_id)
    if request is None or request.attempt != resident.attempt or not resident.until:
        return
    if resident.until < request.until:
        books.reminded[request.request_id] = request
        books.touch(worker)
    elif request.paused:
        pass  # it rests there until its client has caught up
    elif resident.position >= resident.until and request.state is State.PLACED:
        # Should tokens be missing too, its next report does not meet ours, and it is recalled.
        request.listed = resident.position
        worker.credit.wanting[request.request_id] = request
        books.touch(worker)


def _known_there(books: Books, worker: str, resident: Resident) -> bool:
    """Placed there. What has ended is not: its worker lists it because a `Drop` was lost."""
    request = books.requests.open.get(resident.request_id)
    if request is None:
        return False
    return (request.worker, request.attempt) == (worker, resident.attempt)


def _check_batch(
    books: Books, worker: Worker, batch: Batch, held: set[tuple[str, int]], now: float
) -> None:
    """An order that the worker does not hold was lost on its way. Or its answer was, and all its
    requests have ended or gone elsewhere meanwhile."""
    placed = _still_placed(books, batch)
    missing = [r for r in placed if (r.request_id, r.attempt) not in held]
    for request in missing:
        moves.recall(books, request, now)
    here = {request_id for request_id, _ in held}
    if missing or here.isdisjoint(batch.request_ids):
        _forget_empty(books, worker, batch)


def _forget_empty(books: Books, worker: Worker, batch: Batch) -> None:
    """A lost order's batch is over once nobody is left in it."""
    if not _still_placed(books, batch):
        books.end(worker, batch.batch_id)


def worker_lost(books: Books, name: str, now: float) -> None:
    """It is gone: all that was placed there is recalled, and whoever misses tokens that it was
    asked for just now."""
    worker = books.workers.active.pop(name, None)
    if worker is None:
        return
    books.workers_lost += 1
    books.board.leave(name)
    books.homes.gone(name)
    books.largest_stale = True
    worker.draining = True
    _empty_line(books, worker, now)
    placed = _placed_on(books, worker)
    running = tuple((request.request_id, request.attempt) for request in placed)
    books.workers.remember_lost(name, running)
    for request in placed:
        moves.recall(books, request, now)
    for request_id in worker.asked:
        _unanswered(books, request_id, now)


def _unanswered(books: Books, request_id: str, now: float) -> None:
    """Its gateway misses tokens, and who was asked for them is gone. If they came after all, it
    answers with tokens that are ahead of ours, or with a `Cancel`."""
    request = books.requests.open.get(request_id) or books.requests.done.get(request_id)
    if request is None or not request.asks or request.state is State.COLLECTING:
        return
    if request.spec.gateway in books.gateways:
        moves.recall(books, request, now)


def _placed_on(books: Books, worker: Worker) -> list[Request]:
    """What this worker has, in order of arrival in the mesh."""
    if books.leased:
        placed = list(worker.credit.leases.values())
    else:
        batches = worker.batches.values()
        listed = (r for batch in batches for r in map(books.requests.open.get, batch.request_ids))
        placed = [r for r in listed if r is not None and r.worker == worker.info.worker]
    return sorted({r.number: r for r in placed}.values(), key=lambda r: r.number)


def _empty_line(books: Books, worker: Worker, now: float) -> None:
    """Who waits for a worker that takes nobody any more is to be bound anew."""
    if worker.draining and worker.line is not None:
        for request in worker.line.ordered(now):
            moves.unbind(books, request, now)
        books.stirred = True


def lease_overdue(books: Books, request: Request, now: float) -> None:
    """Its worker lives but has not spoken of it for too long: an order or a report was lost."""
    moves.recall(books, request, now)


def batch_overdue(books: Books, worker: Worker, batch: Batch, now: float) -> None:
    """It should have ended long ago: its orders were lost on the way."""
    books.end(worker, batch.batch_id)
    for request in _still_placed(books, batch):
        moves.recall(books, request, now)


def _drop(books: Books, worker: str, request_id: str, attempt: int) -> None:
    books.send(Drop(epoch=books.epoch, worker=worker, request_id=request_id, attempt=attempt))
