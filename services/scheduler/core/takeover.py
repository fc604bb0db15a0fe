"""Takeover: how a new leader learns what runs, without stopping it.

From its election a leader collects for a moment: gateways send every open request again, workers
list what they hold. Then a request that a worker holds under an attempt which the gateway has not
closed goes on there. All others are recalled, so that no attempt of an earlier leader can stream
beside a new one; workers drop what nobody claims.
"""

from services.scheduler.core import moves
from services.scheduler.core.books import Books, Claim, adopted_batch_id
from services.scheduler.core.draws import Draws
from services.scheduler.core.renewing import margin_tokens
from services.scheduler.core.state import Cause, Request, State
from services.scheduler.core.workers import Batch, Worker
from shared.messages import Drop


def elected(books: Books, epoch: int, now: float) -> None:
    """The first event of a leader. The very first leader of a mesh has nothing to collect."""
    books.epoch = epoch
    books.draws = Draws(epoch)
    books.beat_at = now
    books.watch_at = now + books.constants.watch_s
    if epoch > 1:
        books.collecting_until = now + books.constants.collect_s


def settle(books: Books, now: float) -> None:
    """The collecting is over: claims meet requests."""
    books.collecting_until = None
    claims, books.claims = books.claims, {}
    for request in list(books.requests.open.values()):
        if request.state is not State.COLLECTING:
            continue
        claim = _best(books, request, claims.get(request.request_id, []))
        if claim is None:
            moves.recall(books, request, now)
        else:
            _adopt(books, request, claim, now)
    for request_id, listed in claims.items():
        for claim in listed:
            _drop_unless_adopted(books, request_id, claim)


def _best(books: Books, request: Request, claims: list[Claim]) -> Claim | None:
    """The latest attempt that the gateway still listens to.

    Only one attempt of a request is ever live, and a new one begins after the last has ended or
    was recalled; so the highest open attempt is the live one. Its position may be behind the
    gateway's prefix by what it made between the worker's report and the gateway's: that is no
    reason to stop it. Its result is compared with the prefix when the slice ends.
    """
    live = [c for c in claims if c.attempt > request.closed and c.worker in books.workers.active]
    return max(live, key=lambda claim: claim.attempt, default=None)


def _adopt(books: Books, request: Request, claim: Claim, now: float) -> None:
    worker = books.workers.active[claim.worker]
    constants = books.constants
    if books.leased:
        _adopt_lease(books, worker, request, claim, now)
        return
    estimate_s = books.costs.cost.slice_s(1, request.input_tokens, constants.slice_tokens)
    batch = Batch(
        batch_id=adopted_batch_id(request.request_id),
        request_ids=(request.request_id,),
        estimate_s=estimate_s,
        dispatched_at=now,
        due_at=now + constants.overdue_s + constants.overdue_factor * estimate_s,
    )
    books.give(worker, batch)
    moves.hold(books, request, Cause.CLAIM, claim.worker, batch.batch_id, claim.attempt, now)


def _adopt_lease(books: Books, worker: Worker, request: Request, claim: Claim, now: float) -> None:
    """It goes on there with the lease that it has, which is said again, so that the worker knows
    that we know of it. Where a claim does not say how far the lease reaches: a slice and a margin
    from here."""
    moves.hold(books, request, Cause.CLAIM, claim.worker, "adopted", claim.attempt, now)
    made = max(claim.position, request.output_tokens)
    reach = claim.until or made + books.constants.slice_tokens + margin_tokens(books)
    worker.credit.take(request, min(max(made, reach), request.spec.max_tokens), now)
    books.shares.count(request)
    request.listed = made
    if claim.position > 0:
        worker.credit.prefilled(request, now)
    short = request.until - made <= margin_tokens(books)
    if short and not request.paused and request.until < request.spec.max_tokens:
        worker.credit.wanting[request.request_id] = request
    request.heard_at, request.stood = now, True
    books.reminded[request.request_id] = request
    books.touch(worker)


def _drop_unless_adopted(books: Books, request_id: str, claim: Claim) -> None:
    request = books.requests.open.get(request_id)
    adopted = request is not None and (request.worker, request.attempt) == (
        claim.worker,
        claim.attempt,
    )
    if not adopted and claim.worker in books.workers.active:
        books.send(
            Drop(
                epoch=books.epoch,
                worker=claim.worker,
                request_id=request_id,
                attempt=claim.attempt,
            )
        )
