"""A round of leases: who joins, when everybody who is there can go on (`renewing.py`).

That is the head of the line, if the preset's gate admits it and its first lease can be reserved. A
refused head is overtaken by nobody, or, with `backfill_max`, by few and not often.

A round looks only at workers where something changed, and a head that a worker refused is not
tried there again before something changes. What is left of a long round is done at the next
wake-up.
"""

import numpy as np

from services.scheduler.core import leads, making_room, moves, moving, reasons
from services.scheduler.core.board import IntArray
from services.scheduler.core.books import Books
from services.scheduler.core.policies.backfill import deepest, looked_at
from services.scheduler.core.policies.balancing import BALANCERS
from services.scheduler.core.policies.future import Future
from services.scheduler.core.policies.gates import GATES, SURE_SHARE
from services.scheduler.core.policies.homes import Keys, keys_of
from services.scheduler.core.policies.members import columns
from services.scheduler.core.policies.pacing import LEASE_PACINGS
from services.scheduler.core.renewing import Round, margin_tokens, remind, renew
from services.scheduler.core.state import Request
from services.scheduler.core.views import member, view
from services.scheduler.core.workers import Worker
from services.scheduler.core.yielding import (
    NOBODY,
    crowd_of,
    make_way,
    reserved_tokens,
    spare_workers,
)
from shared.messages import RunSlice, SliceOrder

FORESEEING = frozenset({"least-predicted-peak", "max-min"})
"""Balancers that want to know what a worker's leases will still need."""


def lease_round(books: Books, now: float) -> None:
    """Renew, park and admit wherever something changed since the last round."""
    round_ = Round(now, tests_left=books.constants.gate_tests_max)
    _rested(books, now)
    leads.look(books, now)
    touched, books.touched = books.touched, {}
    remind(books, round_)
    workers = [w for w in map(books.workers.active.get, touched) if w is not None]
    moving.consider(books, workers, now)
    making_room.consider(books, workers, now)
    for worker in workers:
        renew(books, worker, round_)
        if books.preset.offloading in FORESEEING:
            _foresee(books, worker)
    if books.lines.early:
        _bind(books, now)
        again = [w for w in map(books.workers.active.get, books.touched) if w is not None]
        books.touched = {}
        for worker in {w.info.worker: w for w in (*workers, *again)}.values():
            _admit_from_line(books, worker, round_)
    else:
        _admit_from_centre(books, round_)
    _send(books, round_)
    books.round_at = _next_round_at(books, round_)


def _rested(books: Books, now: float) -> None:
    """Workers whose rest is over may have orders again."""
    for name, worker in list(books.resting.items()):
        if now >= worker.cool_until:
            del books.resting[name]
            books.lines.stirred = True
            if books.workers.active.get(name) is worker:
                books.touch(worker)


def _foresee(books: Books, worker: Worker) -> None:
    """The gauges of balancers that look into a worker's future."""
    members = columns(view(books, worker).members)
    left = books.lengths.expected_remaining_all(members.made, members.cap)
    peak = Future(members.prompt + members.made, left.astype(np.int64)[None, :]).peak()
    pace, credit = books.pace, worker.credit
    per_lease_s = pace.token_s / max(1, len(members))
    busy_s = credit.backlog_tokens * pace.prefill_token_s + float(left.sum()) * per_lease_s
    books.board.foresee(worker, peak_tokens=peak, busy_s=busy_s)


def _next_round_at(books: Books, round_: Round) -> float | None:
    """When a round is due although nothing happens: the rest of a long one, or a rest's end."""
    if round_.tests_left <= 0:
        return round_.now + books.constants.round_rest_s
    ats = [leads.next_look_at(books)]
    if books.requests.pool:
        ats.append(books.board.rested_at(round_.now))
        cap = books.constants.bind_backlog_tokens
        if cap and books.constants.bind_backlog_estimated:
            ats.append(books.board.runs_short_at(cap, round_.now))
    return min((at for at in ats if at is not None), default=None)


