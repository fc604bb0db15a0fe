"""Predictions from the books: when would a request that came now begin, and when would it end?

Theory of operation. With leases a newcomer waits until the input ahead of it has been placed, at
the rate at which waiting input was placed lately (waits.py), unless a worker has room for it now.
Where the order is not that of arrival the queue says what is ahead of it (`ahead_tokens`). If no
worker has room for it now it waits for one more placing, and until a worker has little enough
prefill queued. Then its prefill waits its turn there, as long as reports tell (rate.py). Its length
is that of the recent outputs of like prompts (outputs.py), or of those for which about the same was
predicted: half of them are longer. Closed batches
are predicted from the fitted costs. Everything is O(1) in the number of waiting requests; what is
predicted is compared with what came (promises.py), and the margins of refusals follow from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.scheduler.core.books import Books
from services.scheduler.core.calibration import LEVELS
from services.scheduler.core.outputs import middle, quantile
from services.scheduler.core.policies.pacing import LEASE_PACINGS
from services.scheduler.core.policies.survival import kind_of
from services.scheduler.core.state import Request
from shared import tokens
from shared.messages import RequestSpec

NO_WORKER_WAIT_S = 10.0
"""Told while there is no worker: about how long one takes to start with a small model."""
WAIT_MAX_S = 3_600.0
"""No longer wait is told to anybody."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one request that came now; seconds from now."""

    wait_s: float
    """Until a worker takes it."""
    queue_s: float
    """Until all that waits has been taken: the measure of how full the queue is."""
    start_s: float
    """Until its first token is there."""
    finish_s: float
    """Until its last one is."""
    token_s: float
    """Between its tokens."""
    output_tokens: int
    """How long its output is thought to be."""
    outputs: Sequence[int]
    """Lengths that like requests lately had, ascending; empty: nothing is known."""

    output_max: int
    """It ends there at the latest."""
    alone_start_s: float
    """As `start_s`, if nothing else were there."""
    alone_token_s: float

    def output_within(self, share: float) -> int:
        """The length that it exceeds with no more than the rest of this chance; 1: not known."""
        return min(self.output_max, quantile(self.outputs, share)) if self.outputs else 1


def predict(books: Books, spec: RequestSpec, now: float) -> Prediction:
    """What to expect for this new request."""
    own = tokens.count(spec.prompt)
    _remember(books)
    outputs = _outputs(books, spec, own)
    length = min(_length(books, outputs), spec.max_tokens)
    if not books.leased:
        return _of_batches(books, spec, length, outputs)
    wait_s, queue_s = _waits_s(books, spec, own, length, now)
    backlog = books.board.least_backlog(now, estimated=False)
    running = books.board.least_running()
    start_s = wait_s + books.firsts.after_s(own, backlog if backlog < np.inf else 0.0, running)
    token_s, alone_s = (_token_time_s(books, count) for count in (running + 1, 1))
    finish_s = start_s + max(0, length - 1) * token_s
    return Prediction(
        wait_s,
        queue_s,
        start_s,
        finish_s,
        token_s,
        length,
        outputs,
        output_max=spec.max_tokens,
        alone_start_s=min(start_s, books.firsts.after_s(own, 0.0, 0.0)),
        alone_token_s=min(token_s, alone_s),
    )


def _outputs(books: Books, spec: RequestSpec, own: int) -> Sequence[int]:
    """Lengths that its output may have, ascending; empty: nothing is known of it."""
    sampling, told = spec.sampling, spec.predicted_output_tokens or 0
    if sampling.ignore_eos and not sampling.stop_token_ids and not spec.stop_strings:
        return (spec.max_tokens,)
    outputs: Sequence[int] = ()
    if told and books.preset.admission == "chance":
        outputs = books.lengths.told(spec.max_tokens, kind_of(own, told))
    outputs = outputs or books.outputs.like(own)
    least = sampling.min_tokens
    if not outputs:
        return (least,) if least > books.outputs.guess() else ()
    if outputs[0] < least:
        return tuple(length for length in outputs if length >= least) or (least,)
    return outputs


def _token_time_s(books: Books, running: float) -> float:
    """Leased: seconds between tokens, among so many."""
    known_s = books.token_times.expected_s(running)
    return books.pace.token_s if known_s is None else known_s


def newcomer_of(books: Books, spec: RequestSpec, length: int, now: float) -> Request:
    """As it would be if it were taken in, with so long an output expected."""
    return Request(
        spec=spec,
        number=books.requests.taken + 1,
        prompt_tokens=tokens.count(spec.prompt),
        predicted_tokens=spec.predicted_output_tokens or 0,
        predicted_output=length,
        arrived_at=now,
    )


def predict_output(books: Books, request: Request) -> None:
    """Quantiles of its output, by what the policy goes by, to be compared when it has ended."""
    cap = request.spec.max_tokens
    if books.preset.admission == "chance":
        kind = books.kind_of(request)
        request.predicted_quantiles = books.lengths.quantiles(LEVELS, cap, kind)
        return
    known = books.outputs.like(request.prompt_tokens)
    if known:
        told = (min(cap, quantile(known, level)) for level in LEVELS)
        request.predicted_quantiles = tuple(map(float, told))


