"""The board: what balancing and pacing look at, one place a worker, as arrays.

With a thousand workers a loop over them for every request would cost more than everything else,
so the few numbers that decide where a request goes, or whether a round of closed batches is due,
are kept here and compared all at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.scheduler.core.policies.balancing import Gauges
from services.scheduler.core.workers import Worker
from shared.messages import Form, WaitsFor

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]
BoolArray = np.ndarray[tuple[int], np.dtype[np.bool_]]
IntArray = np.ndarray[tuple[int], np.dtype[np.intp]]


def _empty() -> FloatArray:
    return np.zeros(0, dtype=np.float64)


@dataclass(slots=True)
class Board:
    """Places are numbered; a worker that leaves gives its place up, and later ones move up."""

    form: Form
    workers: list[Worker] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    """Boot id to place."""
    gauges: Gauges = field(default_factory=Gauges)
    free: FloatArray = field(default_factory=_empty)
    """KV tokens that no lease reserves; minus infinity: this worker gets nothing now."""
    refused: FloatArray = field(default_factory=_empty)
    """The least input tokens that this worker's gate has refused since its leases last changed."""
    most: FloatArray = field(default_factory=_empty)
    """Requests that its engine runs at once."""
    rests_until: FloatArray = field(default_factory=_empty)
    """After a refused order."""
    under_way: FloatArray = field(default_factory=_empty)
    """Leased: input tokens whose prefill is under way,"""
    since: FloatArray = field(default_factory=_empty)
    """and since when."""
    holds: FloatArray = field(default_factory=_empty)
    """Leased: the most tokens of one request that it can serve."""
    batches: FloatArray = field(default_factory=_empty)
    """Closed: batches given and not answered."""
    loads: FloatArray = field(default_factory=_empty)
    """Closed: seconds of work in them, by estimate."""
    sharing: int = 0
    """Workers that share the KV of equal beginnings."""
    prefill_token_s: float = 1e-4
    """Seconds per token of input, as the reports tell."""
    mean: float = 0.0
    """Expected output tokens of a request; 0: not known."""
    changed: dict[str, Worker] = field(default_factory=dict)
    """Workers whose line is not true any more; it is written when somebody looks."""

    def join(self, worker: Worker) -> None:
        """A new worker takes the last place."""
        self.places[worker.info.worker] = len(self.workers)
        self.workers.append(worker)
        self.gauges.append()
        self.free = np.append(self.free, 0.0)
        self.refused = np.append(self.refused, np.inf)
        self.rests_until = np.append(self.rests_until, worker.cool_until)
        self.most = np.append(self.most, worker.info.batch_size_max or np.inf)
        self.under_way = np.append(self.under_way, 0.0)
        self.since = np.append(self.since, 0.0)
        self.holds = np.append(self.holds, 0.0)
        self.batches = np.append(self.batches, 0.0)
        self.loads = np.append(self.loads, 0.0)
        self.gauges.mean_output[-1] = self.mean
        self.sharing += worker.info.shares_prefixes
        self.update(worker)

    def leave(self, name: str) -> None:
        """It is gone."""
        place = self.places.pop(name, None)
        if place is None:
            return
        self.sharing -= self.workers[place].info.shares_prefixes
        del self.workers[place]
        self.gauges.delete(place)
        self.free = np.delete(self.free, place)
        self.refused = np.delete(self.refused, place)
        self.rests_until = np.delete(self.rests_until, place)
        self.most = np.delete(self.most, place)
        self.under_way = np.delete(self.under_way, place)
        self.since = np.delete(self.since, place)
        self.holds = np.delete(self.holds, place)
        self.batches = np.delete(self.batches, place)
        self.loads = np.delete(self.loads, place)
        self.places = {worker.info.worker: i for i, worker in enumerate(self.workers)}

    def update(self, worker: Worker) -> None:
        """Something about a worker has changed."""
        self.changed[worker.info.worker] = worker

    def written(self) -> Gauges:
        """The gauges, with all changes written down."""
        if self.changed:
            for name, worker in self.changed.items():
                place = self.places.get(name)
                if place is not None and self.workers[place] is worker:
                    self._write(worker, place)
            self.changed.clear()
        return self.gauges

    def _write(self, worker: Worker, place: int) -> None:
        if self.form == "closed":
            self._update_closed(worker, place)
            return
        credit, gauges = worker.credit, self.gauges
        block = credit.block_tokens
        used, total = credit.blocks * block, worker.memory.kv_tokens_capacity
        gauges.running[place] = len(credit.leases)
        gauges.kv_used[place] = used
        gauges.kv_total[place] = total
        gauges.backlog[place] = credit.backlog_tokens
        self.under_way[place] = credit.under_way_tokens()
        self.since[place] = credit.prefill_since
        self.holds[place] = min(worker.info.context_tokens_max, total // block * block)
        line = worker.line
        gauges.waiting[place] = len(line) if line is not None else 0
        gauges.waiting_tokens[place] = worker.waiting_tokens
        self.free[place] = total - used if self._takes_orders(worker) else -np.inf
        self.rests_until[place] = worker.cool_until

    def _update_closed(self, worker: Worker, place: int) -> None:
        """Of a closed policy only what rounds ask for."""
        head = worker.head()
        self.gauges.running[place] = len(head.request_ids) if head is not None else 0
        self.batches[place] = len(worker.batches)
        self.loads[place] = worker.load_s
        self.free[place] = 0.0 if self._takes_orders(worker) else -np.inf
        self.rests_until[place] = worker.cool_until

    def _takes_orders(self, worker: Worker) -> bool:
        return self.form in worker.info.forms and not worker.draining

    @property
    def running(self) -> int:
        """Requests with a lease, or in the batches that run; those behind them still wait."""
        self.written()
        return int(self.gauges.running.sum())

    def usable(self, batches_below: int, now: float) -> IntArray:
        """Closed: places of workers that may be given a batch now."""
        self.written()
        return np.flatnonzero(
            (self.free > -np.inf) & (self.rests_until <= now) & (self.batches < batches_below)
        )

    def rested_at(self, now: float) -> float | None:
        """When the first worker that refused an order may have another; None: none is resting."""
        self.written()
        resting = self.rests_until[(self.free > -np.inf) & (self.rests_until > now)]
        return float(resting.min()) if resting.size else None

    @property
    def taking(self) -> int:
        """Workers that take orders, now or after a rest."""
        self.written()
        return int(np.count_nonzero(self.free > -np.inf))

    def least_load_s(self) -> float:
        """Closed: of the workers that take orders, the least work that one has; 0: none takes."""
        self.written()
        loads = self.loads[self.free > -np.inf]
        return float(loads.min()) if loads.size else 0.0

    def set_mean_output(self, tokens: float) -> None:
        """Expected output of a request, from the history."""
        self.mean = tokens
        self.gauges.mean_output[:] = tokens

    def set_pace(self, prefill_token_s: float, token_s: float) -> None:
        """Seconds per token, as the reports tell; one pace for all workers."""
        self.prefill_token_s = self.gauges.prefill_token_s[:] = prefill_token_s
        self.gauges.iteration_s[:] = token_s

    def foresee(self, worker: Worker, *, peak_tokens: float, busy_s: float) -> None:
        """What its leases will still need, by prediction."""
        place = self.places.get(worker.info.worker)
        if place is not None:
            self.gauges.peak[place] = peak_tokens
            self.gauges.busy_s[place] = busy_s

    def know_cached(self, tokens: Mapping[str, int]) -> None:
        """Of the next request to be placed: worker to input tokens that it is thought to have."""
        cached = self.gauges.cached
        cached[:] = 0.0
        for name, known in tokens.items():
            place = self.places.get(name)
            if place is not None:
                cached[place] = known

    def reopen(self, worker: Worker) -> None:
        """Something changed there: what was refused may be tried again."""
        place = self.places.get(worker.info.worker)
        if place is not None:
            self.refused[place] = np.inf

    def holds_most(self) -> float:
        """The most tokens of one request that any worker can serve."""
        self.written()
        return float(self.holds.max(initial=0.0))

    def able(self, now: float) -> IntArray:
        """Places of workers that may be given orders now."""
        self.written()
        return np.flatnonzero((self.free > -np.inf) & (self.rests_until <= now))

    def with_room(
        self,
        need_tokens: int,
        input_tokens: int,
        backlog_below: float,
        running_below: float,
        now: float,
        estimated: bool = False,
    ) -> IntArray:
        """Places that may take a request: so many KV tokens are free, less than so much prefill
        is queued, and no like request has been refused there lately."""
        self.written()
        return np.flatnonzero(
            (self.free >= need_tokens)
            & (self._backlog(now, estimated=estimated) < backlog_below)
            & self._has_places(running_below)
            & (self.refused > input_tokens)
            & (self.rests_until <= now)
        )

    def with_room_each(
        self,
        needs: Sequence[tuple[int, int]],
        backlog_below: float,
        running_below: float,
        now: float,
        estimated: bool = False,
    ) -> set[int]:
        """For which of several (need, input), by number, `with_room` finds anybody; all at once."""
        self.written()
        rest = (
            (self._backlog(now, estimated=estimated) < backlog_below)
            & self._has_places(running_below)
            & (self.rests_until <= now)
        )
        free, refused = self.free[rest], self.refused[rest]
        asked = np.array(needs, dtype=np.float64).reshape(-1, 2, 1)
        fitting = (free >= asked[:, 0]) & (refused > asked[:, 1])
        found: IntArray = np.flatnonzero(fitting.any(axis=1))
        return set(found.tolist())

    def _has_places(self, running_below: float) -> BoolArray:
        return self.gauges.running < np.minimum(running_below, self.most)

    def _backlog(self, now: float, *, estimated: bool) -> FloatArray:
        """Prefill that is queued; `estimated`: less what must be done of that under way."""
        if not estimated:
            return self.gauges.backlog
        done = np.maximum(0.0, now - self.since) / self.prefill_token_s
        return self.gauges.backlog - np.minimum(self.under_way, done)

    def least_backlog(self, now: float, *, estimated: bool) -> float:
        """Prefill queued on the worker that takes orders and has least of it."""
        self.written()
        taking = self.free > -np.inf
        return float(self._backlog(now, estimated=estimated)[taking].min(initial=np.inf))

    def least_running(self) -> int:
        """Requests on the worker that takes orders and runs fewest."""
        self.written()
        running = self.gauges.running[self.free > -np.inf]
        return int(running.min()) if running.size else 0

    def runs_short_at(self, backlog_below: float, now: float) -> float | None:
        """When the first worker that has too much prefill queued now should have less than so much,
        without a word of it; None: none should."""
        gauges = self.written()
        over = gauges.backlog - backlog_below
        at = self.since + (over + 1) * self.prefill_token_s
        later = at[(over >= 0) & (over < self.under_way) & (at > now) & (self.free > 0)]
        return float(later.min()) if later.size else None

    def hindrance(
        self,
        need_tokens: int,
        input_tokens: int,
        backlog_below: float,
        running_below: float,
        now: float,
        estimated: bool = False,
    ) -> WaitsFor:
        """Why `with_room` found nobody: the first of these that leaves no worker."""
        self.written()
        left = (self.free > -np.inf) & (self.rests_until <= now)
        steps: tuple[tuple[WaitsFor, BoolArray], ...] = (
            ("workers", left),
            ("room", self.free >= need_tokens),
            ("places", self._has_places(running_below)),
            ("prefill", self._backlog(now, estimated=estimated) < backlog_below),
        )
        for name, passing in steps:
            left = left & passing
            if not left.any():
                return name
        return "memory"
