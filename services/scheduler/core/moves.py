"""Moves: the few things that can be done with one request, each with all that it entails."""

from typing import Literal

from services.scheduler.core import reasons
from services.scheduler.core.books import Books
from services.scheduler.core.state import HELD, Cause, Placement, Request, State
from services.scheduler.core.workers import Worker
from shared.messages import Drop, Finished, FinishReason, Park, Recall, Rejected


def _move(
    books: Books, request: Request, cause: Cause, now: float, tokens: bytes | None = None
) -> None:
    """Change its state (and its tokens), and keep lines and credits right: the one place where
    they change."""
    before, worker = request.state, books.workers.active.get(request.worker)
    if before is State.WAITING and not request.paused:
        placed, workers = cause is Cause.PLACE, books.board.taking
        books.waits.left(request, now, placed=placed, workers=workers)
        _out_of_line(books, request)
    if tokens is not None:
        request.tokens = tokens
    books.requests.move(request, cause, now)
    if request.state in HELD and before not in HELD:
        books.shares.took(request.spec.tenant)
    elif before in HELD and request.state not in HELD:
        books.shares.gave_back(request.spec.tenant)
    if request.state is State.WAITING:
        reasons.begins_to_wait(request, cause, now)
    if before is State.PLACED:
        books.shares.goes_on(request)
    if before is State.PARKING and request.state is not State.PARKING:
        books.parking.pop(request.request_id, None)
        request.parked_for = ""
    if before in HELD and request.state not in HELD and worker is not None:
        worker.credit.release(request, now, parking=before is State.PARKING)
        books.touch(worker)
    if before in HELD and request.state not in HELD:
        books.shares.count(request)
    if request.state is State.WAITING and not request.paused:
        _into_line(books, request, now)
        books.waits.joined(request, now, workers=books.board.taking)


def _out_of_line(books: Books, request: Request) -> None:
    if not books.leased:
        books.shelf.remove(request)
    else:
        worker = books.lines.remove(request)
        if worker is not None:
            books.board.update(worker)


def _into_line(books: Books, request: Request, now: float) -> None:
    """Leased: with early binding back to the worker that it was bound to, if that is there."""
    if not books.leased:
        books.shelf.push(request)
        return
    worker = books.workers.active.get(request.bound) if request.bound else None
    if worker is not None and worker.draining:
        worker = None
    books.lines.push(request, worker, now)
    if books.lines.central.waiting_tenants.get(request.spec.tenant) == 1:
        books.shares.begins_to_wait(request.spec.tenant)
    if worker is not None:
        books.touch(worker)


def pause_waiting(books: Books, request: Request, now: float, *, paused: bool) -> None:
    """Its client reads slowly, or has caught up: out of its line, or into it again."""
    request.paused = paused
    reasons.waits(request, "reader" if paused else "turn")
    if paused:
        books.waits.left(request, now, placed=False, workers=books.board.taking)
        _out_of_line(books, request)
    else:
        _into_line(books, request, now)
        books.waits.joined(request, now, workers=books.board.taking)
        books.want_round(now)


def bind(books: Books, request: Request, worker: Worker, now: float) -> None:
    """Early binding: it waits for this worker from now on."""
    books.lines.remove(request)
    request.bound = worker.info.worker
    books.lines.push(request, worker, now)
    books.touch(worker)


def unbind(books: Books, request: Request, now: float) -> None:
    """Its worker is gone or leaving: to be bound anew."""
    books.lines.remove(request)
    request.bound = ""
    books.lines.push(request, None, now)


def admit(books: Books, request: Request, now: float) -> None:
    """It is new: into the pool, or, while a new leader collects, to those in question."""
    collecting = books.collecting_until is not None
    request.arrived_at = now
    _weigh(books, request)
    _move(books, request, Cause.COLLECT if collecting else Cause.ADMIT, now)
    if not collecting:
        books.want_round(now + books.constants.gather_s)


