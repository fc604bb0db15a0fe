"""An engine whose memory is counted slot by slot: what a worker of a storm computes with.

It speaks the protocol of `services.worker.engines.api` and runs both forms. Its truth is its own:
what is really in memory is counted from positions, what is promised from leases, and where a
promise does not fit it says so as a real engine does: it refuses new orders, and evicts the newest
lease when a token has no slot.
"""

from dataclasses import dataclass

from services.worker.engines.api import (
    BadOrder,
    EngineInfo,
    LeaseEnd,
    OutOfMemory,
    SliceEnd,
    StepReport,
    StepTokens,
)
from shared.memory import closed_batch_tokens, leased_blocks
from shared.messages import (
    FinishReason,
    RequestSpec,
    RunSlice,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from shared.tokens import count, unpack
from sim.storm.asked import Texts
from sim.text import output

PREFILL_TOKENS = 64
"""Of one row and iteration."""


@dataclass(slots=True, eq=False)
class Row:
    """One request here."""

    spec: RequestSpec
    attempt: int
    prompt_tokens: int
    begin: int
    position: int
    until: int
    text: int
    """Where its text goes on, less the position."""
    whole: int
    number: int
    filled: int = 0
    parked: bool = False
    cancelled: bool = False
    finish: FinishReason | None = None

    @property
    def paused(self) -> bool:
        return self.position >= self.until

    def slots(self) -> int:
        """Keys and values that are there: the last token's are not."""
        if self.position > self.begin:
            return self.prompt_tokens + self.position - 1
        return self.filled


@dataclass(slots=True)
class Batch:
    """The closed batch that runs."""

    order: RunSlice
    rows: list[Row]
    iterations: int
    slots: int
    runs: int = 0


@dataclass(slots=True)
class Counts:
    """What a checker wants to know."""

    evicted: int = 0
    out_of_memory: int = 0
    peak_slots: int = 0
    over: int = 0
    """Iterations that held more than there is."""


class StormEngine:
    """See the module's text. A step makes up to `tokens_per_step` tokens of each row."""

    def __init__(
        self, info: EngineInfo, slots: int, texts: Texts, step_s: float, tokens_per_step: int
    ) -> None:
        self.counts = Counts()
        self._info = info
        self._slots = slots
        self._block = info.kv_block_tokens
        self._texts = texts
        self._step_s, self._each = step_s, tokens_per_step
        self._rows: dict[str, Row] = {}
        self._batch: Batch | None = None
        self._taken = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def busy(self) -> bool:
        return self._batch is not None or any(
            row.parked or not row.paused for row in self._rows.values()
        )

    @property
    def held(self) -> list[tuple[str, int]]:
        """(request, attempt) of everything here."""
        rows = self._batch.rows if self._batch is not None else self._rows.values()
        return [(row.spec.request_id, row.attempt) for row in rows]

    def progress(self) -> dict[str, tuple[int, int]]:
        """Request to (tokens, prefilled) of everything here; it changes with work on it."""
        rows = self._batch.rows if self._batch is not None else self._rows.values()
        runs = self._batch.runs if self._batch is not None else 0
        return {row.spec.request_id: (row.position, row.filled + runs) for row in rows}

    # -------------------------------------------------------------------------------- orders

    def start(self, order: RunSlice) -> None:
        """Raises OutOfMemory or BadOrder."""
        if not order.orders:
            raise BadOrder("the batch is empty")
        if order.form == "closed":
            self._start_batch(order)
            return
        rows = [self._row(share) for share in order.orders]
        promised = sum(map(self._promised, (*self._rows.values(), *rows)))
        if promised > self._slots // self._block:
            self.counts.out_of_memory += 1
            raise OutOfMemory(f"{promised} blocks are promised of {self._slots // self._block}")
        self._rows |= {row.spec.request_id: row for row in rows}

    def _start_batch(self, order: RunSlice) -> None:
        rows = [self._row(share) for share in order.orders]
        longest = max(row.prompt_tokens + row.begin for row in rows)
        need = closed_batch_tokens(len(rows), longest, order.iterations)
        if need > self._slots:
            self.counts.out_of_memory += 1
            raise OutOfMemory(f"the batch needs {need} of {self._slots}")
        self._batch = Batch(order, rows, order.iterations, need)
        self.counts.peak_slots = max(self.counts.peak_slots, need)

    def _row(self, share: SliceOrder) -> Row:
        spec, begin = share.spec, count(share.tokens)
        self._taken += 1
        return Row(
            spec=spec,
            attempt=share.attempt,
            prompt_tokens=count(spec.prompt),
            begin=begin,
            position=begin,
            until=min(begin + share.lease_tokens, max(begin, spec.max_tokens)),
            text=self._texts.continued(spec, share.tokens),
            whole=self._texts.whole(spec),
            number=self._taken,
        )

    def _promised(self, row: Row) -> int:
        return leased_blocks(row.prompt_tokens, row.until, self._block)

    def renew(self, request_id: str, until: int) -> None:
        row = self._rows.get(request_id)
        if row is not None and until > row.until:
            row.until = min(until, row.spec.max_tokens)

    def park(self, request_id: str) -> None:
        row = self._rows.get(request_id)
        if row is not None:
            row.parked = True

    def cancel(self, request_id: str) -> None:
        self._rows.pop(request_id, None)
        for row in self._batch.rows if self._batch is not None else ():
            if row.spec.request_id == request_id and row.finish is None:
                row.cancelled, row.finish = True, "cancelled"

    # --------------------------------------------------------------------------------- steps

    def step(self) -> StepReport:
        if self._batch is not None:
            return self._step_batch(self._batch)
        tokens: list[StepTokens] = []
        left: list[LeaseEnd] = []
        for row in list(self._rows.values()):
            if self._rows.get(row.spec.request_id) is not row:
                continue  # evicted by an earlier one
            if row.parked:
                left.append(LeaseEnd(row.spec.request_id, row.attempt))
                del self._rows[row.spec.request_id]
            elif not row.paused:
                left += self._make_room(row)
                if self._rows.get(row.spec.request_id) is row and self._prefilled(row):
                    tokens.append(self._advance(row, min(row.until, row.whole)))
                    if row.finish is not None:
                        del self._rows[row.spec.request_id]
        self._count(sum(row.slots() for row in self._rows.values()))
        return StepReport(
            tokens=tuple(tokens),
            left=tuple(left),
            decode_s=self._step_s,
            batch_size=len(tokens),
        )

    def _make_room(self, row: Row) -> list[LeaseEnd]:
        """Evict the newest until the next tokens of this row have slots."""
        ends: list[LeaseEnd] = []
        while self._used() + self._growth(row) > self._slots // self._block and self._rows:
            newest = max(self._rows.values(), key=lambda each: each.number)
            del self._rows[newest.spec.request_id]
            self.counts.evicted += 1
            ends.append(LeaseEnd(newest.spec.request_id, newest.attempt, evicted=True))
            if newest is row:
                break
        return ends

    def _used(self) -> int:
        return sum(-(-row.slots() // self._block) for row in self._rows.values())

    def _growth(self, row: Row) -> int:
        """Blocks that this row's next step fills beyond those it has."""
        if row.position == row.begin and row.filled < row.prompt_tokens + row.begin:
            after = min(row.filled + PREFILL_TOKENS, row.prompt_tokens + row.begin)
        else:
            after = row.prompt_tokens + min(row.position + self._each, row.until, row.whole) - 1
        return -(-after // self._block) - -(-row.slots() // self._block)

    def _prefilled(self, row: Row) -> bool:
        """Whether it makes tokens in this step; else it fills a chunk."""
        wanted = row.prompt_tokens + row.begin
        if row.position > row.begin or row.filled >= wanted:
            return True
        row.filled = min(wanted, row.filled + PREFILL_TOKENS)
        return False

    def _advance(self, row: Row, most: int) -> StepTokens:
        begin, end = row.position, min(row.position + self._each, most)
        row.position = end
        if end >= row.whole:
            row.finish = "length" if row.whole >= row.spec.max_tokens else "stop"
        return StepTokens(
            request_id=row.spec.request_id,
            attempt=row.attempt,
            position=begin,
            ids=tuple(unpack(output(row.text, begin, end - begin))),
            finish_reason=row.finish,
        )

    def _step_batch(self, batch: Batch) -> StepReport:
        batch.runs += self._each
        tokens = []
        for row in batch.rows:
            most = min(row.until, row.whole)
            if row.finish is None and row.position < most:
                tokens.append(self._advance(row, most))
        live = [row for row in batch.rows if row.finish is None and not row.paused]
        if live and batch.runs < batch.iterations:
            return StepReport(tokens=tuple(tokens), batch_size=len(batch.rows))
        self._batch = None
        self._count(batch.slots)
        end = SliceEnd(
            batch.order.batch_id,
            tuple(self._result(row) for row in batch.rows),
            SliceTimings(
                prefill_s=self._step_s,
                decode_s=self._step_s * batch.runs / self._each,
                iterations=min(batch.runs, batch.iterations),
                input_tokens_max=max(row.prompt_tokens + row.begin for row in batch.rows),
                batch_size=len(batch.rows),
            ),
        )
        return StepReport(tokens=tuple(tokens), ended=(end,), batch_size=len(batch.rows))

    def _result(self, row: Row) -> SliceResult:
        return SliceResult(
            request_id=row.spec.request_id,
            attempt=row.attempt,
            position=row.begin,
            tokens=output(row.text, row.begin, row.position - row.begin),
            finish_reason="cancelled" if row.cancelled else row.finish,
        )

    # -------------------------------------------------------------------------------- memory

    def _count(self, slots: int) -> None:
        self.counts.peak_slots = max(self.counts.peak_slots, slots)
        self.counts.over += slots > self._slots

    def memory(self) -> WorkerMemory:
        used = self._batch.slots if self._batch is not None else self._used() * self._block
        return WorkerMemory(kv_tokens_capacity=self._slots, kv_tokens_used=used)

    def close(self) -> None:
        """Nothing to free."""
