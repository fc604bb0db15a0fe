"""Yielding: a tenant that crowds the others out makes way for one that has less than its share.

Theory of operation. A fair order decides who is next, but only where there is room. Where one
tenant has filled the workers, the head of the line, of a tenant that has little there, would wait
until somebody ends; meanwhile the other's small requests would pass it. A tenant's share is its
weight over those of all who have something running or are the head's. If the head's tenant runs
about its share at most, those hoard who run more than theirs by more than chance explains
(shares.py): none of theirs is placed in the head's stead, and one after the other of their running
requests is parked, on the worker that has most free. Its tokens are kept, and it waits again in its
tenant's turn. While all are of one tenant, or ask alike, nothing of this happens.
"""

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.shares import hoards
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker

PLACES_TRIED = 8
"""Workers on which somebody is looked for who may make way: those with most free."""
NOBODY: frozenset[str] = frozenset()


def hoarding(books: Books, head: Request) -> frozenset[str]:
    """Tenants that crowd out the head's."""
    shares, deviations = books.shares, books.constants.hoard_deviations
    own = head.spec.tenant
    if not deviations or len(shares.running) < 2 - (own not in shares.running):
        return NOBODY
    line = books.lines.central
    weights = {name: line.weight(name) for name in shares.running}
    weights[own] = line.weight(own)
    total, whole = shares.total, sum(weights.values())
    if not whole:
        return NOBODY
    mine = shares.running.get(own, 0)
    if hoards(mine, total, weights[own] / whole, deviations / 2):
        return NOBODY
    return frozenset(
        name
        for name, running in shares.running.items()
        if name != own and hoards(running, total, weights[name] / whole, deviations)
    )


def make_way(books: Books, head: Request, crowd: frozenset[str], now: float) -> None:
    """Park one of these tenants', unless memory is on its way back already."""
    if not crowd or books.parking:
        return
    board = books.board
    places = board.able(now)
    places = places[board.holds[places] >= head.context_tokens]
    if len(places) > PLACES_TRIED:
        places = places[board.free[places].argsort()[-PLACES_TRIED:]]
    for place in sorted(places.tolist(), key=lambda place: -board.free[place]):
        yielding = _yielding(books, board.workers[place], crowd, head.spec.priority)
        if yielding:
            victim = VICTIMS[books.preset.victim](yielding, books.lengths, books.constants)
            victim.yields += 1
            victim.makes_way = True
            moves.park(books, victim, now)
            return


def _yielding(books: Books, worker: Worker, crowd: frozenset[str], priority: int) -> list[Request]:
    """Whom a head of this priority may displace here."""
    return [
        request
        for request in worker.credit.leases.values()
        if request.spec.tenant in crowd
        and request.state is State.PLACED
        and request.spec.priority >= priority
        and request.yields < books.constants.yields_max
    ]
