"""What gateways say, and what follows: submit, resume, cancel, stopped, tokens wanted, beats."""

from services.scheduler.core import foretelling, moves, readers
from services.scheduler.core.books import ATTEMPT_MAX, Books
from services.scheduler.core.lease_reports import ended_early
from services.scheduler.core.predict import predict_output
from services.scheduler.core.refusals import refusal
from services.scheduler.core.state import Placement, Request, State
from shared import tokens
from shared.messages import (
    Accepted,
    Cancel,
    GatewayBeat,
    Reading,
    Recall,
    Resume,
    SendTokens,
    Stopped,
    Submit,
    TokensWanted,
)


def heard(books: Books, gateway: str, now: float) -> None:
    """It lives. If it had been given up, what it still has open is asked for again."""
    known = gateway in books.gateways
    books.gateways[gateway] = now
    if known:
        return
    orphans = [r for r in books.requests.done.values() if r.orphaned]
    for request in orphans:
        if request.spec.gateway == gateway:
            request.orphaned = False
            moves.recall(books, request, now)


def submit(books: Books, event: Submit, now: float) -> None:
    heard(books, event.spec.gateway, now)
    if books.requests.known(event.spec.request_id):
        return
    answer, expected = refusal(books, event.spec, now)
    if answer is not None:
        books.requests.refuse(event.spec.request_id, answer, now)
        books.send(answer)
        return
    request = books.requests.open_new(event.spec)
    alone_s = expected.alone_start_s
    books.promises.made(request, expected.start_s, expected.finish_s, alone_s)
    request.predicted_output = expected.output_tokens
    predict_output(books, request)
    if event.told:
        books.send(
            Accepted(
                epoch=books.epoch,
                gateway=event.spec.gateway,
                request_id=event.spec.request_id,
                start_s=expected.start_s,
                finish_s=expected.finish_s,
                output_tokens=expected.output_tokens,
            )
        )
    moves.admit(books, request, now)
    foretelling.ask(books, request)


def resume(books: Books, event: Resume, now: float) -> None:
    """The truth about one request. Stale repeats are told by their attempt."""
    heard(books, event.spec.gateway, now)
    if not 0 <= event.attempt < ATTEMPT_MAX or len(event.tokens) % tokens.TOKEN_BYTES:
        return
    request = books.requests.of_gateway(event.spec.request_id, event.spec.gateway)
    if request is None:
        if not books.requests.known(event.spec.request_id):
            _open_resumed(books, event, now)
        return
    if request.state is State.DONE:
        return
    _take_reading(books, request, event, now)
    if request.state is State.COLLECTING:
        if tokens.count(event.tokens) >= request.output_tokens:
            moves.resume(books, request, event.attempt, event.tokens, now)
        return
    if request.state is State.RECALLING:
        if event.attempt >= request.recall_attempt:
            _take_truth(books, request, event, now)
        return
    if event.attempt < books.attempt_base > request.closed:
        # Its Submit came to us after the collecting, perhaps for the second time, and an earlier
        # leader's attempt may still stream: only a recall closes that one.
        moves.recall(books, request, now)
    elif event.attempt >= request.attempt > 0:
        _take_truth(books, request, event, now)


def _take_reading(books: Books, request: Request, event: Resume, now: float) -> None:
    if event.turn > request.reading_turn:
        request.reading_turn = event.turn
        readers.set_paused(books, request, now, paused=event.paused)


def _open_resumed(books: Books, event: Resume, now: float) -> None:
    request = books.requests.open_new(event.spec)
    _take_reading(books, request, event, now)
    moves.admit(books, request, now)
    if request.state is State.COLLECTING:
        moves.resume(books, request, event.attempt, event.tokens, now)
    elif event.attempt >= books.attempt_base:
        _take_truth(books, request, event, now)
    else:
        moves.recall(books, request, now)


def _take_truth(books: Books, request: Request, event: Resume, now: float) -> None:
    moves.resume(books, request, event.attempt, event.tokens, now)
    if request.remaining_tokens <= 0:
        moves.finish(books, request, "length", request.output_tokens, now)