# ------------------------------------------------------------------------------------ admission


def _bind(books: Books, now: float) -> None:
    """Early binding: everybody who is bound to nobody gets a worker, if there is one."""
    central = books.lines.central
    if not books.lines.stirred or not len(central):
        return
    eligible = books.board.able(now)
    if not eligible.size:
        return
    books.lines.stirred = len(central) > books.constants.binds_max
    for request in central.ordered(now)[: books.constants.binds_max]:
        fitting = _able_to_hold(books, eligible, request)
        if fitting.size:
            worker = books.board.workers[_pick(books, request, fitting)]
            moves.bind(books, request, worker, now)


def _able_to_hold(books: Books, places: IntArray, request: Request) -> IntArray:
    """Those of the places whose worker could hold the whole request."""
    books.board.written()
    return places[books.board.holds[places] >= request.context_tokens]


def _pick(books: Books, request: Request, eligible: IntArray) -> int:
    books.rounds.turn += 1
    balance = BALANCERS[books.preset.offloading]
    need = request.input_tokens
    gauges = books.board.written()
    if books.board.sharing and books.constants.prefix_affinity:
        books.board.know_cached(books.homes.cached_tokens(_prefix(request)))
    return int(balance(gauges, need, eligible, books.rounds.turn, books.draws, books.constants))


def _prefix(request: Request) -> Keys:
    if request.prefix_keys is None:
        request.prefix_keys = keys_of(request.spec.prompt)
    return request.prefix_keys


def _settle(books: Books, worker: Worker, request: Request) -> None:
    """It is going to have its beginning here."""
    if worker.info.shares_prefixes and books.constants.prefix_affinity:
        capacity_tokens = worker.memory.kv_tokens_capacity
        books.homes.placed(_prefix(request), worker.info.worker, capacity_tokens)


def _admit_from_line(books: Books, worker: Worker, round_: Round) -> None:
    """Early binding: from the worker's own line, in its order, until one is refused."""
    line = worker.line
    while line is not None and round_.tests_left > 0:
        request = line.head(round_.now)
        if request is None:
            return
        if not _has_room(books, worker, request, round_.now):
            reasons.waits(request, "room")
            return
        round_.tests_left -= 1
        if not _admits(books, worker, request, round_):
            return
        _place(books, worker, request, round_)
    if line is not None and len(line):
        books.touched[worker.info.worker] = None


def _admit_from_centre(books: Books, round_: Round) -> None:
    """Late binding: the head of the one line to the best worker that admits it, until there is a
    head that nobody admits."""
    line = books.lines.central
    round_.crowd = crowd_of(books, round_.now)
    while round_.tests_left > 0:
        request = line.head(round_.now)
        if request is None:
            return
        if not leads.may_join(books, request, _first_lease(books, request)):
            round_.tests_left -= 1
            reasons.waits(request, "turn")
            if leads.put_off(books, request, round_.now):
                continue
            break
        if not _admit_somewhere(books, request, round_):
            if request.waits_for != "memory":
                room = _room_for(books, request, round_.now)
                reasons.waits(request, books.board.hindrance(*room))
            books.head_waits_for = request.waits_for
            _make_way(books, request, round_)
            break
    if books.constants.backfill_max and round_.tests_left > 0:
        _fill_up(books, round_)


def _make_way(books: Books, head: Request, round_: Round) -> None:
    """Somebody is parked for a head: of those who had to stop, then of those who crowd it out."""
    if head.waits_for in ("memory", "room", "places") and leads.make_way(books, head, round_.now):
        return
    if head.spec.tenant not in round_.crowd and head.waits_for in ("memory", "room"):
        owed = (name for name in round_.crowd if leads.behind(books, name, head.spec.tenant))
        make_way(books, head, round_.crowd.difference(owed), round_.now)


