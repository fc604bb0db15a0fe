"""A round: from the pool to batches on workers, by the preset's five answers."""

from collections.abc import Mapping, Sequence
from itertools import chain

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.policies.admission import ADMISSIONS, Footprint, Room, fits
from services.scheduler.core.policies.batching import BATCHINGS, Waiting
from services.scheduler.core.policies.offloading import OFFLOADINGS
from services.scheduler.core.policies.order import ORDERS
from services.scheduler.core.policies.pacing import PACINGS, Clock
from services.scheduler.core.state import Request
from services.scheduler.core.workers import Batch, Worker
from shared.messages import RunSlice, SliceOrder

BATCH_SIZE_MEMORY = 0.9
"""Of the running mean of batch sizes: about the last ten batches."""


def next_round_at(books: Books, now: float) -> float | None:
    """When the pool is to be placed; None while nobody waits or nobody can serve."""
    if not books.requests.pool or books.collecting_until is not None:
        return None
    usable = books.workers.usable(books.preset.form, now)
    if not usable:
        return _cooled_at(books, now)
    clock = Clock(
        gathered_at=books.rounds.gathered_at,
        last_round_at=books.rounds.last_at,
        least_load_s=books.rounds.least_load_s,
        idle_workers=sum(worker.idle for worker in usable),
    )
    at = PACINGS[books.preset.pacing].next_round_at(clock, books.constants)
    return None if at is None else max(at, books.rounds.not_before)


def _cooled_at(books: Books, now: float) -> float | None:
    """When the first worker that refused a batch may have another; None if none is resting."""
    form = books.preset.form
    workers = books.workers.active.values()
    able = [w for w in workers if form in w.info.forms and not w.draining]
    return min((w.cool_until for w in able if w.cool_until > now), default=None)


def make_round(books: Books, now: float) -> None:
    """Place what can be placed."""
    pacing = PACINGS[books.preset.pacing]
    usable = books.workers.usable(books.preset.form, now)
    targets = [w for w in usable if w.idle] if pacing.idle_workers_only else usable
    books.rounds.gathered_at = float("inf")
    if not targets:
        books.rounds.gathered_at = now
        books.rounds.not_before = now + books.constants.empty_round_s
        return
    ordered = ORDERS[books.preset.order](list(books.requests.pool.values()))
    batches = [[ordered[i] for i in batch] for batch in _batches(books, ordered, targets)]
    placed = _offload(books, batches, targets, now)
    books.rounds.last_at = now
    books.rounds.least_load_s = min(worker.load_s for worker in targets)
    if not placed:
        _give_up_misfits(books, now)
    if books.requests.pool:
        books.rounds.gathered_at = now
        books.rounds.not_before = now if placed else now + books.constants.empty_round_s


def _give_up_misfits(books: Books, now: float) -> None:
    """Nobody could be placed although workers are free: some may fit no worker there is."""
    form = books.preset.form
    workers = [w for w in books.workers.active.values() if form in w.info.forms]
    rooms = {_room(books, worker): (0,) for worker in workers}
    for request in list(books.requests.pool.values()):
        overdue = now - request.since > books.constants.misfit_s
        if overdue and not _fitting(books, [request], rooms):
            detail = f"no worker can hold {request.context_tokens} tokens any more"
            moves.give_up(books, request, detail, now, reason="too_long")


def _batches(
    books: Books, ordered: Sequence[Request], targets: Sequence[Worker]
) -> list[list[int]]:
    constants = books.constants
    pacing = PACINGS[books.preset.pacing]
    size_limit = ADMISSIONS[books.preset.admission]
    narrowest = _narrowest([_room(books, worker) for worker in targets])
    idle = sum(worker.idle for worker in targets)
    waiting = Waiting(
        inputs=[request.input_tokens for request in ordered],
        leases=[pacing.lease_tokens(r.remaining_tokens, constants) for r in ordered],
        numbers=[request.number for request in ordered],
        cost=books.costs.cost,
        slice_tokens=constants.slice_tokens,
        size_limit=lambda length, iterations: size_limit(narrowest, length, iterations),
        batch_size=max(1, constants.batch_size),
        batches_max=len(targets) if pacing.idle_workers_only else len(ordered),
        batches_wanted=idle if constants.spread_batches else 0,
    )
    return BATCHINGS[books.preset.batching](waiting)


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


