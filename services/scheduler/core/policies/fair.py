"""Fair order: the tenant that has been given least is next, by virtual token counters (VTC).

A counter per tenant rises with the service that its requests are given: `fair_input_weight` a
prefilled token and `fair_output_weight` a made one, over
the tenant's own weight (`tenant_weights`). A tenant that had nothing waiting and comes
back is lifted to the least counter of those that wait, so that idleness is not saved up [C: VTC's
artifact, as the research note reads it]. If nobody waits, it is lifted to the counter of the
tenant that was last to leave the queue [M: the algorithm in VTC's paper]. Inside a tenant: first
come, first served. Tenants are charged over all priorities, but priorities come first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace, merge
from itertools import islice
from typing import Protocol

from services.scheduler.core.policies.lanes import GARBAGE_MIN, Lane, Sorted
from services.scheduler.core.policies.ranks import Ranked
from services.scheduler.core.settings import Constants, weights_of
from services.scheduler.core.state import Request

ACCOUNTS_MAX = 8192
"""Counters kept. Beyond, half of the tenants that have nothing waiting are forgotten, the least
served first: they are the ones that a return would lift in any case."""
Key = tuple[bool, float, int]


class Rising:
    """The name with the least key, where keys rise unnoticed and a fall is told by `post`.

    A heap whose entries may be out of date: one that comes up is compared with the key of now and
    goes back if that is larger. O(log n) per rise of a key, and only if it matters.
    """

    def __init__(self, key: Callable[[str], Key]) -> None:
        self._key = key
        self._posted: dict[str, tuple[Key, int, str]] = {}
        self._heap: list[tuple[Key, int, str]] = []
        self._posts = 0

    def post(self, name: str) -> None:
        """It is new, or its key has fallen."""
        heappush(self._heap, self._entry(name))
        if len(self._heap) > 2 * len(self._posted) + GARBAGE_MIN:
            self._heap = list(self._posted.values())
            heapify(self._heap)

    def drop(self, name: str) -> None:
        self._posted.pop(name, None)

    def least(self) -> str | None:
        while self._heap:
            entry = self._heap[0]
            name = entry[2]
            if self._posted.get(name) is not entry:
                heappop(self._heap)
            elif self._key(name) != entry[0]:
                heapreplace(self._heap, self._entry(name))
            else:
                return name
        return None

    def leasts(self, count: int) -> list[str]:
        """The names with the least keys, as many as there are up to `count`."""
        found: list[str] = []
        while len(found) < count and (name := self.least()) is not None:
            found.append(name)
            self.drop(name)
        for name in found:
            self.post(name)
        return found

    def _entry(self, name: str) -> tuple[Key, int, str]:
        self._posts += 1
        entry = (self._key(name), self._posts, name)
        self._posted[name] = entry
        return entry


class Accounts:
    """How much each tenant has been given, in weighted tokens, and who has something waiting."""

    def __init__(self, constants: Constants) -> None:
        self._input_weight = constants.fair_input_weight
        self._output_weight = constants.fair_output_weight
        self._weights = weights_of(constants.tenant_weights)
        self._given: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._least = Rising(lambda tenant: (False, self.given(tenant), 0))
        self._last = ""
        self.behind: frozenset[str] = frozenset()
        """Tenants whose turn comes after everybody else's."""

    def given(self, tenant: str) -> float:
        return self._given.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """Its share beside others': a tenant of weight 2 is given twice as much."""
        return self._weights.get(tenant, 1.0)

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many requests of each tenant wait."""
        return self._waiting

    def price(self, prefill_tokens: int, decode_tokens: int) -> float:
        return self._input_weight * prefill_tokens + self._output_weight * decode_tokens

    def charge(self, tenant: str, prefill_tokens: int, decode_tokens: int) -> None:
        price = self.price(prefill_tokens, decode_tokens) / self.weight(tenant)
        self._given[tenant] = self.given(tenant) + price
        self._forget()

    def enter(self, tenant: str) -> None:
        """One more request of this tenant waits."""
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        if self._waiting[tenant] > 1:
            return
        least = self._least.least()
        floor = self.given(self._last if least is None else least)
        self._given[tenant] = max(self.given(tenant), floor)
        self._least.post(tenant)
        self._forget()

    def leave(self, tenant: str) -> None:
        """One fewer."""
        self._waiting[tenant] -= 1
        self._last = tenant
        if self._waiting[tenant] == 0:
            del self._waiting[tenant]
            self._least.drop(tenant)

    def _forget(self) -> None:
        if len(self._given) <= max(ACCOUNTS_MAX, 2 * len(self._waiting)):
            return
        away = sorted((given, t) for t, given in self._given.items() if t not in self._waiting)
        for _, tenant in away[: (len(away) + 1) // 2]:
            if tenant != self._last:
                del self._given[tenant]


class Tenant(Lane, Protocol):
    """The requests of one tenant, whose first few are at hand."""

    def first(self, count: int) -> list[Request]: ...


class Fair:
    """A lane in which the tenant with the least counter is next."""

    def __init__(
        self, accounts: Accounts, tenant: Callable[[], Tenant] = lambda: Sorted(lambda r: ())
    ) -> None:
        self._accounts = accounts
        self._tenant = tenant
        self._tenants: dict[str, Tenant] = {}
        self._least = Rising(self._key)
        self._count = 0

    def push(self, request: Request) -> None:
        tenant = request.spec.tenant
        if tenant not in self._tenants:
            self._tenants[tenant] = self._tenant()
        before = len(self._tenants[tenant])
        self._tenants[tenant].push(request)
        self._count += len(self._tenants[tenant]) - before
        if before == 0 or self._tenants[tenant].head(0.0) is request:
            self._least.post(tenant)

    def remove(self, request: Request) -> None:
        tenant = request.spec.tenant
        lane = self._tenants.get(tenant)
        if lane is None:
            return
        self._count -= len(lane)
        lane.remove(request)
        self._count += len(lane)
        if not lane:
            del self._tenants[tenant]
            self._least.drop(tenant)

    def again(self, tenants: Iterable[str]) -> None:
        """These do not stand behind the others any more."""
        for tenant in tenants:
            if tenant in self._tenants:
                self._least.post(tenant)

    def head(self, now: float) -> Request | None:
        tenant = self._least.least()
        return None if tenant is None else self._tenants[tenant].head(now)

    def ordered(self, now: float) -> list[Request]:
        """As if each were charged its input when its turn comes: a request comes when its tenant
        has been given what those before it will be."""
        return self._by_turns({name: lane.ordered(now) for name, lane in self._tenants.items()})

    def first(self, count: int, now: float) -> list[Request]:
        """The first few, of at most as many tenants."""
        names = self._least.leasts(count)
        lanes = {name: self._tenants[name].first(count) for name in names}
        if self._accounts.price(1, 0) <= 0:
            return self._by_turns(lanes)[:count]
        # Each lane's turns rise, so that only the first few need be looked at.
        turns = merge(*(self._turns(name, lane) for name, lane in lanes.items()))
        return [request for *_, request in islice(turns, count)]

    def _turns(
        self, tenant: str, lane: Sequence[Request]
    ) -> Iterator[tuple[bool, float, int, Request]]:
        """When each one's turn comes; numbers are all different."""
        given, weight = self._accounts.given(tenant), self._accounts.weight(tenant)
        behind = tenant in self._accounts.behind
        for request in lane:
            yield behind, given, request.number, request
            given += self._accounts.price(request.input_tokens, 0) / weight

    def ahead_tokens(
        self, request: Request, ahead: Callable[[Tenant, Request | None], float]
    ) -> float:
        """Input that is served before a newcomer: of its own tenant what is `ahead` of it, of
        others' (`ahead` of nobody: all they have) until each was given as much."""
        accounts, own = self._accounts, request.spec.tenant
        lane = self._tenants.get(own)
        mine = ahead(lane, request) if lane is not None else 0.0
        given = accounts.given(own)
        if lane is None:  # it will be lifted
            given = max(given, min(map(accounts.given, self._tenants), default=given))
        until = given + accounts.price(1, 0) * mine / accounts.weight(own)
        others = 0.0
        for name, other in self._tenants.items():
            if name == own:
                continue
            lead = max(0.0, until - accounts.given(name)) * accounts.weight(name)
            others += min(ahead(other, None), lead / max(1e-9, accounts.price(1, 0)))
        return mine + others

    @property
    def tenants(self) -> int:
        """Tenants that wait here."""
        return len(self._tenants)

    @property
    def only_tenant(self) -> Tenant | None:
        """The requests of the one tenant that waits here; None: there are several."""
        return next(iter(self._tenants.values())) if len(self._tenants) == 1 else None

    def _by_turns(self, lanes: Mapping[str, Sequence[Request]]) -> list[Request]:
        turns: list[tuple[bool, float, int, int]] = []
        requests: list[Request] = []
        for tenant, lane in lanes.items():
            given, weight = self._accounts.given(tenant), self._accounts.weight(tenant)
            behind = tenant in self._accounts.behind
            for request in lane:
                turns.append((behind, given, request.number, len(requests)))
                requests.append(request)
                given += self._accounts.price(request.input_tokens, 0) / weight
        return [requests[index] for *_, index in sorted(turns)]

    def __len__(self) -> int:
        return self._count

    def _key(self, tenant: str) -> Key:
        head = self._tenants[tenant].head(0.0)
        assert head is not None, tenant
        return tenant in self._accounts.behind, self._accounts.given(tenant), head.number


