"""Refusals: which new requests are not taken in, and when to come again.

Theory of operation. Three kinds of refusal pass by themselves. The queue is *full*: by number, or
because its wait is above `wait_max_s`. Then the door closes until a good part of the queue has gone
(`reopen_share` of it is left, or `closed_max_s` of work was done), and the time until then is what
everybody is told: it can be foretold, since nothing joins meanwhile; a door that opened for each
place that falls vacant could promise nobody anything. And a *deadline* that would be missed: who
is refused for it hears how long one that names no deadline would wait for its first token; where a
mean rate says little, from rehearsals (rehearsing.py). If it would be missed without any queue too,
trying again does not help, and that is said. What is known of times and lengths comes from those
who were let in: so an empty mesh that has heard nothing for a while lets one in to find out, and
now and then so is one whose output is thought too long (exploring.py).
"""

import msgspec

from services.scheduler.core.books import Books
from services.scheduler.core.predict import (
    Prediction,
    drained_s,
    newcomer_of,
    predict,
    predicted_wait_s,
)
from services.scheduler.core.rehearsing import (
    blended_s,
    note_comer,
    rehearsed_start_s,
    start_within_s,
)
from shared import tokens
from shared.messages import Rejected, RequestSpec

RETRY_MIN_S = 0.1
UNPROVEN_S = 5.0
"""An empty mesh of which nothing was heard for so long lets somebody in to find out."""
UNPROVEN_LEAST = 0.05
"""Of what is expected, after so long; half of that after twice as long. Who allows less is not the
one."""


def refusal(books: Books, spec: RequestSpec, now: float) -> tuple[Rejected | None, Prediction]:
    """Why a new request is not taken in, None if it is; and what was predicted for it."""
    prediction = predict(books, spec, now)
    answer = _never(books, spec)
    if answer is None:
        _note(books, spec, prediction, now)
        answer = _full(books, spec, prediction, now) or _too_late(books, spec, prediction, now)
        if answer is not None:
            expected = {"start_s": prediction.start_s, "finish_s": prediction.finish_s}
            answer = msgspec.structs.replace(answer, **expected)
    return answer, prediction


def _note(books: Books, spec: RequestSpec, prediction: Prediction, now: float) -> None:
    """Who came is remembered for rehearsals, once anybody has named a deadline."""
    comers = books.comers
    names = spec.ttft_deadline_ms is not None or spec.deadline_ms is not None
    comers.wanted = comers.wanted or (names and books.leased)
    if comers.wanted:
        within_s = start_within_s(books, spec, prediction)
        note_comer(books, newcomer_of(books, spec, prediction.output_tokens, now), within_s, now)


def _never(books: Books, spec: RequestSpec) -> Rejected | None:
    """It could not be served whenever it came."""
    context = tokens.count(spec.prompt) + spec.max_tokens
    workers, largest = bool(books.workers.active), books.largest()
    if spec.max_tokens < 1 or len(spec.prompt) % tokens.TOKEN_BYTES:
        return _rejected(books, spec, "too_long", "max_tokens below 1, or a malformed prompt")
    if workers and spec.model != books.workers.model:
        detail = f"the workers serve {books.workers.model!r}, not {spec.model!r}"
        return _rejected(books, spec, "unknown_model", detail)
    if workers and largest is None:
        return _rejected(books, spec, "no_worker", advice(books))
    if largest is not None and context > largest:
        detail = f"prompt and output of up to {context} tokens, but workers hold {largest}"
        return _rejected(books, spec, "too_long", detail)
    return None


def _full(books: Books, spec: RequestSpec, prediction: Prediction, now: float) -> Rejected | None:
    """The door. Who would wait less than half as long as is allowed may pass a closed one: it has
    a better priority than those that fill the queue."""
    constants, door = books.constants, books.door
    waiting, longest_s = books.waits.tokens, constants.wait_max_s
    limit = constants.waiting_max
    crowded = len(books.requests.open) >= limit and books.waiting >= limit
    slow = bool(longest_s) and prediction.queue_s > longest_s
    if door.closed and waiting <= door.opens_at_tokens:
        door.closed = False
    if not door.closed and not crowded and not slow:
        return None
    if not door.closed:
        door.closed = True
        at_once = constants.closed_max_s / max(1e-9, drained_s(books, waiting, now)) * waiting
        kept = max(constants.reopen_share * waiting, waiting - at_once)
        door.opens_at_tokens = max(0, min(int(kept), waiting - 1))
    passes = bool(longest_s) and prediction.queue_s < constants.reopen_share * longest_s
    if not crowded and passes:
        return None
    wait_s = prediction.queue_s
    detail = f"{books.waiting} requests are waiting"
    if longest_s and not crowded:
        detail += f", {_in_words(wait_s)}; "
        detail += f"{_in_words(longest_s)} are allowed" if slow else "it opens when part has gone"
    opens_s = drained_s(books, waiting - door.opens_at_tokens, now)
    retry_s = opens_s if books.leased else predicted_wait_s(books)
    return _rejected(books, spec, "queue_full", detail, retry_s)


def _too_late(
    books: Books, spec: RequestSpec, prediction: Prediction, now: float
) -> Rejected | None:
    """A deadline that would be missed; unless it is let in to find out."""
    answer = _missed(books, spec, prediction, now)
    if answer is None or not _unproven(books, spec, prediction, now):
        return answer
    if spec.deadline_ms is not None:
        books.explorer.takes(spec.request_id, now)
    books.promises.heard_at = now  # one is enough, whatever becomes of it
    return None


