"""Leads: how far one tenant may get ahead of another that waits, in weighted service.

Theory of operation. The order serves who was given least; but what runs would go on to its end,
however far its tenant gets ahead meanwhile. So the next lease, too, is only for those who stay
within a bound: the tenant that waits and was given least, m in all, has a claim, and another
tenant's lease is granted only if all that this tenant was given, and what its leases may still
make, is above m by no more than

    U = (lead_prompts x largest prompt + n x longest lease) / its weight,

n: the requests that it has running, at the prices of `fair`. The same holds for who joins. Who has
to stop rests on its worker with its KV, and goes on once the others have caught up; if the claimant
finds no memory or no place, those that rest are parked for it, one after the other.

Proof that no tenant is ever ahead of one that waits by more than U, at the most that it had
running: (1) m never falls while anybody waits, since who comes to wait is lifted to it; (2) whoever
comes while nobody waits is lifted to the highest account, and nobody has more leased than one lease
for each of its n; (3) service moves what is leased into what was given, and changes no sum of the
two; (4) each grant keeps the sum within m + U, and the claimant's own (given m, a prompt, a lease
each) is so by itself. Over a time in which two tenants both wait all along, what they were given
differs by U of the one and U of the other at most.

Priorities, and deadlines within reach, come first: the claim is of the most urgent class that
waits, binds those that are not more urgent, and the bound holds while all are of one class. It does
not bind for a claimant that no worker could hold, nor what a new leader finds running.
"""

from itertools import islice

from services.scheduler.core import moves
from services.scheduler.core.books import Books
from services.scheduler.core.state import Request
from services.scheduler.core.workers import Worker

TENANTS_LOOKED_AT, EACH_LOOKED_AT = 16, 8
"""Among so many of those who rest one is looked for that may be parked."""
OVERTAKING_SHARE = 0.5
"""Who is placed in the stead of a refused head keeps within this share of the bound, so that those
who run have the rest of it to go on in [T]."""


def unpaid_tokens(request: Request) -> int:
    """Input that is charged when it is placed: its prompt, once. What has to be computed anew is
    not what its tenant asked for."""
    return 0 if request.placements else request.prompt_tokens


def may_join(books: Books, request: Request, lease_tokens: int, share: float = 1.0) -> bool:
    """Whether its tenant stays within this share of the bound with this one running, too."""
    return _within(books, request, unpaid_tokens(request), lease_tokens, 1, share)


def may_go_on(books: Books, request: Request, until: int) -> bool:
    """Whether it may have its next lease; else it rests."""
    if _within(books, request, 0, until - request.until, 0, 1.0):
        return True
    books.shares.rests(request)
    return False


def _within(
    books: Books, request: Request, prompt: int, lease: int, more: int, share: float
) -> bool:
    waiting, tenant = books.lines.central.waiting_tenants, request.spec.tenant
    if len(waiting) < 2 or tenant not in waiting:
        return True
    if not books.constants.lead_prompts or books.lines.early:
        return True
    line, shares = books.lines.central, books.shares
    claim = line.claim()
    if claim is None or claim.tenant == tenant or request.spec.priority < claim.priority:
        return True
    if more and books.shares.resting.get(tenant):
        return False  # those who rest go on first; else one could wait for the memory they hold
    ahead = line.lead(tenant, claim.tenant)
    ahead += line.price(tenant, prompt, shares.leased.get(tenant, 0) + lease)
    if ahead <= share * bound(books, tenant, prompt, lease, more):
        return True
    head = claim.head
    return head is not None and head.context_tokens > books.board.holds_most()


def bound(books: Books, tenant: str, prompt: int = 0, lease: int = 0, more: int = 0) -> float:
    """U, in weighted tokens; with `more` requests than now, one of this prompt and lease."""
    shares = books.shares
    prompt, lease = max(prompt, shares.prompt_max), max(lease, shares.lease_max)
    running = max(shares.most.get(tenant, 0), shares.running.get(tenant, 0) + more)
    price, prompts = books.lines.central.price, books.constants.lead_prompts
    return prompts * price(tenant, prompt, 0) + price(tenant, 0, lease * running)