def stand_behind(accounts: Accounts, lanes: Iterable[Lane], crowd: frozenset[str]) -> None:
    """These tenants come after all others in each of the lanes; those before them do not."""
    gone = accounts.behind - crowd
    accounts.behind = crowd
    for lane in lanes if gone else ():
        if isinstance(lane, Fair):
            lane.again(gone)


class FairQueue(Ranked):
    """A queue that keeps accounts of its tenants."""

    def __init__(self, constants: Constants) -> None:
        self._accounts = Accounts(constants)
        super().__init__(self._lane, constants)

    def push(self, request: Request, now: float) -> None:
        waited = request in self
        super().push(request, now)
        if not waited:
            self._accounts.enter(request.spec.tenant)

    def remove(self, request: Request) -> None:
        waited = request in self
        super().remove(request)
        if waited:
            self._accounts.leave(request.spec.tenant)

    def charge(self, request: Request, prefill_tokens: int, decode_tokens: int) -> None:
        self._accounts.charge(request.spec.tenant, prefill_tokens, decode_tokens)

    def given(self, tenant: str) -> float:
        return self._accounts.given(tenant)

    @property
    def waiting_tenants(self) -> Mapping[str, int]:
        return self._accounts.waiting

    def stand_behind(self, crowd: frozenset[str]) -> None:
        stand_behind(self._accounts, self._lanes.values(), crowd)

    def weight(self, tenant: str) -> float:
        return self._accounts.weight(tenant)

    def _lane(self) -> Lane:
        return Fair(self._accounts)
