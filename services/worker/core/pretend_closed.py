"""A pretend worker that runs closed batches: padded to the longest input, over when all have ended.

Batches run one after the other. A batch of N inputs up to L holds N x (L + S) KV slots from its
begin to its end, as the `padded` engine allocates them. It returns early when every row has ended
or used its lease up; rows that end before others make invalid tokens until then.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.worker.core.pretend_parts import Costs, Noise, Progress, Tally, no_noise
from shared.memory import closed_batch_tokens
from shared.messages import FinishReason, SliceTimings


@dataclass(slots=True)
class Row:
    """One request of a batch."""

    request_id: str
    attempt: int
    prompt_tokens: int
    made: int
    """Output tokens before this slice."""
    lease_tokens: int
    true_length: int
    """Where the model would end it by itself; only the engine's owner knows it."""
    max_tokens: int
    cancelled: bool = False
    limit: int = 0
    """Tokens it makes in this slice."""

    @property
    def input_tokens(self) -> int:
        return self.prompt_tokens + self.made

    @property
    def reason(self) -> FinishReason | None:
        """Why it is over after this slice; None if it goes on."""
        if self.cancelled:
            return "cancelled"
        made = self.made + self.limit
        if made >= self.true_length:
            return "stop"
        return "length" if made >= self.max_tokens else None


@dataclass(slots=True)
class _Batch:
    batch_id: str
    rows: Sequence[Row]
    iterations: int
    arrived_at: float
    start: float = 0.0
    end: float = 0.0
    factor: float = 1.0
    input_tokens_max: int = 0
    runs: int = 0
    """Iterations until the last row is done."""


@dataclass(frozen=True, slots=True)
class BatchOver:
    """What is to be reported of one batch."""

    batch_id: str
    at: float
    rows: tuple[Progress, ...]
    timings: SliceTimings


