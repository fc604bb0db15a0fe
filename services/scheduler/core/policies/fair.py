"""Fair order: the tenant that has been given least is next, by virtual token counters (VTC).

A counter per tenant rises with the service that its requests are given: `fair_input_weight` a
prefilled token and `fair_output_weight` a made one, over
the tenant's own weight (`tenant_weights`). A tenant that had nothing waiting and comes
back is lifted to the least counter of those that wait, so that idleness is not saved up [C: VTC's
artifact, as the research note reads it]. If nobody waits, it is lifted to the counter of the
tenant that was last to leave the queue [M: the algorithm in VTC's paper]. Inside a tenant: first
come, first served. Tenants are charged over all priorities, but priorities come first.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice
from typing import Protocol

from services.scheduler.core.policies.lanes import Lane, Sorted
from services.scheduler.core.policies.ranks import Claim, Ranked
from services.scheduler.core.policies.rising import Key, Rising
from services.scheduler.core.settings import Constants, weights_of
from services.scheduler.core.state import Request

ACCOUNTS_MAX = 8192
"""Counters kept. Beyond, half of the tenants that have nothing waiting are forgotten, the least
served first: they are the ones that a return would lift in any case."""


LEAD_KEPT = 0.5
"""With `lead_prompts`: who begins to wait is at most so many of the largest prompt ahead. With
none a tenant that never waits for long would owe nothing to one that always does; with 1, two long
prompts in a row would make it stand behind a flood [T]."""


class Accounts:
    """How much each tenant has been given, in weighted tokens, and who has something waiting."""

    def __init__(self, constants: Constants) -> None:
        self._input_weight = constants.fair_input_weight
        self._output_weight = constants.fair_output_weight
        self._weights = weights_of(constants.tenant_weights)
        self._given: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._least = Rising(lambda tenant: (0, self.given(tenant), 0))
        self._last = ""
        self._kept = LEAD_KEPT if constants.lead_prompts else float("inf")
        self.prompt_max = 0
        self.behind: frozenset[str] = frozenset()
        """Tenants whose turn comes after everybody else's,"""
        self.put_off: set[str] = set()
        """and after theirs (leads.py)."""

    def given(self, tenant: str) -> float:
        return self._given.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """Its share beside others': a tenant of weight 2 is given twice as much."""
        return self._weights.get(tenant, 1.0)

    def row(self, tenant: str) -> int:
        """The least has its turn first, whatever it was given."""
        return 2 if tenant in self.put_off else int(tenant in self.behind)

    def least(self) -> str | None:
        """Of those who wait, the tenant that was given least."""
        return self._least.least()

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many requests of each tenant wait."""
        return self._waiting

    def price(self, prefill_tokens: int, decode_tokens: int) -> float:
        return self._input_weight * prefill_tokens + self._output_weight * decode_tokens

    def charge(self, tenant: str, prefill_tokens: int, decode_tokens: int) -> None:
        price = self.price(prefill_tokens, decode_tokens) / self.weight(tenant)
        self._given[tenant] = self.given(tenant) + price
        self.prompt_max = max(self.prompt_max, prefill_tokens)
        self._forget()

    def enter(self, tenant: str) -> None:
        """One more request of this tenant waits."""
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        if self._waiting[tenant] > 1:
            return
        least = self._least.least()
        floor = self.given(self._last if least is None else least)
        most = floor + self._kept * (1 + self.price(self.prompt_max, 0)) / self.weight(tenant)
        self._given[tenant] = min(max(self.given(tenant), floor), most)
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

    def head_of(self, tenant: str) -> Request | None:
        """The first of this tenant's."""
        lane = self._tenants.get(tenant)
        return None if lane is None else lane.head(0.0)

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
    ) -> Iterator[tuple[int, float, int, Request]]:
        """When each one's turn comes; numbers are all different."""
        given, weight = self._accounts.given(tenant), self._accounts.weight(tenant)
        row = self._accounts.row(tenant)
        for request in lane:
            yield row, given, request.number, request
            given += self._accounts.price(request.input_tokens, 0) / weight

    def ahead_tokens(
        self, request: Request, ahead: Callable[[Tenant, Request | None], float]
    ) -> float:
        """Input that is served before a newcomer: of its own tenant what is `ahead` of it, of
        others' (`ahead` of nobody: all they have) until each was given more; of equals, as those
        are who were lifted to the same account, who came first is served first."""
        accounts, own = self._accounts, request.spec.tenant
        lane = self._tenants.get(own)
        mine = ahead(lane, request) if lane is not None else 0.0
        given = accounts.given(own)
        if lane is None:  # it will be lifted
            given = max(given, min(map(accounts.given, self._tenants), default=given))
        until = given + accounts.price(1, 0) * mine / accounts.weight(own)
        others, turn = 0.0, (accounts.row(own), until)
        for name, other in self._tenants.items():
            if name == own or (accounts.row(name), accounts.given(name)) > turn:
                continue
            all_ = ahead(other, None)
            lead = (until - accounts.given(name)) * accounts.weight(name)
            before = lead / max(1e-9, accounts.price(1, 0)) + all_ / len(other)
            others += min(all_, before) if accounts.row(name) == turn[0] else all_
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
        turns: list[tuple[int, float, int, int]] = []
        requests: list[Request] = []
        for tenant, lane in lanes.items():
            given, weight = self._accounts.given(tenant), self._accounts.weight(tenant)
            row = self._accounts.row(tenant)
            for request in lane:
                turns.append((row, given, request.number, len(requests)))
                requests.append(request)
                given += self._accounts.price(request.input_tokens, 0) / weight
        return [requests[index] for *_, index in sorted(turns)]

    def __len__(self) -> int:
        return self._count

    def _key(self, tenant: str) -> Key:
        head = self._tenants[tenant].head(0.0)
        assert head is not None, tenant
        return self._accounts.row(tenant), self._accounts.given(tenant), head.number


