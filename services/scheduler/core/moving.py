"""Moving: a running request goes to another worker at the end of a slice, where that pays.

Theory of operation. Every request makes the tokens of its whole batch slower. So who leaves a
crowded worker for an emptier one gains for itself and for those it leaves, and costs those it
joins; and it pays one prefill of all it has, which holds up everybody there. Counted in seconds of
all requests together, with b seconds a token for each request in the batch, n here and m there and
`left` tokens to make: the gain is 2 b left (n - m - 1), the price prefill x (m + 1). How much b is
follows from reports (`rate.Crowding`).

A sum is not all: who moves stands still for that prefill, which is seen. So nothing moves for what
chance makes of lengths, but only where many fewer run (`MANY_FEWER`), or where each token would be
much sooner (`SOONER_LEAST`), as on engines whose time is their batch's: after a worker has joined,
or many have ended elsewhere.

Nobody moves while somebody waits, as free memory is theirs; and one at a time in the whole mesh,
since what it finds there is only known once it is there.
"""

import numpy as np

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker

MANY_FEWER = 12
"""So many requests fewer. On Dist-1 at half load 206 of 1,500 moved for 4 fewer: the mean end was
0.7 % sooner, the p99 standstill 0.6 s instead of 0.1 [T]."""
SOONER_LEAST = 0.25
"""Or this share of a token's time less, and `FEWER_LEAST` requests fewer all the same: below, noise
would decide."""
FEWER_LEAST = 4
MOVES_MAX = 4
"""Of one request."""


def consider(books: Books, workers: list[Worker], now: float) -> None:
    """Of those whose slice ends on one of these workers, the one for whom it pays most."""
    constants = books.constants
    if constants.move_gain <= 0 or books.lines.early or len(books.lines.central) or books.parking:
        return
    able = books.board.able(now)
    if able.size < 2:
        return
    gauges = books.board.written()
    there = int(able[gauges.running[able].argmin()])
    target = books.board.workers[there]
    found: tuple[float, Request] | None = None
    for worker in workers:
        here = len(worker.credit.leases)
        if not worker.credit.wanting or here < gauges.running[there] + FEWER_LEAST:
            continue
        for request in worker.credit.wanting.values():
            pays = _pays(books, request, worker, target)
            if pays > max(constants.move_gain, found[0] if found else 0.0):
                found = (pays, request)
    if found is not None:
        request = found[1]
        request.moves += 1
        request.parked_for, request.left = "move", request.worker
        moves.park(books, request, now)


def _pays(books: Books, request: Request, worker: Worker, target: Worker) -> float:
    """Gain over price; 0: it cannot move."""
    unfit = request.state is not State.PLACED or request.paused or request.moves >= MOVES_MAX
    if unfit or target.credit.backlog_tokens or not _holds(books, request, target):
        return 0.0
    here, there = len(worker.credit.leases), len(target.credit.leases)
    if here - there < MANY_FEWER and books.crowding.sooner(here, there + 1) < SOONER_LEAST:
        return 0.0
    left = books.estimates.left_tokens(request)
    prefill_s = books.pace.prefill_s(request.input_tokens)
    return worth(left, here, there, books.crowding.request_s, prefill_s)


def worth(left: float, here: int, there: int, request_s: float, prefill_s: float) -> float:
    """What a move gains over what it costs, in seconds of all requests: see the module's text.
    `request_s`: that each request in a batch adds to each token."""
    gain = 2 * request_s * left * max(0, here - there - 1)
    return gain / max(1e-9, prefill_s * (there + 1))


def _holds(books: Books, request: Request, target: Worker) -> bool:
    """Whether it will surely find room: all that it, and everybody there, may still make fits."""
    credit = target.credit
    if request.context_tokens > target.info.context_tokens_max:
        return False
    running_max = min(
        (most for most in (books.constants.running_max, target.info.batch_size_max) if most),
        default=np.inf,
    )
    worst = credit.worst_blocks + credit.blocks_for(request, request.spec.max_tokens)
    capacity = credit.capacity_blocks(target.memory.kv_tokens_capacity)
    return worst < capacity and len(credit.leases) < running_max