def look(books: Books, now: float) -> None:
    """Who had to stop and may go on now is looked at in this round; from time to time."""
    shares, line = books.shares, books.lines.central
    if not (shares.resting or line.those_put_off) or now < shares.resting_at:
        return
    shares.resting_at = now + books.constants.hoard_look_s
    for tenant, resting in list(shares.resting.items()):
        room = _room_tokens(books, tenant)
        lease = books.constants.slice_tokens
        for request in list(resting.values()) if room >= lease else ():
            worker = books.workers.active[request.worker]
            shares.goes_on(request)
            worker.credit.wanting[request.request_id] = request
            books.touched[worker.info.worker] = None
            room -= lease
            if room < lease:
                break
    within = [tenant for tenant in line.those_put_off if _room_tokens(books, tenant) >= 0]
    if within:
        line.let_in(within)


def next_look_at(books: Books) -> float | None:
    """None: nobody had to stop."""
    shares = books.shares
    return shares.resting_at if shares.resting or books.lines.central.those_put_off else None


def _room_tokens(books: Books, tenant: str) -> float:
    """Output that this tenant may still be granted."""
    line = books.lines.central
    claim = line.claim()
    if claim is None or claim.tenant == tenant or tenant not in line.waiting_tenants:
        return float("inf")
    leased = books.shares.leased.get(tenant, 0)
    ahead = line.lead(tenant, claim.tenant) + line.price(tenant, 0, leased)
    return (bound(books, tenant) - ahead) / max(1e-9, line.price(tenant, 0, 1))


def put_off(books: Books, head: Request, now: float) -> bool:
    """The head of the line would bring its tenant too far ahead of another, which stands behind it
    because it crowds others out, or since victims of memory go first. Whether another is first now.
    """
    line = books.lines.central
    if head.evicted_at:
        head.evicted_at = 0.0
        line.push(head, now)
        return True
    if head.spec.tenant in line.those_put_off:
        return False
    line.put_off(head.spec.tenant)
    return True


def owed(books: Books, tenant: str) -> bool:
    """Somebody is as far ahead of this tenant as may be: it is held back by nothing else then."""
    line = books.lines.central
    if not line.those_put_off:
        return False
    claim = line.claim()
    return claim is not None and claim.tenant == tenant


def behind(books: Books, tenant: str, other: str) -> bool:
    """Whether the other is ahead of this tenant by so much that it would not overtake it."""
    if not books.constants.lead_prompts:
        return False
    return books.lines.central.lead(other, tenant) > OVERTAKING_SHARE * bound(books, other)


def resting_on(books: Books, worker: Worker) -> list[Request]:
    """Who rests there, in order of admission."""
    rests = books.shares.resting
    here = worker.credit.leases.values() if rests else ()
    return [r for r in here if r.request_id in rests.get(r.spec.tenant, ())]


def make_way(books: Books, head: Request, now: float) -> bool:
    """Park one that rests, where the head could run and most is free."""
    if books.parking or not books.shares.resting:
        return False
    board, place = books.board, -1
    board.written()
    few = _may_go(books, head)
    for request in few:
        here = board.places[request.worker]
        freer = place < 0 or board.free[here] > board.free[place]
        if freer and board.holds[here] >= head.context_tokens:
            place = here
    if place < 0:
        return False
    worker = board.workers[place].info.worker
    park(books, books.victim_of([r for r in few if r.worker == worker]), now)
    return True


def _may_go(books: Books, head: Request) -> list[Request]:
    """Of those who rest some that may be parked for this one; of other tenants each time."""
    resting, few = books.shares.resting, list[Request]()
    for tenant in list(islice(resting, TENANTS_LOOKED_AT)):
        here = resting[tenant] = resting.pop(tenant)
        if _gives_way(books, tenant, head.spec.tenant):
            some = islice(here.values(), EACH_LOOKED_AT)
            few += [r for r in some if r.spec.priority >= head.spec.priority]
    return few


def _gives_way(books: Books, tenant: str, other: str) -> bool:
    """Whether one fewer of this tenant and one more of the other makes them more alike. Else the
    other catches up by what it has running, and a change of places would soon be undone."""
    running, weight = books.shares.running, books.lines.central.weight
    there = running.get(other, 0)
    fewer = (running.get(tenant, 0) - 1) / weight(tenant)
    return not there or fewer >= (there + 1) / weight(other)


def park(books: Books, request: Request, now: float) -> None:
    """One that rests gives its memory up."""
    request.rested += 1
    request.makes_way = True
    moves.park(books, request, now)
