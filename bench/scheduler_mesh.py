"""The mesh around a scheduler's core whose calls are timed: what its workers would say.

Nothing is simulated but the messages. `bench.scheduler_cost` says what is measured.
"""

import time
from dataclasses import dataclass, field
from random import Random

from bench.scheduler_requests import MODEL, USUAL, Load
from services.scheduler.core.policies.pacing import PACINGS
from services.scheduler.core.presets import Preset
from services.scheduler.core.scheduler import Scheduler
from shared import tokens
from shared.messages import (
    Park,
    RunSlice,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    SliceResult,
    SliceTimings,
    Submit,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)

BLOCK_TOKENS = 16
ROUND_S = 0.5
"""Between rounds by the clock: in it the workers end about what a round gives them."""
EVENT_GAP_S = 0.0005
"""Between two reports: a thousand workers, each heard of twice a second."""
LEASES_REPORTED = 3
"""Progress reports in a message, beside one end."""


@dataclass(slots=True)
class BenchMesh:
    """The core and what its workers would say."""

    preset: Preset
    rng: Random
    core: Scheduler
    load: Load = USUAL
    now: float = 0.0
    sent: int = 0
    placed: int = 0
    seconds: list[float] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    """The longest call of each kind of event; of the clock's deadlines: empty."""
    leases: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Worker to request to (attempt, position, until)."""
    batches: dict[str, list[RunSlice]] = field(default_factory=dict)
    parks: list[Park] = field(default_factory=list)
    queue: int = 0
    """How many are to wait when a round begins."""
    open_least: int = 0
    rounds: int = 0
    round_s: float = 0.0
    """Of the round that is being made, so far."""
    round_s_max: float = 0.0
    waiting_least: int = 1 << 62
    forecasts: int = 0

    def say(self, event: SchedulerEvent | None) -> None:
        """One timed call."""
        core, book = self.core, self.core.books.rounds
        making, last_at, pool = book.making, book.last_at, len(core.books.requests.pool)
        began = time.process_time()
        commands = core.wake(self.now) if event is None else core.handle(event, self.now)
        seconds = time.process_time() - began
        self.seconds.append(seconds)
        kind = "" if event is None else type(event).__name__
        self.slowest[kind] = max(seconds, self.slowest.get(kind, 0.0))
        if making is None and (book.making is not None or book.last_at != last_at):
            self.rounds += 1
            self.round_s = 0.0
            self.waiting_least = min(self.waiting_least, pool)
        self.round_s += seconds
        if making is not None or book.making is not None:
            self.round_s_max = max(self.round_s_max, self.round_s)
        for command in commands:
            self._obey(command)

    @property
    def timed(self) -> bool:
        """Rounds of closed batches come by the clock, not by what workers say."""
        return self.preset.form == "closed" and not PACINGS[self.preset.pacing].deals

    def round_is_near(self) -> bool:
        """Whoever is to be in the next round has to be there now."""
        book = self.core.books.rounds
        return book.making is None and self.now + EVENT_GAP_S >= book.last_at + ROUND_S

    def fill_up(self) -> None:
        """As many wait, and are open, as are to."""
        requests = self.core.books.requests
        while len(requests.pool) < self.queue or len(requests.open) < self.open_least:
            self.submit()

    def pass_time(self, seconds: float) -> None:
        """Keep the deadlines on the way."""
        end = self.now + seconds
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.say(None)
        self.now = end
        parks, self.parks = self.parks, []
        for park in parks:
            self._parked(park)

    def submit(self) -> None:
        """One more request."""
        self.sent += 1
        spec = self.load.spec(self.sent, self.rng)
        self.say(Submit(spec=spec, told=self.load.told))

    def beat(self, name: str) -> None:
        """A worker's sign of life."""
        info = WorkerInfo(
            worker=name,
            name=name,
            engine="bench",
            forms=(self.preset.form,),
            model=MODEL,
            context_tokens_max=self.load.kv_tokens,
            kv_block_tokens=BLOCK_TOKENS if self.preset.form == "leased" else 1,
            shares_prefixes=self.load.sharing,
        )
        self.say(WorkerBeat(info=info, memory=self._memory()))

    def foretell(self) -> None:
        """What the estimator says."""
        self.forecasts += 1
        forecast = self.load.forecast(self.forecasts, self.rng)
        if forecast is not None:
            self.say(forecast)

    def report(self, name: str) -> None:
        """A worker's next report."""
        if self.preset.form == "closed":
            self._batch_ends(name)
        else:
            self._leases_go_on(name)

    def _obey(self, command: SchedulerCommand) -> None:
        if isinstance(command, Park):
            self.parks.append(command)
        if not isinstance(command, RunSlice):
            return
        self.placed += len(command.orders)
        if command.form == "closed":
            self.batches.setdefault(command.worker, []).append(command)
            return
        held = self.leases.setdefault(command.worker, {})
        for order in command.orders:
            made = tokens.count(order.tokens)
            held[order.spec.request_id] = (order.attempt, made, made + order.lease_tokens)
        for renewal in command.renewals:
            if renewal.request_id in held:
                attempt, made, _ = held[renewal.request_id]
                held[renewal.request_id] = (attempt, made, renewal.until)

    def _parked(self, park: Park) -> None:
        lease = self.leases.get(park.worker, {}).pop(park.request_id, None)
        if lease is not None:
            attempt, made, _ = lease
            result = SliceResult(request_id=park.request_id, attempt=attempt, position=made)
            self.say(self._done(park.worker, "", (result,)))

    def _leases_go_on(self, name: str) -> None:
        held = self.leases.get(name, {})
        chosen = self.rng.sample(sorted(held), min(len(held), LEASES_REPORTED + 1))
        results = []
        for place, request_id in enumerate(chosen):
            attempt, made, until = held[request_id]
            ends = place == 0
            upto = until if ends else max(made, until - 1)
            results.append(
                SliceResult(
                    request_id=request_id,
                    attempt=attempt,
                    position=made,
                    tokens=tokens.pack([0] * (upto - made)),
                    finish_reason="stop" if ends else None,
                    resident=not ends,
                )
            )
            if ends:
                del held[request_id]
            else:
                held[request_id] = (attempt, upto, until)
        if results:
            self.say(self._done(name, "", tuple(results)))

    def _batch_ends(self, name: str) -> None:
        waiting = self.batches.get(name)
        if not waiting:
            return
        batch = waiting.pop(0)
        results = tuple(
            SliceResult(
                request_id=order.spec.request_id,
                attempt=order.attempt,
                position=tokens.count(order.tokens),
                tokens=tokens.pack([0] * order.lease_tokens),
                finish_reason="stop" if self.rng.random() < 0.3 else None,
            )
            for order in batch.orders
        )
        self.say(self._done(name, batch.batch_id, results, batch))

    def _memory(self) -> WorkerMemory:
        return WorkerMemory(kv_tokens_capacity=self.load.kv_tokens)

    def _done(
        self,
        name: str,
        batch_id: str,
        results: tuple[SliceResult, ...],
        batch: RunSlice | None = None,
    ) -> SliceDone:
        timings = SliceTimings()
        if batch is not None:
            longest = max(
                tokens.count(o.spec.prompt) + tokens.count(o.tokens) for o in batch.orders
            )
            timings = SliceTimings(
                prefill_s=1e-4 * len(batch.orders) * longest + 0.02,
                decode_s=0.03 * batch.iterations,
                iterations=batch.iterations,
                input_tokens_max=longest,
                batch_size=len(batch.orders),
            )
        return SliceDone(
            epoch=1,
            worker=name,
            batch_id=batch_id,
            form=self.preset.form,
            results=results,
            timings=timings,
            memory=self._memory(),
        )
