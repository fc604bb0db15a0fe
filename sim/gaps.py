"""Gaps: how far tenants that wait are apart in weighted service, at every step of a scheduler.

Counted by what goes in and out of the core alone: a prompt when it is first placed, output when a
worker reports it, at the prices of `fair`. Two things are held against the bound of `leads` (U:
`lead_prompts` of the largest prompt so far, one where that is off, and a lease for each request
that a tenant had running, the most so far, over its weight): how far one tenant is ahead of another
in the accounts of the core, which may be U; and how much more it was given since both wait, which
may be U of the one and U of the other.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from services.scheduler.core.renewing import margin_of
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import Finished, Rejected, RunSlice, SliceDone, Submit
from sim.leader import Step


class Gaps(list[Step]):
    """A journal that looks at each step and keeps none."""

    def __init__(
        self,
        constants: Constants,
        given: Callable[[str], float],
        block_tokens: int = 1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`given`: the account of a tenant."""
        super().__init__()
        self._constants, self._given, self._weights = constants, given, weights or {}
        self._lease_tokens = constants.slice_tokens + margin_of(constants) + block_tokens - 1
        self._tenant: dict[str, str] = {}
        self._where: dict[str, str] = {}
        """Request to "waits" or "runs"."""
        self._waiting: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._running_max: Counter[str] = Counter()
        self._made: Counter[str] = Counter()
        self._prompt_max = 0
        self._service: dict[str, float] = {}
        self._least: dict[tuple[str, str], float] = {}
        """How much more the one had been given than the other, at least, since both wait."""
        self.steps = 0
        """At which two or more waited."""
        self.lead, self.lead_worst = 0.0, 0.0
        """The largest by the accounts, in weighted tokens, and the largest over its bound."""
        self.gap, self.gap_worst = 0.0, 0.0
        """The largest since both wait, and over its bound."""

    def append(self, step: Step) -> None:
        if isinstance(step.event, Submit):
            spec = step.event.spec
            if spec.request_id not in self._tenant:
                self._tenant[spec.request_id] = spec.tenant
                self._move(spec.request_id, "waits")
        elif isinstance(step.event, SliceDone):
            self._reported(step.event)
        for command in step.commands:
            if isinstance(command, Finished | Rejected):
                self._move(command.request_id, "")
            elif isinstance(command, RunSlice):
                self._placed(command)
        self._compare()

    def bound(self, tenant: str) -> float:
        """U, in weighted tokens."""
        constants = self._constants
        leases = self._running_max[tenant] * self._lease_tokens * constants.fair_output_weight
        prompts = (constants.lead_prompts or 1.0) * self._prompt_max
        return (prompts * constants.fair_input_weight + leases) / self._weights.get(tenant, 1.0)

    def _reported(self, done: SliceDone) -> None:
        for result in done.results:
            name = result.request_id
            end = result.position + tokens.count(result.tokens)
            made, self._made[name] = self._made[name], max(end, self._made[name])
            price = (self._made[name] - made) * self._constants.fair_output_weight
            self._serve(name, price)
            if not result.resident and self._where.get(name) == "runs":
                self._move(name, "waits")

    def _placed(self, order: RunSlice) -> None:
        for share in order.orders:
            name, prompt = share.spec.request_id, tokens.count(share.spec.prompt)
            if name not in self._made:
                self._made[name] = 0
                self._prompt_max = max(self._prompt_max, prompt)
                self._serve(name, prompt * self._constants.fair_input_weight)
            self._move(name, "runs")

    def _serve(self, name: str, price: float) -> None:
        tenant = self._tenant[name]
        given = self._service.get(tenant, 0.0)
        self._service[tenant] = given + price / self._weights.get(tenant, 1.0)

    def _move(self, name: str, where: str) -> None:
        tenant, before = self._tenant[name], self._where.pop(name, "")
        self._waiting[tenant] += (where == "waits") - (before == "waits")
        self._running[tenant] += (where == "runs") - (before == "runs")
        self._running_max[tenant] = max(self._running_max[tenant], self._running[tenant])
        if where:
            self._where[name] = where

    def _compare(self) -> None:
        waiting = sorted(tenant for tenant, count in self._waiting.items() if count)
        before, self._least = self._least, {}
        self.steps += len(waiting) > 1
        for one in waiting:
            bound = self.bound(one)
            for other in waiting:
                if one == other:
                    continue
                lead = self._given(one) - self._given(other)
                apart = self._service.get(one, 0.0) - self._service.get(other, 0.0)
                least = self._least[one, other] = min(apart, before.get((one, other), apart))
                both = max(1.0, bound + self.bound(other))
                self.lead = max(self.lead, lead)
                self.lead_worst = max(self.lead_worst, lead / max(1.0, bound))
                self.gap = max(self.gap, apart - least)
                self.gap_worst = max(self.gap_worst, (apart - least) / both)
