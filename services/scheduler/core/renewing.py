"""Renewals: who goes on, and who has to stop.

Renewal is the rule: whoever has little left of its lease gets the next one, in the order of
admission, as long as blocks are free, and its tenant is not too far ahead of others (leads.py).
Where no blocks are, one of those who are, or else the preset's victim, is parked: its lease ends,
its blocks come back with the worker's answer, and it waits again, first in its line.
"""

from dataclasses import dataclass, field

from services.scheduler.core import leads, moves
from services.scheduler.core.books import Books
from services.scheduler.core.policies.gates import Gate
from services.scheduler.core.policies.pacing import LEASE_PACINGS
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker
from shared.messages import Renewal, SliceOrder


@dataclass(slots=True)
class Outgoing:
    """What one worker is told in this round."""

    orders: list[SliceOrder] = field(default_factory=list)
    renewals: list[Renewal] = field(default_factory=list)
    batch_id: str = ""


@dataclass(slots=True)
class Round:
    """One round in the making."""

    now: float
    outgoing: dict[str, Outgoing] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    strict: dict[str, Gate] = field(default_factory=dict)
    """For those that crowd others out: gates that keep room free."""
    tests_left: int = 0
    crowd: frozenset[str] = frozenset()
    """Tenants that crowd others out."""

    def to(self, worker: Worker) -> Outgoing:
        return self.outgoing.setdefault(worker.info.worker, Outgoing())


def margin_tokens(books: Books) -> int:
    """With so little left of a lease a worker reports, and the next one is granted."""
    return margin_of(books.constants)


def margin_of(constants: Constants) -> int:
    """The same, by the constants."""
    return max(1, round(constants.lease_margin_share * constants.slice_tokens))


def renew(books: Books, worker: Worker, round_: Round) -> None:
    """The next leases of those who asked, as far as blocks are free. A worker that leaves renews
    nothing: it gives back who has used up its lease."""
    if worker.draining:
        return
    credit = worker.credit
    capacity = credit.capacity_blocks(worker.memory.kv_tokens_capacity)
    for request in list(credit.wanting.values()):
        if request.state is not State.PLACED or request.paused:
            credit.wanting.pop(request.request_id, None)
            continue
        lease = _lease_tokens(books, worker, request, capacity)
        tokens = min(lease, _fair_share(worker, capacity))
        wanted = min(request.until + tokens, request.spec.max_tokens)
        wanted = credit.rounded(request, wanted)
        until = _affordable(worker, request, wanted, capacity)
        if until > request.until:
            if leads.may_go_on(books, request, until):
                _grant(books, worker, request, until, round_)
            else:
                credit.wanting.pop(request.request_id, None)
        elif request.until <= max(request.output_tokens, request.listed):
            _make_room(books, worker, round_.now)
            return


def _lease_tokens(books: Books, worker: Worker, request: Request, capacity_blocks: int) -> int:
    """The pacing's answer; longer while memory is ample, since then it is nobody else's loss."""
    constants = books.constants
    tokens = LEASE_PACINGS[books.preset.pacing](request.output_tokens, constants)
    ample = constants.ample_slice_tokens
    if ample > tokens and worker.credit.blocks < (1 - constants.ample_share) * capacity_blocks:
        return ample
    return tokens


def _fair_share(worker: Worker, capacity_blocks: int) -> int:
    """What is free, divided among all who run: so that with little memory left none holds credit
    that another needs now, and nobody is parked while others sit on unused leases."""
    credit = worker.credit
    free = (capacity_blocks - credit.blocks) * credit.block_tokens
    return max(credit.block_tokens, free // max(1, len(credit.leases)))


def _affordable(worker: Worker, request: Request, wanted: int, capacity: int) -> int:
    """The furthest position up to `wanted` for which blocks are free."""
    credit = worker.credit
    free = capacity - credit.blocks
    if credit.blocks_for(request, wanted) - request.blocks <= free:
        return wanted
    slots = (request.blocks + max(0, free)) * credit.block_tokens
    return min(wanted, slots - request.prompt_tokens + 1)


def _grant(books: Books, worker: Worker, request: Request, until: int, round_: Round) -> None:
    worker.credit.extend(request, until)
    books.shares.count(request)
    books.shares.goes_on(request)
    renewal = Renewal(request_id=request.request_id, attempt=request.attempt, until=until)
    round_.to(worker).renewals.append(renewal)


def _make_room(books: Books, worker: Worker, now: float) -> None:
    """Park somebody, unless blocks are coming back already; the others wait for them."""
    credit = worker.credit
    if credit.parking_blocks > 0:
        return
    resting = leads.resting_on(books, worker)
    if resting:
        leads.park(books, books.victim_of(resting), now)
        return
    running = [r for r in credit.leases.values() if r.state is State.PLACED]
    if running:
        victim = books.victim_of(running)
        moves.park(books, victim, now)


def remind(books: Books, round_: Round) -> None:
    """Leases that a worker seems not to know of are said again."""
    reminded, books.reminded = books.reminded, {}
    for request in reminded.values():
        worker = books.workers.active.get(request.worker)
        if worker is not None and request.state is State.PLACED:
            renewal = Renewal(
                request_id=request.request_id, attempt=request.attempt, until=request.until
            )
            round_.to(worker).renewals.append(renewal)