def cancel(books: Books, event: Cancel, now: float) -> None:
    heard(books, event.gateway, now)
    request = books.requests.of_gateway(event.request_id, event.gateway)
    if request is None:
        if not books.requests.known(event.request_id):
            books.requests.refuse(event.request_id, None, now)
    elif request.state is not State.DONE:
        ended_early(books, request, event.output_tokens, now)
        moves.drop_placed(books, request)
        told = min(event.output_tokens, request.spec.max_tokens)
        moves.finish(books, request, "cancelled", max(request.output_tokens, told), now)


def stopped(books: Books, event: Stopped, now: float) -> None:
    heard(books, event.gateway, now)
    request = books.requests.of_gateway(event.request_id, event.gateway)
    if request is not None and request.state is not State.DONE:
        ended_early(books, request, event.output_tokens, now)
        moves.drop_placed(books, request)
        moves.finish(books, request, "stop", event.output_tokens, now)


def gateway_beat(books: Books, event: GatewayBeat, now: float) -> None:
    if event.leaving:
        gateway_gone(books, event.gateway, now, for_good=True)
    else:
        heard(books, event.gateway, now)


def gateway_gone(books: Books, gateway: str, now: float, *, for_good: bool) -> None:
    """Its clients' connections are gone; nobody waits for its requests."""
    books.gateways.pop(gateway, None)
    for request in [r for r in books.requests.open.values() if r.spec.gateway == gateway]:
        moves.drop_placed(books, request)
        moves.finish(books, request, "cancelled", request.output_tokens, now)
        request.orphaned = not for_good


def reading(books: Books, event: Reading, now: float) -> None:
    """How its client keeps up with a stream."""
    heard(books, event.gateway, now)
    readers.reading(books, event, now)


def tokens_wanted(books: Books, event: TokensWanted, now: float) -> None:
    """Pass the question to the worker that made those tokens, or ask for the truth."""
    heard(books, event.gateway, now)
    request = books.requests.of_gateway(event.request_id, event.gateway)
    if request is None:
        _wanted_unknown(books, event)
        return
    # Nobody asks for what a slow reader has to wait for: the word that it caught up was lost.
    readers.set_paused(books, request, now, paused=False)
    if request.state in (State.COLLECTING, State.RECALLING):
        return
    if request.state is State.WAITING and event.position == request.output_tokens:
        return
    maker = _maker(request, event.position)
    exists = request.state is not State.PLACED or event.position < request.output_tokens
    if exists and event.position == request.asked_position:
        request.asks += 1
    elif exists:
        request.asks, request.asked_position = 1, event.position
    worker = books.workers.active.get(maker.worker) if maker is not None else None
    patient = not exists or request.asks <= books.constants.asks_max
    if maker is None or worker is None or not patient:
        moves.recall(books, request, now)
        return
    worker.ask(request.request_id, now)
    books.send(
        SendTokens(
            epoch=books.epoch,
            worker=maker.worker,
            request_id=request.request_id,
            attempt=maker.attempt,
            position=event.position,
        )
    )


def _wanted_unknown(books: Books, event: TokensWanted) -> None:
    """Rejected before (the answer again), or from another leader's time (the truth, please)."""
    if event.request_id in books.requests.refused:
        answer = books.requests.refused[event.request_id][1]
        if answer is not None and answer.gateway == event.gateway:
            books.send(answer)
        return
    if books.collecting_until is not None or event.request_id in books.requests.open:
        return
    if not 0 <= event.attempt < ATTEMPT_MAX:
        return
    books.send(
        Recall(
            epoch=books.epoch,
            gateway=event.gateway,
            request_id=event.request_id,
            attempt=max(event.attempt, books.attempt_base),
        )
    )


def _maker(request: Request, position: int) -> Placement | None:
    """The placement whose slice has this output position; None if it is not remembered."""
    for placement in reversed(request.placements):
        if placement.position <= position:
            return placement
    return None
