"""Yielding: a tenant that crowds the others out makes way for one that has less than its share.

Theory of operation. A fair order decides who is next, but only where there is room. Where one
tenant has filled the workers, the head of the line, of a tenant that has little there, would wait
until somebody ends. A tenant's share is its weight over those of all who have something running or
waiting. Those who run more than theirs, and whose requests, running and waiting, are more of all
requests than chance explains (shares.py), get what the others leave: they stand behind all others,
leave KV free for as many more requests of the others as chance may bring, and prefill only while
as many workers as the others may want at once have no prefill queued. If a head of another tenant
finds no memory all the same, one after the other of their running requests is parked, on the
worker that has most free; its tokens are kept. While all are of one tenant, or ask alike, nothing
of this happens.
"""

from math import ceil, sqrt

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.shares import hoards
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker

PLACES_TRIED = 8
"""Workers on which somebody is looked for who may make way: those with most free."""
LOOKED_AT_ONCE = 1000
"""Tenants, of which a look takes less than a millisecond."""
NOBODY: frozenset[str] = frozenset()


def crowd_of(books: Books, now: float) -> frozenset[str]:
    """Tenants that crowd others out, looked for from time to time; they stand behind the others
    from then on, until they run no more than their share."""
    shares, constants, line = books.shares, books.constants, books.lines.central
    if not constants.hoard_deviations:
        return shares.crowd
    tenants = len(shares.running) + len(line.waiting_tenants)
    if now < shares.looked_at + constants.hoard_look_s * max(1.0, tenants / LOOKED_AT_ONCE):
        return shares.crowd
    shares.looked_at = now
    crowd = _crowd(books)
    if crowd != shares.crowd:
        shares.crowd = crowd
        line.stand_behind(crowd)
    return crowd


def _crowd(books: Books) -> frozenset[str]:
    shares, deviations, line = books.shares, books.constants.hoard_deviations, books.lines.central
    running, waiting = shares.running, line.waiting_tenants
    names = running.keys() | waiting.keys()
    whole = sum(map(line.weight, names))
    if not whole or len(names) < 2:
        return NOBODY
    asked = shares.total + sum(waiting.values())
    return frozenset(
        name
        for name, here in running.items()
        if here > shares.total * (share := line.weight(name) / whole)
        and hoards(here + waiting.get(name, 0), asked, share, deviations)
    )


def spare_workers(books: Books, crowd: frozenset[str]) -> int:
    """How many workers are kept without queued prefill for the others: as many as belong to them by
    what they run, and some more by chance; at least 1."""
    shares, workers = books.shares, len(books.board.workers)
    theirs = workers * _others(books, crowd) / max(1, shares.total)
    spare = theirs + books.constants.hoard_reserve * sqrt(theirs)
    return max(1, min(workers, ceil(spare)))


def reserved_tokens(books: Books, crowd: frozenset[str]) -> int:
    """KV of a worker that these leave free: its share of what some more requests of the others
    would hold, as many as chance may bring beside those that run."""
    gauges = books.board.written()
    held = float(gauges.kv_used.sum()) / max(1, books.shares.total)
    more = books.constants.hoard_reserve * sqrt(_others(books, crowd))
    return int(more * held / max(1, len(books.board.workers)))


def _others(books: Books, crowd: frozenset[str]) -> int:
    """Running requests of all tenants but these."""
    shares = books.shares
    return shares.total - sum(shares.running.get(name, 0) for name in crowd)


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
            victim = books.victim_of(yielding)
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