class ClosedEngine:
    """See the module's text. `noise` draws the factor of a batch from the caller's generator."""

    def __init__(self, costs: Costs, kv_tokens: int, noise: Noise = no_noise) -> None:
        self.kv_tokens_max = kv_tokens
        self.tally = Tally()
        self._costs = costs
        self._noise = noise
        self._queue: deque[_Batch] = deque()

    def fits(self, rows: Sequence[Row], iterations: int) -> bool:
        """May this batch run here, with the whole memory for itself?"""
        longest = max(row.input_tokens for row in rows)
        return closed_batch_tokens(len(rows), longest, iterations) <= self.kv_tokens_max

    def start(self, batch_id: str, rows: Sequence[Row], iterations: int, now: float) -> None:
        """Take a batch that fits behind what waits here."""
        assert self.fits(rows, iterations), "a batch larger than the memory"
        for row in rows:
            rest = min(row.true_length, row.max_tokens) - row.made
            row.limit = max(0, min(row.lease_tokens, iterations, rest))
        self._queue.append(_Batch(batch_id, rows, iterations, now))
        if len(self._queue) == 1:
            self._begin(now)

    def drop(self, request_id: str, attempt: int, now: float) -> None:
        """No more tokens for attempts up to this one; its row idles until the batch ends."""
        for place, batch in enumerate(self._queue):
            for row in batch.rows:
                if row.request_id != request_id or row.attempt > attempt or row.cancelled:
                    continue
                made = self._iterations_by(now) if place == 0 else 0
                if made >= row.limit > 0 and place == 0:
                    continue  # it has ended already, and will say so
                row.cancelled, row.limit = True, made
                if place == 0:
                    self._set_end(batch, max(made + (now > batch.start), 1))

    def next_at(self) -> float | None:
        """When to call `advance` next; `drop` may bring it forward."""
        return self._queue[0].end if self._queue else None

    def advance(self, now: float) -> list[BatchOver]:
        """The batches that ended by `now`; the next ones have begun."""
        over = []
        while self._queue and self._queue[0].end <= now:
            batch = self._queue.popleft()
            over.append(self._over(batch))
            if self._queue:
                self._begin(batch.end)
        return over

    def positions(self, now: float) -> Iterator[tuple[str, int, int]]:
        """(request, attempt, output tokens) of every row that runs or waits here."""
        done = self._iterations_by(now)
        for batch in self._queue:
            for row in batch.rows:
                if not row.cancelled:
                    yield row.request_id, row.attempt, row.made + min(done, row.limit)
            done = 0

    def position_of(self, request_id: str, attempt: int, now: float) -> int | None:
        """Output tokens of one row; None if it is not here."""
        for known, known_attempt, position in self.positions(now):
            if (known, known_attempt) == (request_id, attempt):
                return position
        return None

    def last_token_at(self, request_id: str, now: float) -> float | None:
        """When its newest token was there; None if it has made none in a batch that is here."""
        done = self._iterations_by(now)
        for row in self._queue[0].rows if self._queue else ():
            if row.request_id == request_id and min(done, row.limit):
                return self._token_at(self._queue[0], min(done, row.limit))
        return None

    @property
    def running(self) -> int:
        """Rows of the batch that runs."""
        return len(self._queue[0].rows) if self._queue else 0

    @property
    def waiting(self) -> int:
        """Rows in batches behind it."""
        return sum(len(batch.rows) for batch in self._queue) - self.running

    @property
    def kv_tokens(self) -> int:
        """Slots in use."""
        return self._slots(self._queue[0]) if self._queue else 0

    # ------------------------------------------------------------------------------ batches

    def _begin(self, now: float) -> None:
        batch = self._queue[0]
        batch.start = now
        batch.input_tokens_max = max(row.input_tokens for row in batch.rows)
        batch.factor = self._noise(batch.iterations)
        self._set_end(batch, 1)
        self.tally.count_memory(now, now, 0, self._slots(batch))

    def _set_end(self, batch: _Batch, least: int) -> None:
        """It runs until its last row is done; `least`: with the iteration that runs now."""
        longest = max(row.limit for row in batch.rows)
        batch.runs = max(longest, min(least, batch.runs or batch.iterations))
        batch.end = self._token_at(batch, batch.runs)

    def _token_at(self, batch: _Batch, iteration: int) -> float:
        """When this iteration, counted from 1, is over."""
        seconds = self._costs.padded_s(len(batch.rows), batch.input_tokens_max, iteration)
        return batch.start + batch.factor * seconds

    def _iterations_by(self, now: float) -> int:
        """Whole iterations of the running batch that are over by `now`."""
        if not self._queue:
            return 0
        batch = self._queue[0]
        ends = range(1, batch.runs + 1)
        return bisect_right(ends, now, key=lambda iteration: self._token_at(batch, iteration))

    @staticmethod
    def _slots(batch: _Batch) -> int:
        return closed_batch_tokens(len(batch.rows), batch.input_tokens_max, batch.iterations)

    def _over(self, batch: _Batch) -> BatchOver:
        tally, rows = self.tally, batch.rows
        size, taken_s, slots = len(rows), batch.end - batch.start, self._slots(batch)
        prefill_s = self._token_at(batch, 1) - batch.start
        tally.busy_s += taken_s
        tally.iterations += batch.runs
        tally.sequence_iterations += batch.runs * size
        tally.prefill_tokens += size * batch.input_tokens_max
        tally.decode_tokens += size * (batch.runs - 1)
        tally.count_memory(batch.start, batch.end, slots, slots)
        tally.batches += 1
        tally.early_returns += batch.runs < batch.iterations
        timings = SliceTimings(
            queue_s=batch.start - batch.arrived_at,
            prefill_s=prefill_s,
            decode_s=taken_s - prefill_s,
            iterations=batch.runs,
            input_tokens_max=batch.input_tokens_max,
            batch_size=size,
        )
        progress = tuple(self._progress(batch, row) for row in rows)
        return BatchOver(batch.batch_id, batch.end, progress, timings)

    def _progress(self, batch: _Batch, row: Row) -> Progress:
        made = row.limit
        last_at = self._token_at(batch, made) if made else 0.0
        return Progress(
            request_id=row.request_id,
            attempt=row.attempt,
            at=batch.end,
            position=row.made,
            tokens=made,
            first=made > 0,
            finish_reason=row.reason,
            gap_s=last_at - self._token_at(batch, made - 1) if made > 1 else 0.0,
            invalid_tokens=batch.runs - made,
            pad_tokens=batch.input_tokens_max - row.input_tokens,
            first_at=self._token_at(batch, 1) if made else 0.0,
            last_at=last_at,
        )
