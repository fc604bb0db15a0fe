"""Standing: the order of `tranche`. Who can still meet a deadline, the tenant that was given least,
then age less a boost for small requests.

Ranks: lower `priority` first; in it victims of memory, then those whose deadline is still within
reach (or who have none), then those that are late. A rank serves the tenant with the least virtual
service next (`fair`), and a tenant's requests by arrival + boost x min(1, V / 3 mean V), where
V = input x left + left^2 / 2 is the memory that a request is expected to hold, in tokens x steps.
The boost is bounded, so nobody starves: who came `volume_boost_s` earlier is never overtaken in the
order. A deadline makes a request due when it has to start at the latest, if that is sooner [T].
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from services.scheduler.core.policies.estimates import Estimates
from services.scheduler.core.policies.fair import Accounted, Accounts, Fair, Tenant
from services.scheduler.core.policies.lanes import GARBAGE_MIN, Key, Lane, waiting_since
from services.scheduler.core.policies.ranks import Rank, Ranked, Turn
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request

LARGE = 3.0
"""Mean volumes from which a request gets no boost."""
SCALE_KEPT = 1.25
"""The mean volume that counts stays as it is until the real one is so many times larger or smaller:
if it followed each newcomer, those of a burst of like requests would pass each other."""
LOOKED_AT, OTHERS_LOOKED_AT = 64, 8
"""Entries whose input is added up to tell what is ahead of one, of its own tenant and of each other
one; of more these stand for all."""
TENANTS_LOOKED_AT = 64
"""With more tenants waiting, all that waits counts as ahead of a newcomer."""
TIDIED = 3
"""Of those that have become late, put off with each newcomer."""


class Listed:
    """Least key first, in a sorted list: the first few are at hand, and 10,000 entries are moved
    in some microseconds."""

    def __init__(self, key: Callable[[Request], Key], constants: Constants) -> None:
        self._key = key
        self._backfill_max, self._overtaken_max = constants.backfill_max, constants.overtaken_max
        self._entries: list[tuple[Key, int, str, Request]] = []
        self._places: dict[str, tuple[Key, int, str, Request]] = {}

    def push(self, request: Request) -> None:
        self.remove(request)
        entry = (self._key(request), request.number, request.request_id, request)
        self._places[request.request_id] = entry
        insort(self._entries, entry)

    def remove(self, request: Request) -> None:
        entry = self._places.pop(request.request_id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry[:3])]

    def head(self, now: float) -> Request | None:
        return self._entries[0][3] if self._entries else None

    def first(self, count: int) -> list[Request]:
        """The first few."""
        return [entry[3] for entry in self._entries[:count]]

    def ordered(self, now: float) -> list[Request]:
        return self.first(len(self._entries))

    def ahead_tokens(self, request: Request | None) -> float:
        """About the input of those before a newcomer; of all for nobody. Near the head it passes
        larger ones that others pass, too."""
        count, most = len(self._entries), OTHERS_LOOKED_AT
        if request is not None:
            count = bisect_left(self._entries, (self._key(request), request.number))
            most = LOOKED_AT
        if request is not None and count <= self._backfill_max:
            before = (entry[3] for entry in self._entries[:count])
            return sum(r.prompt_tokens for r in before if not self._lets_pass(r, request))
        if not count:
            return 0.0
        some = self._entries[: count : -(-count // most)]
        return sum(entry[3].prompt_tokens for entry in some) / len(some) * count

    def _lets_pass(self, waiting: Request, newcomer: Request) -> bool:
        overtaken = 0 < waiting.overtaken < self._overtaken_max
        return overtaken and waiting.input_tokens > newcomer.input_tokens

    def dues(self) -> list[tuple[float, Request]]:
        """All of them, in order."""
        return [(entry[0][0], entry[3]) for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)


class StandingQueue(Accounted):
    """A queue that keeps accounts of its tenants, and ranks anew who is late."""

    def __init__(self, constants: Constants, estimates: Estimates) -> None:
        self._boost_s, self._constants = constants.volume_boost_s, constants
        self._estimates = estimates
        self._scale = 0.0
        self._timed: dict[str, tuple[float, Request]] = {}
        """Of those with a deadline that are not late: when they will be."""
        self._clock: list[tuple[float, str]] = []
        """The same as a heap, with entries that are over."""
        super().__init__(self._fair, constants)

    def push(self, request: Request, now: float) -> None:
        latest = self._latest_start(request)
        self._timed.pop(request.request_id, None)
        if latest is not None and latest >= now:
            self._timed[request.request_id] = (latest, request)
            heappush(self._clock, (latest, request.request_id))
        super().push(request, now)
        self._tidy(now)

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._timed.pop(request.request_id, None)

    def head(self, now: float) -> Request | None:
        while (request := super().head(now)) is not None:
            if not self._put_off(request, now):
                return request
        return None

    def ordered(self, now: float) -> list[Request]:
        for _, request in list(self._timed.values()):
            self._put_off(request, now)
        return super().ordered(now)

    def first(self, count: int, now: float) -> list[Request]:
        """The first few, the head first; of those behind it some may be late."""
        found: list[Request] = []
        if self.head(now) is not None:
            for rank in self._ranks:
                lane = self._lanes[rank]
                if isinstance(lane, Fair):
                    found += lane.first(count, now)
                else:
                    found += lane.ordered(now)
                if len(found) >= count:
                    break
        return found[:count]

    def ahead_tokens(self, request: Request, now: float) -> float | None:
        """Victims of its priority are before it, who is late behind it."""
        rank = self._rank(request, now)
        lane = self._lanes.get(rank)
        if rank[2] or (isinstance(lane, Fair) and lane.tenants > TENANTS_LOOKED_AT):
            return None
        victims = self._lanes.get((rank[0], False, False))
        first = sum(r.prompt_tokens for r in victims.ordered(now)) if victims is not None else 0
        own = lane.ahead_tokens(request, _ahead_in) if isinstance(lane, Fair) else 0.0
        return first + own

    def turn_of(self, request: Request, now: float) -> Turn | None:
        """By when it is due."""
        return self._rank(request, now), self._due(request) - now

    def turns(self, most: int, now: float) -> list[tuple[Turn, Request]] | None:
        """Of one tenant; nothing changes."""
        if len(self) > most:
            return None
        found: list[tuple[Turn, Request]] = []
        for rank in self._ranks:
            lane = self._lanes[rank]
            if not isinstance(lane, Fair):
                found += [((rank, 0.0), request) for request in lane.ordered(now)]
                continue
            tenant = lane.only_tenant
            if not isinstance(tenant, Listed):
                return None
            found += [((rank, due - now), request) for due, request in tenant.dues()]
        return found

    def _tidy(self, now: float) -> None:
        """Put off a few that are late, so that a head need not do it for all at once."""
        for _ in range(TIDIED):
            if not self._clock or self._clock[0][0] >= now:
                break
            timed = self._timed.get(heappop(self._clock)[1])
            if timed is not None:
                self._put_off(timed[1], now)
        if len(self._clock) > 2 * len(self._timed) + GARBAGE_MIN:
            self._clock = [(latest, name) for name, (latest, _) in self._timed.items()]
            heapify(self._clock)

    def _put_off(self, request: Request, now: float) -> bool:
        """Whether it is late now, and was not before: it is ranked anew."""
        latest = self._timed.get(request.request_id)
        if latest is None or latest[0] >= now:
            return False
        del self._timed[request.request_id]
        Ranked.push(self, request, now)
        return True

    def _rank(self, request: Request, now: float) -> Rank:
        priority, other = super()._rank(request, now)[:2]
        if not other:
            return (priority, other, False)
        latest = self._latest_start(request)
        return (priority, other, latest is not None and latest < now)

    def _fair(self, accounts: Accounts) -> Lane:
        return Fair(accounts, self._tenant)

    def _tenant(self) -> Tenant:
        return Listed(lambda request: (self._due(request),), self._constants)

    def _due(self, request: Request) -> float:
        latest = self._latest_start(request)
        since = request.arrived_at if request.rested else waiting_since(request)
        aged = since + self._boost(request)
        return aged if latest is None else min(aged, latest)

    def _boost(self, request: Request) -> float:
        left, input_tokens = self._estimates.left_tokens(request), request.input_tokens
        volume = input_tokens * left + left * left / 2
        mean = max(1.0, self._estimates.mean_volume())
        if not mean / SCALE_KEPT <= self._scale <= mean * SCALE_KEPT:
            self._scale = mean
        return self._boost_s * min(1.0, volume / (LARGE * self._scale))

    def _latest_start(self, request: Request) -> float | None:
        """When it has to be placed to keep its deadlines, by prediction; None: it has none."""
        spec, estimates = request.spec, self._estimates
        latest = []
        if spec.ttft_deadline_ms is not None and not request.output_tokens:
            latest.append(spec.ttft_deadline_ms / 1000 - estimates.prefill_s(request))
        if spec.deadline_ms is not None:
            left = estimates.left_tokens(request)
            if request.predicted_output:  # by what it was taken in
                left = min(left, max(1, request.predicted_output - request.output_tokens))
            decode_s = left * estimates.token_s()
            latest.append(spec.deadline_ms / 1000 - estimates.prefill_s(request) - decode_s)
        return request.arrived_at + min(latest) if latest else None


def _ahead_in(tenant: Tenant, request: Request | None) -> float:
    assert isinstance(tenant, Listed)
    return tenant.ahead_tokens(request)
