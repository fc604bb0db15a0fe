"""Moves: the few things that can be done with one request, each with all that it entails."""

from typing import Literal

from services.scheduler.core.books import Books
from services.scheduler.core.state import Cause, Placement, Request, State
from shared.messages import Drop, Finished, FinishReason, Recall, Rejected


def admit(books: Books, request: Request, now: float) -> None:
    """It is new: into the pool, or, while a new leader collects, to those in question."""
    collecting = books.collecting_until is not None
    books.requests.move(request, Cause.COLLECT if collecting else Cause.ADMIT, now)
    if not collecting:
        books.want_round(now + books.constants.gather_s)


def place(books: Books, request: Request, worker: str, batch_id: str, now: float) -> None:
    """A new attempt, on this worker."""
    attempt = max(request.attempt, request.closed, books.attempt_base) + 1
    hold(books, request, Cause.PLACE, worker, batch_id, attempt, now)


def hold(
    books: Books,
    request: Request,
    cause: Cause,
    worker: str,
    batch_id: str,
    attempt: int,
    now: float,
) -> None:
    """It is on this worker under this attempt, newly placed or found there after a takeover."""
    books.requests.move(request, cause, now)
    request.attempt, request.worker, request.batch_id = attempt, worker, batch_id
    request.placements.append(Placement(request.output_tokens, worker, attempt))


def give_back(books: Books, request: Request, now: float) -> None:
    """Its slice ended, or was refused: into the pool again."""
    books.requests.move(request, Cause.GIVE_BACK, now)
    books.want_round(now)


def recall(books: Books, request: Request, now: float) -> None:
    """Nobody here knows its output for certain: stop the worker and ask the gateway."""
    drop_placed(books, request)
    request.recall_attempt = max(request.attempt, request.closed, books.attempt_base)
    request.recalls = 0
    request.asks = 0
    books.requests.move(request, Cause.RECALL, now)
    say_recall(books, request)


def say_recall(books: Books, request: Request) -> None:
    """The question itself; repeated until it is answered."""
    request.recalls += 1
    books.send(
        Recall(
            epoch=books.epoch,
            gateway=request.spec.gateway,
            request_id=request.request_id,
            attempt=request.recall_attempt,
        )
    )


def resume(books: Books, request: Request, attempt: int, tokens: bytes, now: float) -> None:
    """The gateway's word: so many tokens, and all attempts up to this one are closed."""
    drop_placed(books, request)
    request.closed = attempt
    request.attempt = max(request.attempt, attempt)
    request.tokens = tokens
    request.asks = 0
    books.requests.move(request, Cause.RESUME, now)
    if request.state is State.WAITING:
        books.want_round(now)


def finish(
    books: Books, request: Request, reason: FinishReason, output_tokens: int, now: float
) -> None:
    """It ended. The estimator hears of it once, even if it is opened again for a lost tail."""
    books.requests.move(request, Cause.FINISH, now)
    if request.published:
        return
    request.published = True
    spec = request.spec
    books.send(
        Finished(
            epoch=books.epoch,
            request_id=spec.request_id,
            model=spec.model,
            endpoint=spec.endpoint,
            tenant=spec.tenant,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
            max_tokens=spec.max_tokens,
            reason=reason,
        )
    )


def give_up(
    books: Books,
    request: Request,
    detail: str,
    now: float,
    reason: Literal["no_worker", "too_long", "unknown_model"] = "no_worker",
) -> None:
    """It cannot be served; its gateway is told so."""
    answer = Rejected(
        epoch=books.epoch,
        gateway=request.spec.gateway,
        request_id=request.request_id,
        reason=reason,
        detail=detail,
    )
    drop_placed(books, request)
    books.send(answer)
    finish(books, request, "error", request.output_tokens, now)


def drop_placed(books: Books, request: Request) -> None:
    """If a living worker has it, that worker is told to stop."""
    if request.state is State.PLACED and request.worker in books.workers.active:
        books.send(
            Drop(
                epoch=books.epoch,
                worker=request.worker,
                request_id=request.request_id,
                attempt=request.attempt,
            )
        )