def _missed(books: Books, spec: RequestSpec, prediction: Prediction, now: float) -> Rejected | None:
    """By prediction, with its margins."""
    promises, alone_s = books.promises, prediction.alone_start_s
    start_s = promises.safe_s(prediction.start_s, alone_s)
    if spec.ttft_deadline_ms is not None:
        within_s = spec.ttft_deadline_ms / 1000
        if start_s > within_s:
            detail = f"the first token is expected in {_in_words(prediction.start_s)}, "
            detail += f"or {_in_words(start_s)} if it is late"
            detail += f"; {_in_words(within_s)} are allowed"
            retry_s = _patient_s(books, spec, now) if alone_s <= within_s else None
            return _rejected(books, spec, "deadline", detail, retry_s)
    if spec.deadline_ms is not None:
        within_s = spec.deadline_ms / 1000
        # As many outputs are longer as the rest of the chance; where nothing is known none counts.
        more = prediction.output_within(books.constants.deadline_chance) - 1
        token_s = promises.safe_token_s(prediction.token_s)
        if start_s + more * token_s > within_s:
            detail = f"the end is expected in {_in_words(prediction.finish_s)}, or "
            detail += f"{_in_words(start_s + more * token_s)} if it is late or long"
            detail += f"; {_in_words(within_s)} are allowed"
            helps = alone_s + more * promises.safe_token_s(prediction.alone_token_s) <= within_s
            if not helps and _explores(books, spec, prediction, start_s, now):
                return None
            retry_s = _sooner_s(books, spec, prediction, token_s, now) if helps else None
            return _rejected(books, spec, "deadline", detail, retry_s)
    return None


def _sooner_s(
    books: Books, spec: RequestSpec, prediction: Prediction, token_s: float, now: float
) -> float:
    """When to come again who asks for an end: when its turn would be, and where there is no queue,
    when enough of those beside it may have ended, as they do one after the other."""
    assert spec.deadline_ms is not None
    if prediction.wait_s > 0:
        return _patient_s(books, spec, now)
    more = max(1, prediction.output_within(books.constants.deadline_chance) - 1)
    allowed_s = (spec.deadline_ms / 1000 - prediction.start_s) / more
    beside_s = token_s - books.promises.safe_token_s(prediction.alone_token_s)
    share = min(1.0, (token_s - allowed_s) / beside_s) if beside_s > 0 else 0.0
    return max(prediction.start_s, share * (prediction.finish_s - prediction.start_s))


def _unproven(books: Books, spec: RequestSpec, prediction: Prediction, now: float) -> bool:
    """Whether it is let in to find out: nothing runs or waits, and for a while nothing has begun or
    ended, so that what is known of times may be out of date; where everybody names a deadline only
    who is let in can tell. Not who asks for a small part of what is expected, unless nobody asks
    for more for long."""
    silent_s = now - books.promises.heard_at
    idle = books.leased and prediction.wait_s == 0.0 and not books.board.running
    if not idle or silent_s < UNPROVEN_S:
        return False
    least = UNPROVEN_LEAST * UNPROVEN_S / silent_s
    limits = (spec.ttft_deadline_ms, prediction.start_s), (spec.deadline_ms, prediction.finish_s)
    return all(
        within_ms is None or within_ms / 1000 >= least * expected_s
        for within_ms, expected_s in limits
    )


def _explores(
    books: Books, spec: RequestSpec, prediction: Prediction, start_s: float, now: float
) -> bool:
    """Whether it is let in although its output is thought too long. Not where its length is known
    to be, nor who asks for a small part of what is expected."""
    if not books.leased or prediction.wait_s > 0 or not books.explorer.may(now):
        return False
    assert spec.deadline_ms is not None
    within_s, least = spec.deadline_ms / 1000, max(1, spec.sampling.min_tokens)
    if len(prediction.outputs) == 1:  # that long it will be
        least = prediction.outputs[0]
    if start_s + (least - 1) * prediction.token_s > within_s:
        return False
    if within_s < UNPROVEN_LEAST * prediction.finish_s:
        return False
    books.explorer.takes(spec.request_id, now)
    return True


def _in_words(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _patient_s(books: Books, spec: RequestSpec, now: float) -> float:
    """Its start, if it were in no hurry: a deadline moves it up, and behind all once it is late."""
    patient = msgspec.structs.replace(spec, ttft_deadline_ms=None, deadline_ms=None)
    expected = predict(books, patient, now)
    by_rate_s, length = expected.start_s, expected.output_tokens
    rehearsed_s = rehearsed_start_s(books, newcomer_of(books, patient, length, now), now)
    return by_rate_s if rehearsed_s is None else blended_s(rehearsed_s, by_rate_s)


def advice(books: Books) -> str:
    """What to do about workers that cannot be used; empty if all is well."""
    form = books.preset.form
    if books.workers.foreign is not None:
        name, model = books.workers.foreign
        return (
            f"worker {name!r} serves {model!r} and gets no work, because this mesh serves "
            f"{books.workers.model!r}; give each model a broker or virtual host of its own"
        )
    workers = books.workers.active.values()
    if not workers or any(form in worker.info.forms for worker in workers):
        return ""
    engines = ", ".join(sorted({worker.info.engine for worker in workers}))
    return (
        f"policy {books.preset.name!r} runs {form} slices, which no worker offers (engines: "
        f"{engines}); choose another --policy or an --engine that runs {form} slices"
    )


def _rejected(
    books: Books,
    spec: RequestSpec,
    reason: str,
    detail: str,
    retry_after_s: float | None = None,
) -> Rejected:
    if retry_after_s is not None:
        retry_after_s = max(RETRY_MIN_S, retry_after_s)
        retry_after_s = min(retry_after_s, books.constants.retry_after_max_s)
    return Rejected(
        epoch=books.epoch,
        gateway=spec.gateway,
        request_id=spec.request_id,
        reason=reason,  # type: ignore[arg-type]
        detail=detail,
        retry_after_s=retry_after_s,
    )
