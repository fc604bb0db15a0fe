"""Rehearsing: what is told of a wait where a mean rate says little, from a few rehearsals.

A few workers and a short queue are played through several times (rehearsal.py), with numbers of a
stream of their own, so that decisions draw what they would have drawn. What is told lies between
the median and what the mean rate says. It costs some milliseconds. So it is done for who is refused
for a deadline only, and a few times a second at most; of a long queue, or of many workers, the mean
rate tells well enough.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from statistics import median

from services.scheduler.core.books import Books
from services.scheduler.core.comers import Comer
from services.scheduler.core.outputs import middle
from services.scheduler.core.policies.pacing import LEASE_PACINGS
from services.scheduler.core.predict import Prediction
from services.scheduler.core.rehearsal import (
    Luck,
    Opening,
    Rehearsal,
    Runner,
    Scene,
    Stage,
    Waiting,
)
from services.scheduler.core.state import Request
from services.scheduler.core.workers import Worker
from shared.messages import RequestSpec

TIMES = 15
"""With 5 the error was a tenth larger, with 25 no less [T]."""
EVENTS_MAX, LOOKS_MAX = 2_500, 20_000
"""All together, of some ten microseconds each; and times the workers, each of which is looked at
with every event."""
REHEARSED_SHARE = 0.7
"""Of what is told, in the logarithm; the rest is by the mean rate, whose errors are others. The
median error was 24 % with 1, 22 % from 0.6 to 0.75, 30 % with 0 (steady, 12 seeds) [T]."""
WORKERS_MAX, RUNNING_MAX, WAITING_MAX = 16, 1_024, 64
"""With more of them, or of all that run, or that wait, nothing is rehearsed."""
TAIL = (0.125, 0.375, 0.625, 0.875)
"""How far between one that ends now and one that goes on as long as was ever seen."""


def note_comer(books: Books, request: Request, within_s: float, now: float) -> None:
    """A newcomer, taken in or not, that would be refused with a safe start later than that."""
    turn = books.lines.central.turn_of(request, now)
    if turn is not None:
        books.comers.came(Comer(turn, request.input_tokens, within_s), now)


def rehearsed_start_s(books: Books, request: Request, now: float) -> float | None:
    """Seconds until this newcomer would have its first token; None: it was not rehearsed."""
    rehearsals = books.comers.rehearsals
    if books.lines.early or not rehearsals.has(now):
        return None
    turn, scene = books.lines.central.turn_of(request, now), _scene(books, now)
    if turn is None or scene is None:
        return None
    rehearsals.take()
    mine, luck = Waiting(turn, request.input_tokens, 0), Luck(books.requests.taken)
    opening = Opening(scene)
    starts_s: list[float] = []
    left = min(EVENTS_MAX, LOOKS_MAX // len(scene.stages))
    while len(starts_s) < TIMES and left > 0:
        start_s, events = Rehearsal(opening, mine, luck).play(left)
        left -= events
        if start_s is not None:
            starts_s.append(start_s)
    return median(starts_s) if starts_s else None


def blended_s(rehearsed_s: float, by_rate_s: float) -> float:
    """Between the two."""
    return float(rehearsed_s**REHEARSED_SHARE * by_rate_s ** (1 - REHEARSED_SHARE))


def start_within_s(books: Books, spec: RequestSpec, prediction: Prediction) -> float:
    """The latest safe start with which this request is taken in (refusals.py)."""
    within_s = float("inf")
    if spec.ttft_deadline_ms is not None:
        within_s = spec.ttft_deadline_ms / 1000
    if spec.deadline_ms is not None:
        tokens = prediction.output_within(books.constants.deadline_chance)
        decode_s = (tokens - 1) * prediction.token_s
        within_s = min(within_s, spec.deadline_ms / 1000 - decode_s)
    return within_s


def _scene(books: Books, now: float) -> Scene | None:
    """What is known now; None: too little, or too much to be played."""
    turns = books.lines.central.turns(WAITING_MAX, now)
    if turns is None:
        return None
    places = books.board.able(now)
    if not 0 < len(places) <= WORKERS_MAX or books.board.running > RUNNING_MAX:
        return None
    comers = books.comers.latest(books.promises.late)
    if not comers:
        return None
    usable, guess = books.board.taking, (books.outputs.guess(),)
    constants, served = books.constants, books.waits.served
    return Scene(
        stages=[_stage(books, int(place), now) for place in places],
        waiting=[Waiting(turn, one.input_tokens, one.overtaken) for turn, one in turns],
        comers=comers,
        comers_per_s=books.comers.per_s(now),
        outputs=lambda tokens: books.outputs.like(tokens) or guess,
        token_s=books.pace.token_s,
        prefill_token_s=max(1e-9, books.firsts.token_s),
        after_s=partial(books.firsts.after_s, beside=books.board.least_running()),
        served_per_s=served.per_s(now, guess=usable / books.pace.prefill_token_s),
        served_tokens=served.event_work,
        lease_tokens=LEASE_PACINGS[books.preset.pacing](0, constants),
        backlog_max=constants.bind_backlog_tokens or float("inf"),
        backfill_max=constants.backfill_max,
        overtaken_max=constants.overtaken_max,
    )


def _stage(books: Books, place: int, now: float) -> Stage:
    board, worker = books.board, books.board.workers[place]
    credit, lease = worker.credit, LEASE_PACINGS[books.preset.pacing](0, books.constants)
    limits = (books.constants.running_max, worker.info.batch_size_max)
    most = min((limit for limit in limits if limit), default=float("inf"))
    return Stage(
        # Where one was refused, there is room only for smaller ones, whatever is free.
        free_tokens=min(float(board.free[place]), float(board.refused[place]) + lease - 2),
        seats=most - len(credit.leases),
        backlog_tokens=max(0.0, credit.backlog_left(now, books.pace.prefill_token_s)),
        runners=[_runner(books, worker, one, now) for one in credit.leases.values()],
    )


def _runner(books: Books, worker: Worker, request: Request, now: float) -> Runner:
    made = request.output_tokens
    if request.first_token:  # it has gone on since its worker last told of it
        made += int(max(0.0, now - request.heard_at) / books.pace.token_s)
    made = min(made, request.until)
    return Runner(
        tokens=request.input_tokens,
        holds=request.blocks * worker.credit.block_tokens,
        outputs=_outputs(books, request, made),
        made=made,
        cap=request.spec.max_tokens,
        first=request.first_token,
    )


def _outputs(books: Books, request: Request, made: int) -> Sequence[int]:
    """Those of like ones that were longer; if none was, it may go on for as long as the longest of
    them was longer than the middle one."""
    known = books.outputs.like(request.prompt_tokens)
    longer = known[bisect_right(known, made) :]
    if longer:
        return longer
    spread = known[-1] - middle(known) if known else books.outputs.guess()
    return [made + 1 + int(spread * share) for share in TAIL]