def predicted_wait_s(books: Books) -> float:
    """Seconds until a request that is submitted now would begin: with leases, until all that waits
    has been placed; else what the least loaded worker still has to do, and the pool's first slices
    shared among the workers."""
    usable = books.board.taking
    if not usable:
        return NO_WORKER_WAIT_S
    if books.leased:
        return drained_s(books, books.waits.tokens, books.called_at or 0.0)
    least_s = books.board.least_load_s()
    pooled = len(books.requests.pool)
    if pooled == 0:
        return least_s
    rows = max(1, round(books.rounds.batch_size_mean))
    oldest = next(iter(books.requests.pool.values()))
    lease = books.constants.slice_tokens
    per_request_s = books.costs.cost.slice_s(rows, oldest.input_tokens, lease) / rows
    return least_s + pooled * per_request_s / usable


def drained_s(books: Books, waiting_tokens: float, now: float, guess: float | None = None) -> float:
    """Leased: how long it takes to place so much waiting input. `guess`: tokens in a second, where
    nothing was seen of it yet; None: as fast as prefill goes."""
    usable = books.board.taking
    if not usable:
        return NO_WORKER_WAIT_S
    if waiting_tokens <= 0:
        return 0.0
    guess = usable / books.pace.prefill_token_s if guess is None else guess
    served = books.waits.served
    rate = served.per_s(now, guess) if served.events else guess
    return min(WAIT_MAX_S, waiting_tokens / rate) if rate > 0 else WAIT_MAX_S


def _guessed_per_s(books: Books, now: float) -> float:
    """Input that is placed in a second: as fast as prefill goes; where that is not what is waited
    for, memory or places are, and it is no faster than those that run end."""
    usable, waiting = books.board.taking, len(books.waits)
    prefill = usable / books.pace.prefill_token_s
    running = books.board.running
    if not waiting or not usable or not running or _opens_s(books, now) > 0:
        return prefill
    output_s = books.outputs.guess() * _token_time_s(books, running / usable)
    return min(prefill, running / output_s * books.waits.tokens / waiting)


def _waits_s(
    books: Books, spec: RequestSpec, own: int, length: int, now: float
) -> tuple[float, float]:
    """Until it is taken in its turn, and if all that waits were before it."""
    if not len(books.waits) and _has_room(books, own, now):
        return 0.0, 0.0
    everybody = books.waits.ahead_tokens(spec.priority)
    queue_s = drained_s(books, everybody + own, now)
    if books.lines.early:
        return queue_s, queue_s
    newcomer = newcomer_of(books, spec, length, now)
    turn = books.lines.central.ahead_tokens(newcomer, now) if everybody else 0.0
    ahead = books.waits.ahead_tokens(spec.priority, turn)
    if not ahead and books.head_waits_for == "room" and _has_room(books, own, now):
        return 0.0, queue_s  # the head is larger
    # Else whoever waits was refused by the gates: a newcomer, even if it is the next, waits for one
    # more placing. They come like the ends that make room for them: the next one is a mean placing
    # away, whenever the last one was.
    taken = ahead + books.waits.served.event_work + own
    guess = _guessed_per_s(books, now)
    return _opens_s(books, now) + drained_s(books, taken, now, guess), queue_s


def _opens_s(books: Books, now: float) -> float:
    """Until some worker has so little prefill queued that late binding gives it more."""
    cap = books.constants.bind_backlog_tokens
    over = books.board.least_backlog(now, estimated=True) - cap if cap else 0.0
    return over * books.firsts.token_s if 0 < over < np.inf else 0.0


def _has_room(books: Books, own: int, now: float) -> bool:
    """Whether some worker has memory for it and little prefill queued. Its gate may say no."""
    constants = books.constants
    lease = LEASE_PACINGS[books.preset.pacing](0, constants)
    eligible = books.board.with_room(
        own + lease - 1,
        own,
        constants.bind_backlog_tokens or np.inf,
        constants.running_max or np.inf,
        now,
        constants.bind_backlog_estimated,
    )
    return bool(eligible.size)


def _remember(books: Books) -> None:
    """A new leader knows the outputs that the estimator has sent."""
    if books.outputs or books.forecast is None:
        return
    classes = books.forecast.classes
    known = next((one for one in classes if one.model == books.workers.model), None)
    whole = known is not None and len(known.prompts) == len(known.lengths)
    if known is not None and whole and len(known.lengths) % tokens.TOKEN_BYTES == 0:
        prompts, lengths = tokens.unpack(known.prompts), tokens.unpack(known.lengths)
        books.outputs.learn(prompts, lengths, known.censored)


def _length(books: Books, outputs: Sequence[int]) -> int:
    """The length that as many outputs exceed as not: of like requests, else of all."""
    return middle(outputs) if outputs else books.outputs.guess()


def _of_batches(books: Books, spec: RequestSpec, length: int, outputs: Sequence[int]) -> Prediction:
    """Closed: a wait before every slice, and each slice as long as such batches take."""
    wait_s, cost = predicted_wait_s(books), books.costs.cost
    own = tokens.count(spec.prompt)
    slice_tokens = min(length, books.constants.slice_tokens)
    rows = max(1, round(books.rounds.batch_size_mean))
    first_s, slice_s = cost.slice_s(rows, own, 1), cost.slice_s(rows, own, slice_tokens)
    token_s = max(1e-6, (wait_s + slice_s) / max(1, slice_tokens))
    finish_s = wait_s + max(first_s, length * token_s - wait_s)
    one_s = cost.slice_s(1, own, slice_tokens) / max(1, slice_tokens)
    return Prediction(
        wait_s,
        wait_s,
        wait_s + first_s,
        finish_s,
        token_s,
        length,
        outputs,
        output_max=spec.max_tokens,
        alone_start_s=min(first_s, cost.slice_s(1, own, 1)),
        alone_token_s=min(token_s, max(1e-6, one_s)),
    )
