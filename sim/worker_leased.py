"""A worker in virtual time whose batch is continuous: leases, renewals, parking."""

from collections.abc import Iterable
from random import Random

from services.worker.core.pretend import LeasedEngine
from services.worker.core.pretend_parts import Tally
from shared.messages import Form, RunSlice
from shared.tokens import count
from sim.worker import Mesh, SimWorker

PAUSED_MAX_S = 30.0
"""A lease that is used up and not renewed for so long is over: nobody seems to remember it."""


class LeasedSimWorker(SimWorker):
    """See the module's text."""

    form: Form = "leased"

    def __init__(self, mesh: Mesh, boot: str, rng: Random, spans: bool = False) -> None:
        super().__init__(mesh, boot, rng, spans)
        setup = mesh.setup
        self._engine = LeasedEngine(
            setup.profile,
            self._capacity,
            setup.block_tokens_each,
            self._noise,
            spans=self.spans,
            prefix_cache=setup.prefix_cache,
            composes_after_s=setup.composes_after_s,
        )

    @property
    def tally(self) -> Tally:
        return self._engine.tally

    @property
    def kv_tokens(self) -> int:
        return self._engine.kv_tokens

    @property
    def running(self) -> int:
        return self._engine.running

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    def last_token_at(self, request_id: str) -> float | None:
        return self._engine.last_token_at(request_id, self._world.now)

    def _next_at(self) -> float | None:
        return self._engine.next_at()

    def _until(self, request_id: str) -> int:
        return self._engine.until_of(request_id)

    def _positions(self, now: float) -> Iterable[tuple[str, int, int]]:
        return self._engine.positions(now)

    def _advance(self) -> None:
        progress = self._engine.advance(self._world.now)
        if not progress:
            return
        for told in progress:
            leaving = not told.resident and told.request_id in self._leaving
            if leaving:
                self._leaving.discard(told.request_id)
                self.counts.moves += told.finish_reason is None
            elif not told.resident and told.finish_reason is None:
                self.counts.evictions += 1
                evicted = self.counts.evicted
                evicted[told.request_id] = evicted.get(told.request_id, 0) + 1
        self._tell("", progress, self._engine.take_timings())

    def _order(self, order: RunSlice) -> None:
        engine, now = self._engine, self._world.now
        engine.configure(order.margin_tokens, order.iteration_tokens, order.prefill_first)
        for renewal in order.renewals:
            self.counts.slices += engine.renew(
                renewal.request_id, renewal.attempt, renewal.until, now
            )
        if not order.orders or not self._new(order.batch_id):
            return
        if self._draining:
            self._done(order.batch_id, (), refused="draining")
            return
        for share in order.orders:
            made = count(share.tokens)
            if self._take_in(share, made):
                engine.add(
                    share.spec.request_id,
                    share.attempt,
                    prompt_tokens=count(share.spec.prompt),
                    made=made,
                    lease_tokens=share.lease_tokens,
                    true_length=self._mesh.truth(share.spec.request_id),
                    max_tokens=share.spec.max_tokens,
                    now=now,
                )

    def _tidy(self) -> None:
        """Leases have a longest duration too: a Drop or a Park may have been lost."""
        for request_id, attempt in self._engine.paused_since(self._world.now - PAUSED_MAX_S):
            self._engine.park(request_id, attempt, self._world.now)
        self._arm()

    def _park(self, request_id: str, attempt: int) -> None:
        self._engine.park(request_id, attempt, self._world.now)

    def _drop(self, request_id: str, attempt: int) -> None:
        self._engine.drop(request_id, attempt, self._world.now)
