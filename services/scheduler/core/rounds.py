"""A round: from the pool to batches on workers, by the preset's five answers.

With ten thousand waiting requests a round takes longer than a call of the core may. So it is made
in steps, as a generator, and each call takes steps until it has done its share of work; between
calls anything may happen. What was decided holds as long as it can: who has left the pool
meanwhile is left out, and a batch whose worker has gone, leaves or cannot hold it stays in the
pool for the next round. If nothing happens in between, the decisions are those of one long call.
"""

from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from services.scheduler.core import moves, reasons
from services.scheduler.core.books import Books, Making
from services.scheduler.core.policies.admission import ADMISSIONS, Footprint, Room, fits
from services.scheduler.core.policies.batching import BATCHINGS, CHUNK, Waiting
from services.scheduler.core.policies.offloading import OFFLOADINGS
from services.scheduler.core.policies.pacing import PACINGS, Clock
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Batch, Worker
from shared.messages import RunSlice, SliceOrder

BATCH_SIZE_MEMORY = 0.9
"""Of the running mean of batch sizes: about the last ten batches."""
DISPATCH_WORK = 20
"""Work of placing one request, in about microseconds; of one batch beside its requests, thrice."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch that is to be placed."""

    numbers: Sequence[int]
    need: Footprint
    estimate_s: float
    allowed: Sequence[int]
    """Places of the targets it fits on."""


@dataclass(slots=True)
class _Targets:
    """The workers that a round may use. Most are alike: each kind is asked once."""

    workers: list[Worker]
    most: int
    """A worker with so many batches gets no other."""
    rooms: dict[Room, list[int]] = field(default_factory=dict)
    """Places of the workers of each kind."""
    choices: dict[tuple[bool, ...], Sequence[int]] = field(default_factory=dict)
    """Places by which kinds a batch fits."""

    def fitting(self, need: Footprint) -> Sequence[int]:
        """Places that a batch fits on, ascending."""
        kinds = tuple(fits(room, need) for room in self.rooms)
        if kinds not in self.choices:
            places = (p for p, fit in zip(self.rooms.values(), kinds, strict=True) if fit)
            self.choices[kinds] = sorted(chain.from_iterable(places))
        return self.choices[kinds]


def next_round_at(books: Books, now: float) -> float | None:
    """When the pool is to be placed; None while nobody waits or nobody can serve."""
    if not books.requests.pool or books.collecting_until is not None:
        return None
    board = books.board
    usable = board.usable(books.constants.batches_max, now)
    if not usable.size:
        return board.rested_at(now)
    clock = Clock(
        gathered_at=books.rounds.gathered_at,
        last_round_at=books.rounds.last_at,
        least_load_s=books.rounds.least_load_s,
        idle_workers=int((board.batches[usable] == 0).sum()),
        waiting=len(books.requests.pool),
    )
    at = PACINGS[books.preset.pacing].next_round_at(clock, books.constants)
    return None if at is None else max(at, books.rounds.not_before)


def go_on_with_round(books: Books, now: float) -> None:
    """Begin a round if one is due, and make it as far as one call may."""
    rounds, work = books.rounds, 0
    while work < books.constants.round_work_max:
        if rounds.making is None:
            at = next_round_at(books, now)
            if at is None or now < at or work:
                return
            rounds.making = Making(now, _round(books))
        rounds.making.now = now
        try:
            work += max(1, next(rounds.making.steps))
        except StopIteration:
            rounds.making = None
            return


def _now(books: Books) -> float:
    """Time of the call that makes the present step."""
    assert books.rounds.making is not None
    return books.rounds.making.now


def _most_batches(books: Books, now: float) -> int:
    """Who has fewer may be given one. Dealing: while somebody has nothing to do, only those."""
    constants = books.constants
    if not PACINGS[books.preset.pacing].deals:
        return constants.batches_max
    idle_only = not constants.deal_ahead or books.board.usable(1, now).size > 0
    return 1 if idle_only else constants.batches_max


def _round(books: Books) -> Generator[int, None, None]:
    """Place what can be placed."""
    rounds, constants = books.rounds, books.constants
    rounds.gathered_at = float("inf")
    targets = yield from _targets(books)
    if not targets.workers:
        rounds.gathered_at = _now(books)
        rounds.not_before = _now(books) + constants.empty_round_s
        return
    batches = yield from BATCHINGS[books.preset.batching](_waiting(books, targets))
    planned = yield from _planned(books, batches, targets)
    placed = yield from _offload(books, planned, targets)
    rounds.last_at = _now(books)
    rounds.least_load_s = min(worker.load_s for worker in targets.workers)
    if not placed:
        yield from _give_up_misfits(books)
    if books.requests.pool:
        rounds.gathered_at = _now(books)
        rounds.not_before = _now(books) + (0.0 if placed else constants.empty_round_s)