def _offload(
    books: Books, batches: list[list[Request]], targets: Sequence[Worker], now: float
) -> int:
    """Give batches to workers; returns how many were given."""
    rooms: dict[Room, list[int]] = {}
    for place, worker in enumerate(targets):
        rooms.setdefault(_room(books, worker), []).append(place)
    batches, allowed = _placeable(books, batches, rooms)
    needs = [_footprint(books, batch) for batch in batches]
    estimates = [
        books.costs.cost.slice_s(n.batch_size, n.input_tokens_max, n.iterations) for n in needs
    ]
    loads = [worker.load_s for worker in targets]
    offload = OFFLOADINGS[books.preset.offloading]
    turn = books.rounds.turn % len(targets)
    assignment = offload(estimates, allowed, loads, turn)
    most = 1 if PACINGS[books.preset.pacing].idle_workers_only else books.constants.batches_max
    placed = 0
    for batch, target in assignment:
        worker = targets[target]
        if len(worker.batches) < most:
            _dispatch(books, batches[batch], worker, needs[batch].iterations, estimates[batch], now)
            books.rounds.turn = target + 1
            placed += 1
    return placed


def _placeable(
    books: Books, batches: list[list[Request]], rooms: Mapping[Room, Sequence[int]]
) -> tuple[list[list[Request]], list[Sequence[int]]]:
    """Each batch and the targets it fits on. A batch that fits none is broken up: workers differ,
    and each of its requests may fit somewhere."""
    kept: list[list[Request]] = []
    allowed: list[Sequence[int]] = []
    for batch in batches:
        targets = _fitting(books, batch, rooms)
        if targets or len(batch) == 1:
            kept.append(batch)
            allowed.append(targets)
            continue
        kept.extend([request] for request in batch)
        allowed.extend(_fitting(books, [request], rooms) for request in batch)
    return kept, allowed


def _fitting(
    books: Books, batch: Sequence[Request], rooms: Mapping[Room, Sequence[int]]
) -> Sequence[int]:
    """The targets that this batch fits on. Most workers are alike: each kind is asked once."""
    need = _footprint(books, batch)
    kinds = [targets for room, targets in rooms.items() if fits(room, need)]
    return kinds[0] if len(kinds) == 1 else sorted(chain.from_iterable(kinds))


def _footprint(books: Books, batch: Sequence[Request]) -> Footprint:
    lease_tokens = PACINGS[books.preset.pacing].lease_tokens
    return Footprint(
        batch_size=len(batch),
        input_tokens_max=max(request.input_tokens for request in batch),
        iterations=max(lease_tokens(r.remaining_tokens, books.constants) for r in batch),
        context_tokens=max(request.context_tokens for request in batch),
    )


def _dispatch(
    books: Books,
    requests: Sequence[Request],
    worker: Worker,
    iterations: int,
    estimate_s: float,
    now: float,
) -> None:
    constants, rounds = books.constants, books.rounds
    rounds.batches += 1
    batch_id = f"{books.epoch}-{rounds.batches}"
    lease_tokens = PACINGS[books.preset.pacing].lease_tokens
    orders = []
    for request in requests:
        waited_s = max(0.0, now - request.since)
        moves.place(books, request, worker.info.worker, batch_id, now)
        order = SliceOrder(
            spec=request.spec,
            attempt=request.attempt,
            tokens=request.tokens,
            lease_tokens=lease_tokens(request.remaining_tokens, constants),
            pool_wait_s=waited_s,
        )
        orders.append(order)
    busy_s = worker.load_s + estimate_s
    worker.batches[batch_id] = Batch(
        batch_id=batch_id,
        request_ids=tuple(request.request_id for request in requests),
        estimate_s=estimate_s,
        dispatched_at=now,
        due_at=now + constants.overdue_s + constants.overdue_factor * busy_s,
    )
    mean = rounds.batch_size_mean
    rounds.batch_size_mean = mean + (1 - BATCH_SIZE_MEMORY) * (len(requests) - mean)
    run = RunSlice(
        epoch=books.epoch,
        worker=worker.info.worker,
        batch_id=batch_id,
        form=books.preset.form,
        orders=tuple(orders),
        iterations=iterations,
        expected_s=estimate_s,
    )
    books.send(run)