def _weigh(books: Books, request: Request) -> None:
    """Its expected volume goes into the mean, for orders that ask how large a request is."""
    if books.leased and books.preset.order == "volume":
        left, held = books.estimates.left_tokens(request), request.input_tokens
        books.margin.saw_volume(held * left + left * left / 2)


def evicted(books: Books, request: Request, now: float) -> None:
    """It lost its place for want of memory."""
    request.evicted_at = now
    request.evictions += 1
    books.evictions += 1
    margin, constants = books.margin, books.constants
    return_s = books.pace.prefill_s(request.input_tokens)
    margin.saw_eviction(constants, margin.target(constants, books.board.taking), return_s)


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
    _move(books, request, cause, now)
    request.makes_way = False
    request.attempt, request.worker, request.batch_id = attempt, worker, batch_id
    request.placements.append(Placement(request.output_tokens, worker, attempt))


def give_back(books: Books, request: Request, now: float) -> None:
    """Its slice ended, or was refused: into the pool again."""
    _move(books, request, Cause.GIVE_BACK, now)
    books.want_round(now)


def recall(books: Books, request: Request, now: float) -> None:
    """Nobody here knows its output for certain: stop the worker and ask the gateway."""
    drop_placed(books, request)
    request.recall_attempt = max(request.attempt, request.closed, books.attempt_base)
    request.recalls = 0
    request.asks = 0
    _move(books, request, Cause.RECALL, now)
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
    """The gateway's word: so many tokens, and all attempts up to this one are closed. What it has
    closed stays closed, whatever an older word says that comes late."""
    drop_placed(books, request)
    request.closed = max(request.closed, attempt)
    request.attempt = max(request.attempt, attempt)
    request.asks = 0
    _move(books, request, Cause.RESUME, now, tokens)
    if request.state is State.WAITING:
        books.want_round(now)


def finish(
    books: Books, request: Request, reason: FinishReason, output_tokens: int, now: float
) -> None:
    """It ended. The estimator hears of it once, even if it is opened again for a lost tail."""
    _move(books, request, Cause.FINISH, now)
    if request.published:
        return
    request.published = True
    spec = request.spec
    if output_tokens > 0 and reason != "error":
        books.outputs.saw(request.prompt_tokens, output_tokens, cut=reason != "stop")
    books.explorer.ended(spec.request_id, kept=_in_time(request, reason, now))
    if reason in ("stop", "length"):
        books.promises.ended(request, now)
        books.calibration.ended(request.predicted_quantiles, output_tokens)
        margin, constants = books.margin, books.constants
        margin.saw_finish(constants, margin.target(constants, books.board.taking), now)
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
            predicted_output_tokens=request.predicted_tokens or None,
            reason=reason,
        )
    )


def _in_time(request: Request, reason: FinishReason, now: float) -> bool:
    """It is complete, and ended as soon as its client wanted."""
    limit_ms = request.spec.deadline_ms
    in_time = limit_ms is None or now - request.arrived_at <= limit_ms / 1000
    return reason in ("stop", "length") and in_time


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


def park(books: Books, request: Request, now: float) -> None:
    """Its worker shall end its lease and free its memory; it waits again once that is done."""
    worker = books.workers.active[request.worker]
    _move(books, request, Cause.PARK, now)
    worker.credit.park(request)
    books.parking[request.request_id] = request
    say_park(books, request)


def _parked_for(request: Request) -> Literal["memory", "reader", "share", "move", "turn"]:
    if request.paused:
        return "reader"
    if request.makes_way:
        return "share"
    return request.parked_for or "memory"


def say_park(books: Books, request: Request) -> None:
    """The order itself; repeated until it is answered."""
    books.send(
        Park(
            epoch=books.epoch,
            worker=request.worker,
            request_id=request.request_id,
            attempt=request.attempt,
            reason=_parked_for(request),
        )
    )


def drop_placed(books: Books, request: Request) -> None:
    """If a living worker has it, that worker is told to stop."""
    if request.state in HELD and request.worker in books.workers.active:
        books.send(
            Drop(
                epoch=books.epoch,
                worker=request.worker,
                request_id=request.request_id,
                attempt=request.attempt,
            )
        )