def _fill_up(books: Books, round_: Round) -> None:
    """Behind a refused head: whoever of the next few fits, but nobody behind one that has been
    overtaken too often."""
    constants = books.constants
    passed: list[Request] = []
    crowd: frozenset[str] = frozenset()
    enough = False
    few = books.lines.central.first(deepest(constants.backfill_max), round_.now)
    predicted = [request.predicted_tokens for request in few]
    del few[looked_at(predicted, constants.backfill_max) :]
    fitting = _fitting(books, few, round_.now)
    for number, request in enumerate(few):
        if not passed:
            crowd = NOBODY if request.spec.tenant in round_.crowd else round_.crowd
        elif request.spec.tenant in crowd:
            continue
        near = number <= constants.backfill_max or predicted[number] > 0
        may = passed and near and number in fitting and round_.tests_left > 0
        may = may and leads.may_join(
            books, request, _first_lease(books, request), leads.OVERTAKING_SHARE
        )
        if may and _admit_somewhere(books, request, round_):
            for other in passed:
                other.overtaken += 1
            fitting = _fitting(books, few, round_.now)
            enough = any(other.overtaken >= constants.overtaken_max for other in passed)
        else:
            passed.append(request)
            enough = enough or request.overtaken >= constants.overtaken_max
        if enough:
            return


def _fitting(books: Books, requests: list[Request], now: float) -> set[int]:
    """Which of them find room anywhere; all are looked for at once, as most find none."""
    if not requests:
        return set()
    asked = [_room_for(books, request, now) for request in requests]
    return books.board.with_room_each([(need, own) for need, own, *_ in asked], *asked[0][2:])


def _admit_somewhere(books: Books, request: Request, round_: Round) -> bool:
    board, reserve = books.board, 0
    eligible = board.with_room(*_room_for(books, request, round_.now))
    held_back = request.spec.tenant in round_.crowd and not request.evicted_at
    if held_back and not leads.owed(books, request.spec.tenant):  # who was evicted goes on
        spare, idle = spare_workers(books, round_.crowd), board.gauges.backlog == 0
        if idle.sum() < spare:
            return False
        if spare > 1:
            eligible = eligible[idle[eligible]]
        reserve = reserved_tokens(books, round_.crowd)
    if request.left and eligible.size > 1:
        eligible = eligible[eligible != board.places.get(request.left, -1)]
    while eligible.size and round_.tests_left > 0:
        place = _pick(books, request, eligible)
        worker = board.workers[place]
        if _has_room(books, worker, request, round_.now, reserve):
            round_.tests_left -= 1
            if _admits(books, worker, request, round_, reserve):
                _place(books, worker, request, round_)
                return True
        if not reserve:
            board.refused[place] = min(board.refused[place], request.input_tokens)
        eligible = eligible[eligible != place]
    return False


def _room_for(
    books: Books, request: Request, now: float
) -> tuple[int, int, float, float, float, bool]:
    """What it asks of a worker; see `Board.with_room`."""
    constants = books.constants
    return (
        request.input_tokens + _first_lease(books, request) - 1,
        request.input_tokens,
        constants.bind_backlog_tokens or np.inf,
        constants.running_max or np.inf,
        now,
        constants.bind_backlog_estimated,
    )


def _has_room(books: Books, worker: Worker, request: Request, now: float, reserve: int = 0) -> bool:
    """What no policy may overrule: memory for the first lease, and the limits of the worker.
    `reserve`: tokens that stay free."""
    credit, info, constants = worker.credit, worker.info, books.constants
    if worker.draining or now < worker.cool_until or books.preset.form not in info.forms:
        return False
    if credit.wanting or credit.parking_blocks:
        return False
    running_max = min((m for m in (constants.running_max, info.batch_size_max) if m), default=0)
    if running_max and len(credit.leases) >= running_max:
        return False
    cap = constants.bind_backlog_tokens
    token_s = books.pace.prefill_token_s if constants.bind_backlog_estimated else np.inf
    if cap and credit.backlog_left(now, token_s) >= cap:
        return False
    if request.context_tokens > info.context_tokens_max:
        return False
    until = request.output_tokens + _first_lease(books, request)
    blocks = credit.blocks + credit.blocks_for(request, until)
    return blocks <= credit.capacity_blocks(worker.memory.kv_tokens_capacity - reserve)


