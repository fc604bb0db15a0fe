"""A worker in virtual time that runs closed, padded batches."""

from collections.abc import Iterable
from random import Random

from services.worker.core.pretend_closed import ClosedEngine, Row
from services.worker.core.pretend_parts import Tally
from shared.messages import Form, RunSlice
from shared.tokens import count
from sim.worker import Mesh, SimWorker

OUT_OF_MEMORY = "out of memory"


class ClosedSimWorker(SimWorker):
    """See the module's text."""

    form: Form = "closed"

    def __init__(self, mesh: Mesh, boot: str, rng: Random, spans: bool = False) -> None:
        super().__init__(mesh, boot, rng, spans)
        self._engine = ClosedEngine(mesh.setup.profile, self._capacity, self._noise)
        self.refused_for_memory = 0

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

    def _positions(self, now: float) -> Iterable[tuple[str, int, int]]:
        return self._engine.positions(now)

    def _advance(self) -> None:
        silent = not self._mesh.setup.streamed
        for over in self._engine.advance(self._world.now):
            if self.spans is not None:
                start = over.at - over.timings.prefill_s - over.timings.decode_s
                self.spans.append((start, over.at, "closed", over.timings.batch_size))
            for told in over.rows:
                self.counts.invalid_tokens += told.invalid_tokens
                self.counts.pad_tokens += told.pad_tokens
            self.counts.batch_rows += len(over.rows)
            self._tell(over.batch_id, over.rows, over.timings, silent)

    def _order(self, order: RunSlice) -> None:
        if not self._new(order.batch_id):
            return
        if self._draining:
            self._done(order.batch_id, (), refused="draining")
            return
        rows = []
        for share in order.orders:
            made = count(share.tokens)
            if self._take_in(share, made):
                row = Row(
                    request_id=share.spec.request_id,
                    attempt=share.attempt,
                    prompt_tokens=count(share.spec.prompt),
                    made=made,
                    lease_tokens=share.lease_tokens,
                    true_length=self._mesh.truth(share.spec.request_id),
                    max_tokens=share.spec.max_tokens,
                )
                rows.append(row)
        if not rows:
            self._done(order.batch_id, ())
        elif self._engine.fits(rows, order.iterations):
            self._engine.start(order.batch_id, rows, order.iterations, self._world.now)
        else:
            self.refused_for_memory += 1
            for row in rows:
                del self._held[row.request_id]
            self._done(order.batch_id, (), refused=OUT_OF_MEMORY)

    def _drop(self, request_id: str, attempt: int) -> None:
        self._engine.drop(request_id, attempt, self._world.now)