class Accounted(Ranked):
    """A queue that keeps accounts of its tenants."""

    def __init__(self, lane: Callable[[Accounts], Lane], constants: Constants) -> None:
        self._accounts = accounts = Accounts(constants)
        super().__init__(lambda: lane(accounts), constants)

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

    def lead(self, tenant: str, other: str) -> float:
        return self._accounts.given(tenant) - self._accounts.given(other)

    def price(self, tenant: str, prefill_tokens: int, decode_tokens: int) -> float:
        weight = self._accounts.weight(tenant)
        return self._accounts.price(prefill_tokens, decode_tokens) / weight

    @property
    def waiting_tenants(self) -> Mapping[str, int]:
        return self._accounts.waiting

    def weight(self, tenant: str) -> float:
        return self._accounts.weight(tenant)

    def claim(self) -> Claim | None:
        if not self._ranks:
            return None
        first, last = self._ranks[0], self._ranks[-1]
        both = last[2] and (first[0], True, False) in self._lanes
        if first[0] == last[0] and not both:
            name = self._accounts.least()
            lane = self._lanes.get(last)
        else:
            rank = first if first[1] else (first[0], True, False)
            lane = self._lanes.get(rank)
            found = lane.head(0.0) if lane is not None else None
            name = None if found is None else found.spec.tenant
        if name is None:
            return None
        return Claim(name, first[0], lane.head_of(name) if isinstance(lane, Fair) else None)

    def stand_behind(self, crowd: frozenset[str]) -> None:
        gone = self._accounts.behind - crowd
        self._accounts.behind = crowd
        self._again(gone)

    def put_off(self, tenant: str) -> None:
        self._accounts.put_off.add(tenant)

    def let_in(self, tenants: Collection[str]) -> None:
        self._accounts.put_off.difference_update(tenants)
        self._again(tenants)

    @property
    def those_put_off(self) -> Collection[str]:
        return self._accounts.put_off

    def _again(self, tenants: Collection[str]) -> None:
        for lane in self._lanes.values() if tenants else ():
            if isinstance(lane, Fair):
                lane.again(tenants)


class FairQueue(Accounted):
    """Tenants by virtual token counters, and nothing else."""

    def __init__(self, constants: Constants) -> None:
        super().__init__(Fair, constants)