def _targets(books: Books) -> Generator[int, None, _Targets]:
    board = books.board
    most = _most_batches(books, _now(books))
    usable = board.usable(most, _now(books))
    targets = _Targets([board.workers[place] for place in usable], most)
    for place, worker in enumerate(targets.workers):
        targets.rooms.setdefault(_room(books, worker), []).append(place)
    yield 3 * len(targets.workers)
    return targets


def _waiting(books: Books, targets: _Targets) -> Waiting:
    constants, shelf, preset = books.constants, books.shelf, books.preset
    pacing, size_limit = PACINGS[preset.pacing], ADMISSIONS[preset.admission]
    narrowest = _narrowest(list(targets.rooms))
    idle = sum(not worker.batches for worker in targets.workers)
    batch_size = max(1, constants.batch_size)
    batches_max = len(shelf)
    if pacing.deals:  # to busy workers only complete batches
        room = sum(targets.most - len(worker.batches) for worker in targets.workers)
        batches_max = room if idle else min(room, len(shelf) // batch_size)

    def inputs(number: int) -> int:
        request = shelf.requests.get(number)
        return request.input_tokens if request is not None else 0

    def leases(number: int) -> int:
        request = shelf.requests.get(number)
        return pacing.lease_tokens(request.remaining_tokens, constants) if request else 0

    return Waiting(
        order=[number for _, number in shelf.order[: batches_max * batch_size]],
        lengths=shelf.lengths.copy(),
        inputs=inputs,
        leases=leases,
        cost=books.costs.cost,
        slice_tokens=constants.slice_tokens,
        size_limit=lambda length, iterations: size_limit(narrowest, length, iterations),
        batch_size=batch_size,
        batches_max=batches_max,
        batches_wanted=idle if constants.spread_batches else 0,
    )


def _room(books: Books, worker: Worker) -> Room:
    return Room(
        budget_tokens=worker.budget_tokens(books.constants.memory_share),
        batch_size_max=worker.info.batch_size_max,
        context_tokens_max=worker.info.context_tokens_max,
    )


def _narrowest(rooms: Sequence[Room]) -> Room:
    """Room that every one of these has."""
    return Room(
        budget_tokens=min(room.budget_tokens for room in rooms),
        batch_size_max=min((r.batch_size_max for r in rooms if r.batch_size_max), default=0),
        context_tokens_max=min(room.context_tokens_max for room in rooms),
    )


def _planned(
    books: Books, batches: Sequence[Sequence[int]], targets: _Targets
) -> Generator[int, None, list[_Planned]]:
    """Each batch, and the targets it fits on. A batch that fits none is broken up: workers differ,
    and each of its requests may fit somewhere."""
    cost, planned = books.costs.cost, []
    for batch in batches:
        parts = [batch]
        while parts:
            numbers = parts.pop(0)
            members = _members(books, numbers)
            if not members:
                continue
            need = _footprint(books, members)
            allowed = targets.fitting(need)
            if not allowed and len(members) > 1:
                parts = [[request.number] for request in members]
                continue
            seconds = cost.slice_s(need.batch_size, need.input_tokens_max, need.iterations)
            planned.append(_Planned(numbers, need, seconds, allowed))
            yield 8 + 2 * len(numbers) + len(targets.rooms)
    return planned


def _members(books: Books, numbers: Sequence[int]) -> list[Request]:
    """Those that still wait."""
    requests = books.shelf.requests
    return [requests[number] for number in numbers if number in requests]


def _footprint(books: Books, batch: Sequence[Request]) -> Footprint:
    lease_tokens = PACINGS[books.preset.pacing].lease_tokens
    return Footprint(
        batch_size=len(batch),
        input_tokens_max=max([request.input_tokens for request in batch]),
        iterations=max([lease_tokens(r.remaining_tokens, books.constants) for r in batch]),
        context_tokens=max([request.context_tokens for request in batch]),
    )


def _offload(
    books: Books, planned: Sequence[_Planned], targets: _Targets
) -> Generator[int, None, int]:
    """Give batches to workers; returns how many were given."""
    rounds, workers = books.rounds, targets.workers
    for_idle = targets.most == 1
    assignment = OFFLOADINGS[books.preset.offloading](
        [batch.estimate_s for batch in planned],
        [batch.allowed for batch in planned],
        [worker.load_s for worker in workers],
        _turn(books, workers, rounds.idle_turn if for_idle else rounds.turn),
    )
    placed = 0
    yield len(planned)
    for place, target in assignment:
        batch, worker = planned[place], workers[target]
        if len(worker.batches) < targets.most and _dispatch(books, batch, worker):
            after = books.board.places[worker.info.worker] + 1
            if for_idle:
                rounds.idle_turn = after
            else:
                rounds.turn = after
            placed += 1
            yield DISPATCH_WORK * (3 + len(batch.numbers))
        else:
            yield 2
    return placed


def _turn(books: Books, workers: Sequence[Worker], turn: int) -> int:
    """Which of these is next, where the turn counts all workers: a round may be for a few."""
    board = books.board
    places = [board.places.get(worker.info.worker, 0) for worker in workers]
    return bisect_left(places, turn % max(1, len(board.workers))) % len(workers)


def _dispatch(books: Books, planned: _Planned, worker: Worker) -> bool:
    """Send a batch off, as far as its requests still wait; False: it cannot be sent there now."""
    now, rounds = _now(books), books.rounds
    members = _members(books, planned.numbers)
    if not members or not _usable(books, worker, now):
        return False
    need, estimate_s = _footprint(books, members), planned.estimate_s
    if not fits(_room(books, worker), need):
        return False
    if need != planned.need:
        estimate_s = books.costs.cost.slice_s(
            need.batch_size, need.input_tokens_max, need.iterations
        )
    rounds.batches += 1
    batch_id = f"{books.epoch}-{rounds.batches}"
    orders = tuple(_place(books, request, worker, batch_id, now) for request in members)
    _book(books, worker, batch_id, orders, estimate_s, now)
    run = RunSlice(
        epoch=books.epoch,
        worker=worker.info.worker,
        batch_id=batch_id,
        form=books.preset.form,
        orders=orders,
        iterations=need.iterations,
        expected_s=estimate_s,
    )
    books.send(run)
    return True


def _usable(books: Books, worker: Worker, now: float) -> bool:
    """Is it still here, and does it take orders?"""
    here = books.workers.active.get(worker.info.worker) is worker
    return here and not worker.draining and worker.cool_until <= now


def _place(books: Books, request: Request, worker: Worker, batch_id: str, now: float) -> SliceOrder:
    waited_s = max(0.0, now - request.since)
    why = reasons.why(request, worker.info.worker)
    moves.place(books, request, worker.info.worker, batch_id, now)
    lease_tokens = PACINGS[books.preset.pacing].lease_tokens
    return SliceOrder(
        spec=request.spec,
        attempt=request.attempt,
        tokens=request.tokens,
        lease_tokens=lease_tokens(request.remaining_tokens, books.constants),
        pool_wait_s=waited_s,
        why=why,
    )


def _book(
    books: Books,
    worker: Worker,
    batch_id: str,
    orders: Sequence[SliceOrder],
    estimate_s: float,
    now: float,
) -> None:
    """Remember what the worker was given."""
    constants, rounds = books.constants, books.rounds
    busy_s = worker.load_s + estimate_s
    batch = Batch(
        batch_id=batch_id,
        request_ids=tuple(order.spec.request_id for order in orders),
        estimate_s=estimate_s,
        dispatched_at=now,
        due_at=now + constants.overdue_s + constants.overdue_factor * busy_s,
    )
    books.give(worker, batch)
    mean = rounds.batch_size_mean
    rounds.batch_size_mean = mean + (1 - BATCH_SIZE_MEMORY) * (len(orders) - mean)


def _give_up_misfits(books: Books) -> Generator[int, None, None]:
    """Nobody could be placed although workers are free: some may fit no worker there is."""
    workers = [w for w in books.workers.active.values() if books.preset.form in w.info.forms]
    everybody = _Targets(workers, 0, {_room(books, worker): [0] for worker in workers})
    largest = books.largest() or 0
    yield 3 * len(workers)
    for place, request in enumerate(list(books.requests.pool.values())):
        if place % CHUNK == CHUNK - 1:
            yield CHUNK // 2
        now = _now(books)
        if request.state is not State.WAITING or request.context_tokens <= largest:
            continue
        overdue = now - request.since > books.constants.misfit_s
        if overdue and not everybody.fitting(_footprint(books, [request])):
            detail = f"no worker can hold {request.context_tokens} tokens any more"
            moves.give_up(books, request, detail, now, reason="too_long")
            yield DISPATCH_WORK