def _first_lease(books: Books, request: Request) -> int:
    lease = LEASE_PACINGS[books.preset.pacing]
    return min(lease(request.output_tokens, books.constants), request.remaining_tokens)


def _admits(
    books: Books, worker: Worker, request: Request, round_: Round, reserve: int = 0
) -> bool:
    """Whether the gate lets it in. A worker with nothing to do refuses nobody: waiting would not
    make room."""
    if not worker.credit.leases:
        reasons.admitted(request, "idle")
        return True
    name = worker.info.worker
    if name not in round_.gates and _surely_fits(books, worker, request, reserve):
        reasons.admitted(request, "sure")
        return True
    gates = round_.strict if reserve else round_.gates
    gate = gates.get(name)
    if gate is None:
        gate = gates[name] = GATES[books.preset.admission](view(books, worker, reserve))
    if not gate.admits(member(books, request, request.output_tokens)):
        reasons.waits(request, "memory", gate)
        return False
    reasons.admitted(request, "gate", gate)
    return True


def _surely_fits(books: Books, worker: Worker, request: Request, reserve: int) -> bool:
    """Even if everybody made as much as they may, memory would last: then no gate need be asked.
    On a worker with little to do that is nearly always so."""
    credit = worker.credit
    worst = credit.worst_blocks + credit.blocks_for(request, request.spec.max_tokens)
    share = SURE_SHARE[books.preset.admission](books.constants)
    return worst < share * credit.capacity_blocks(worker.memory.kv_tokens_capacity - reserve)


def _place(books: Books, worker: Worker, request: Request, round_: Round) -> None:
    """It joins: an attempt, a first lease, an order."""
    out, now = round_.to(worker), round_.now
    if not out.batch_id:
        books.rounds.batches += 1
        out.batch_id = f"{books.epoch}-{books.rounds.batches}"
    made = request.output_tokens
    until = worker.credit.rounded(request, made + _first_lease(books, request))
    waited_s = max(0.0, now - request.since)
    for gates in (round_.gates, round_.strict):
        gate = gates.get(worker.info.worker)
        if gate is not None:
            gate.add(member(books, request, until))
    why, unpaid = reasons.why(request, worker.info.worker), leads.unpaid_tokens(request)
    moves.place(books, request, worker.info.worker, out.batch_id, now)
    request.heard_at, request.evicted_at, request.overtaken, request.left = now, 0.0, 0, ""
    _settle(books, worker, request)
    worker.credit.take(request, until, now)
    books.shares.prompt_max = max(books.shares.prompt_max, unpaid)
    books.shares.count(request)
    books.lines.charge(request, worker, unpaid, 0)
    books.board.update(worker)
    out.orders.append(
        SliceOrder(
            spec=request.spec,
            attempt=request.attempt,
            tokens=request.tokens,
            lease_tokens=until - made,
            pool_wait_s=waited_s,
            why=why,
        )
    )


# --------------------------------------------------------------------------------------- orders


def _send(books: Books, round_: Round) -> None:
    constants = books.constants
    for name, out in round_.outgoing.items():
        if not out.batch_id:
            books.rounds.batches += 1
            out.batch_id = f"{books.epoch}-{books.rounds.batches}"
        books.send(
            RunSlice(
                epoch=books.epoch,
                worker=name,
                batch_id=out.batch_id,
                form="leased",
                orders=tuple(out.orders),
                renewals=tuple(out.renewals),
                margin_tokens=margin_tokens(books),
                iteration_tokens=constants.iteration_tokens,
                prefill_first=books.preset.batching == "prefill-first",
            )
        )
        books.board.update(books.workers.active[name])
