"""A small mesh in virtual time around the scheduler's core, with its own truth and many faults.

Workers make tokens that never repeat: each remembers on which prefix it was computed, so a gateway
that splices two texts is caught at the first wrong token. Workers check what would hurt a real
one: memory, leases, two attempts of a request at once. Faults, while `stormy`: messages are
delayed, repeated, overtaken and (where the protocol mends it) lost.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Accepted,
    Cancel,
    DrainWorker,
    Drop,
    Elected,
    Finished,
    GatewayBeat,
    OrderReturned,
    Park,
    Recall,
    Rejected,
    RequestSpec,
    Resident,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    Stopped,
    Submit,
    TokenBatch,
    TokenRun,
    TokensWanted,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
    decode,
    encode,
)

SILENCE_S = 5.0
STEP_S = 0.01
WAKES_MAX = 1000
"""At one instant; every command schedules a wake-up, and most find nothing to do."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per message."""

    repeat: float = 0.0
    late: float = 0.0
    lose: float = 0.0


CALM = Faults()
STORM = Faults(repeat=0.1, late=0.1, lose=0.05)
MENDED = (
    Recall,
    Resume,
    SchedulerBeat,
    GatewayBeat,
    WorkerBeat,
    TokenBatch,
    TokensWanted,
    SendTokens,
    Drop,
    Park,
    RunSlice,
    SliceDone,
)
"""What may be lost without anybody sending it again by itself."""


@dataclass(slots=True)
class Kept:
    """What a worker keeps of one attempt."""

    position: int
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    ended: bool = False


class Network:
    """The virtual clock and all messages under way."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.faults = CALM
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def carry(self, message: object, deliver: Callable[[object], None]) -> None:
        """Deliver a message, as often and as late as the faults say."""
        body = encode(message)  # type: ignore[arg-type]
        faults, rng = self.faults, self.rng
        if isinstance(message, MENDED) and rng.random() < faults.lose:
            return
        copies = 2 if rng.random() < faults.repeat else 1
        for _ in range(copies):
            delay_s = rng.uniform(0.5, 4.0) if rng.random() < faults.late else 0.001
            self.after(delay_s, lambda: deliver(decode(body)))

    def run_until(self, when: float) -> None:
        while self._heap and self._heap[0][0] <= when:
            at, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            action()
        self.now = max(self.now, when)


class World:
    """One mesh. Everything that asserts something fails the test."""

    def __init__(self, policy: str, seed: int, constants: Constants) -> None:
        self.net = Network(seed)
        self.policy, self.constants = policy, constants
        self.adopted = False
        """A leader took over while leases ran."""
        self.dropped: dict[tuple[str, str], int] = {}
        """By worker and request, up to which attempt the scheduler told it to drop; the word may be
        lost or late, and until it is said again the worker holds more than it should."""
        self.core: Scheduler | None = None
        self.epoch = 0
        self.inbox: list[SchedulerEvent] = []
        self.workers: dict[str, FakeWorker] = {}
        self.gateways: dict[str, FakeGateway] = {}
        self.meaning: dict[int, tuple[str, tuple[int, ...]]] = {}
        """Token id to its request and the prefix it was computed on."""
        self.truth: dict[str, int] = {}
        """Request to its true output length."""
        self.finished: dict[str, list[Finished]] = {}
        self.life_finished: set[str] = set()
        self.transcript: list[SchedulerCommand] = []
        self.boots = itertools.count(1)
        self._woken_at, self._woken = 0.0, 0
        self.elect()

    # ------------------------------------------------------------------ the scheduler's process

    def elect(self) -> None:
        self.epoch += 1
        self.life_finished = set()
        preset = preset_named(self.policy)
        self.adopted |= self.epoch > 1
        truth = self.truth.__getitem__ if preset.needs_truth else None
        self.core = Scheduler(preset, self.constants, truth)
        self._take(self.core.handle(Elected(epoch=self.epoch), self.net.now))
        waiting, self.inbox = self.inbox, []
        for event in waiting:
            self.deliver(event)

    def kill_scheduler(self, away_s: float) -> None:
        if self.core is None:
            return
        self.core = None
        self.net.after(away_s, self.elect)

    def deliver(self, event: SchedulerEvent) -> None:
        if self.core is None:
            self.inbox.append(event)
            return
        self._take(self.core.handle(event, self.net.now))

    def to_scheduler(self, event: SchedulerEvent) -> None:
        self.net.carry(event, self.deliver)  # type: ignore[arg-type]

    def _wake(self, core: Scheduler) -> None:
        if core is self.core:
            deadline = core.deadline()
            assert deadline is not None
            if deadline <= self.net.now:
                self._woken = self._woken + 1 if self._woken_at == self.net.now else 0
                self._woken_at = self.net.now
                assert self._woken < WAKES_MAX, "the core wants to be woken again and again"
                self._take(core.wake(self.net.now))
            else:
                self.net.at(deadline, lambda: self._wake(core))

    def _take(self, commands: Sequence[SchedulerCommand]) -> None:
        core = self.core
        assert core is not None
        for command in commands:
            self.transcript.append(command)
            self._carry_out(command)
        deadline = core.deadline()
        assert deadline is not None
        self.net.at(deadline, lambda: self._wake(core))

    def _carry_out(self, command: SchedulerCommand) -> None:
        match command:
            case RunSlice() | Park() | Drop() | SendTokens() | DrainWorker():
                self._to_worker(command)
            case Recall() | Accepted() | Rejected():
                gateway = self.gateways.get(command.gateway)
                if gateway is not None:
                    self.net.carry(command, gateway.receive)
            case SchedulerBeat():
                for worker in list(self.workers.values()):
                    self.net.carry(command, worker.receive)
                for gateway in list(self.gateways.values()):
                    self.net.carry(command, gateway.receive)
            case Finished():
                assert command.request_id not in self.life_finished, "finished twice"
                self.life_finished.add(command.request_id)
                self.finished.setdefault(command.request_id, []).append(command)

    def _to_worker(self, command: RunSlice | Park | Drop | SendTokens | DrainWorker) -> None:
        core = self.core
        assert core is not None
        worker = self.workers.get(command.worker)
        if isinstance(command, Drop):
            key = command.worker, command.request_id
            self.dropped[key] = max(command.attempt, self.dropped.get(key, 0))
        if worker is None:
            self.net.after(0.01, partial(self._return, command.worker, core))
        else:
            self.net.carry(command, worker.receive)

    def _return(self, worker: str, core: Scheduler) -> None:
        """The broker could not route an order of this leader."""
        if core is self.core:
            self.deliver(OrderReturned(worker=worker))

    # ------------------------------------------------------------------------- the other actors

    @property
    def worker_kind(self) -> "type[FakeWorker]":
        if preset_named(self.policy).form == "closed":
            return FakeWorker
        from tests.core.leased_worker import LeasedWorker  # it is made of parts of this file

        return LeasedWorker

    def add_worker(self, capacity: int = 2000, batch_size_max: int = 0) -> "FakeWorker":
        worker = self.worker_kind(self, f"w{next(self.boots)}", capacity, batch_size_max)
        self.workers[worker.boot] = worker
        worker.beat()
        return worker

    def add_gateway(self) -> "FakeGateway":
        gateway = FakeGateway(self, f"g{next(self.boots)}")
        self.gateways[gateway.boot] = gateway
        gateway.beat()
        return gateway

    def spec_of(self, request_id: str) -> RequestSpec | None:
        """Where a request's tokens go; None if its gateway is gone."""
        for gateway in self.gateways.values():
            if request_id in gateway.ledgers:
                return gateway.ledgers[request_id].spec
        return None

    def open_requests(self) -> list["Ledger"]:
        return [x for g in self.gateways.values() for x in g.ledgers.values() if not x.ended]

    def run(self, seconds: float) -> None:
        self.net.run_until(self.net.now + seconds)

    def run_until_done(self, limit_s: float) -> None:
        """Calm weather until every request has ended; fails if that takes too long."""
        self.net.faults = CALM
        end = self.net.now + limit_s
        while self.open_requests() and self.net.now < end:
            self.run(1.0)
        left = [(ledger.spec.request_id, len(ledger.prefix)) for ledger in self.open_requests()]
        assert not left, f"still open after {limit_s} s: {left}"

    def check_drained(self, settle_s: float | None = None) -> None:
        """After everything has ended: nothing is left in the books but memory of the past."""
        self.run(2 * self.constants.overdue_s + 60 if settle_s is None else settle_s)
        assert self.core is not None
        books = self.core.books
        assert not books.requests.open
        assert not books.requests.pool
        assert [worker.load_s for worker in books.workers.active.values()] == [0.0] * len(
            self.workers
        )
        for active in books.workers.active.values():
            credit = active.credit
            left = (
                credit.blocks,
                credit.parking_blocks,
                credit.backlog_tokens,
                active.waiting_tokens,
            )
            assert left == (0, 0, 0, 0)
            assert not credit.leases
        assert not books.parking
        assert not len(books.lines.central)


class FakeWorker:
    """One worker: a queue of batches, a KV memory, and kept tokens."""

    def __init__(self, world: World, boot: str, capacity: int, batch_size_max: int) -> None:
        self.world, self.boot = world, boot
        self.memory = WorkerMemory(kv_tokens_capacity=capacity)
        self.info = WorkerInfo(
            worker=boot,
            name=boot,
            engine="padded",
            forms=("closed",),
            model="m",
            context_tokens_max=capacity,
            batch_size_max=batch_size_max,
        )
        self.epoch = 0
        self.queue: list[RunSlice] = []
        self.seen: set[str] = set()
        self.kept: dict[tuple[str, int], Kept] = {}
        self.dropped: dict[str, int] = {}
        self.quiet_until = 0.0
        self.draining = False
        self.beats = 0

    @property
    def alive(self) -> bool:
        return self.world.workers.get(self.boot) is self

    def die(self) -> None:
        self.world.workers.pop(self.boot, None)

    def leave(self) -> None:
        """Drain: run what is queued, then say goodbye."""
        self.draining = True

    def beat(self, listed: bool = False) -> None:
        if not self.alive:
            return
        if self.draining and not self.busy:
            self.world.to_scheduler(
                WorkerBeat(info=self.info, memory=self.memory, epoch=self.epoch, leaving=True)
            )
            self.die()
            return
        self.beats += 1
        self.say(listed or self.beats % 20 == 0)
        self.world.net.after(0.5, self.beat)

    def say(self, listed: bool) -> None:
        if self.world.net.now < self.quiet_until:
            return
        beat = WorkerBeat(
            info=self.info,
            memory=self.memory,
            epoch=self.epoch,
            residents=tuple(self.held()) if listed else (),
            residents_listed=listed,
            draining=self.draining,
        )
        self.world.to_scheduler(beat)

    def held(self) -> Iterable[Resident]:
        """What it holds."""
        return (
            Resident(request_id=o.spec.request_id, attempt=o.attempt, position=self._position(o))
            for batch in self.queue
            for o in batch.orders
            if self._live(o)
        )

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def park(self, message: Park) -> None:
        """Closed batches are never parked."""
        raise AssertionError("Park for a closed worker")

    def dropped_one(self, message: Drop) -> None:
        """A leased request is forgotten at once; a row of a closed batch idles on."""

    def _position(self, order: SliceOrder) -> int:
        kept = self.kept.get((order.spec.request_id, order.attempt))
        return tokens.count(order.tokens) + (len(kept.ids) if kept else 0)

    def _live(self, order: SliceOrder) -> bool:
        return order.attempt > self.dropped.get(order.spec.request_id, 0)

    def receive(self, message: object) -> None:
        if not self.alive:
            return
        epoch = message.epoch  # type: ignore[attr-defined]
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch = epoch
            self.say(listed=True)
        match message:
            case RunSlice():
                self._start(message)
            case Drop():
                dropped = self.dropped.get(message.request_id, 0)
                self.dropped[message.request_id] = max(dropped, message.attempt)
                self.dropped_one(message)
            case Park():
                self.park(message)
            case SendTokens():
                self._send_again(message)
            case DrainWorker():
                self.leave()

    def _start(self, batch: RunSlice) -> None:
        if batch.batch_id in self.seen:
            return
        self.seen.add(batch.batch_id)
        if self.draining:
            self._answer(batch, (), refused="draining")
            return
        rows = len(batch.orders)
        longest = max(tokens.count(o.spec.prompt) + tokens.count(o.tokens) for o in batch.orders)
        need = rows * (longest + batch.iterations)
        assert need <= self.memory.kv_tokens_capacity, "out of memory"
        assert not self.info.batch_size_max or rows <= self.info.batch_size_max
        for order in batch.orders:
            made = tokens.count(order.tokens)
            assert 1 <= order.lease_tokens <= batch.iterations
            assert made + order.lease_tokens <= order.spec.max_tokens
        self.queue.append(batch)
        if len(self.queue) == 1:
            self._run()

    def _run(self) -> None:
        batch = self.queue[0]
        half = max(1, batch.iterations // 2)
        self.world.net.after(half * STEP_S, lambda: self._step(batch, half))
        self.world.net.after(batch.iterations * STEP_S + 0.005, lambda: self._end(batch))

    def _step(self, batch: RunSlice, upto: int) -> None:
        """Make the tokens of the first iterations, and stream them."""
        if not self.alive:
            return
        for order in batch.orders:
            kept = self._kept(order)
            before = len(kept.ids)
            while self._live(order) and not kept.finish and len(kept.ids) < upto:
                if len(kept.ids) >= order.lease_tokens:
                    break
                self._make(order, kept)
            if len(kept.ids) > before or kept.finish:
                self._stream(order.spec, order.attempt, kept, kept.position + before)

    def _kept(self, order: SliceOrder) -> Kept:
        key = (order.spec.request_id, order.attempt)
        return self.kept.setdefault(key, Kept(position=tokens.count(order.tokens)))

    def _make(self, order: SliceOrder, kept: Kept) -> None:
        prefix = (*tokens.unpack(order.tokens), *kept.ids)
        token = len(self.world.meaning) + 1
        self.world.meaning[token] = (order.spec.request_id, prefix)
        kept.ids.append(token)
        made = len(prefix) + 1
        if made >= self.world.truth[order.spec.request_id]:
            kept.finish = "stop"
        elif made >= order.spec.max_tokens:
            kept.finish = "length"

    def _stream(self, spec: RequestSpec, attempt: int, kept: Kept, position: int) -> None:
        gateway = self.world.gateways.get(spec.gateway)
        if gateway is None:
            return
        run = TokenRun(
            request_id=spec.request_id,
            attempt=attempt,
            position=position,
            ids=tokens.pack(kept.ids[position - kept.position :]),
            finish_reason=kept.finish,  # type: ignore[arg-type]
        )
        batch = TokenBatch(gateway=spec.gateway, worker=self.boot, runs=(run,))
        self.world.net.carry(batch, gateway.receive)

    def _send_again(self, message: SendTokens) -> None:
        key = (message.request_id, message.attempt)
        held = any((resident.request_id, resident.attempt) == key for resident in self.held())
        if key not in self.kept and not held:
            self._say_unknown(message)
        for (request_id, attempt), kept in self.kept.items():
            if request_id == message.request_id and attempt >= message.attempt:
                spec = self.world.spec_of(request_id)
                position = max(message.position, kept.position)
                if spec is not None and position <= kept.position + len(kept.ids):
                    self._stream(spec, attempt, kept, position)

    def _say_unknown(self, message: SendTokens) -> None:
        result = SliceResult(
            request_id=message.request_id, attempt=message.attempt, position=message.position
        )
        empty = RunSlice(epoch=self.epoch, worker=self.boot, batch_id="", form="closed", orders=())
        self._answer(empty, (result,), refused="unknown request")

    def _end(self, batch: RunSlice) -> None:
        if not self.alive:
            return
        self._step(batch, batch.iterations)
        results = tuple(
            SliceResult(
                request_id=order.spec.request_id,
                attempt=order.attempt,
                position=tokens.count(order.tokens),
                tokens=tokens.pack(self._kept(order).ids),
                finish_reason=self._kept(order).finish if self._live(order) else "cancelled",  # type: ignore[arg-type]
            )
            for order in batch.orders
        )
        self.queue.pop(0)
        self._answer(batch, results)
        if self.queue:
            self._run()

    def _answer(self, batch: RunSlice, results: tuple[SliceResult, ...], refused: str = "") -> None:
        timings = SliceTimings(
            prefill_s=0.005,
            decode_s=batch.iterations * STEP_S,
            iterations=batch.iterations,
            input_tokens_max=20,
            batch_size=len(batch.orders),
        )
        done = SliceDone(
            epoch=self.epoch,
            worker=self.boot,
            batch_id=batch.batch_id,
            form="closed",
            results=results,
            timings=timings,
            memory=self.memory,
            refused=refused,
        )
        self.world.to_scheduler(done)


@dataclass(slots=True)
class Ledger:
    """A gateway's record of one request."""

    spec: RequestSpec
    prefix: list[int] = field(default_factory=list)
    closed: int = 0
    latest: int = 0
    ended: str = ""
    heard_at: float = 0.0


class FakeGateway:
    """One gateway: submits, keeps the prefix, asks for what it misses."""

    def __init__(self, world: World, boot: str) -> None:
        self.world, self.boot = world, boot
        self.ledgers: dict[str, Ledger] = {}
        self.epoch = 0
        self.quiet_until = 0.0

    @property
    def alive(self) -> bool:
        return self.world.gateways.get(self.boot) is self

    def die(self) -> None:
        self.world.gateways.pop(self.boot, None)

    def beat(self) -> None:
        if not self.alive:
            return
        if self.world.net.now >= self.quiet_until:
            self.world.to_scheduler(GatewayBeat(gateway=self.boot))
            self._ask_for_silent()
        self.world.net.after(1.0, self.beat)

    def _ask_for_silent(self) -> None:
        now = self.world.net.now
        for ledger in self.ledgers.values():
            if not ledger.ended and now - ledger.heard_at > SILENCE_S:
                ledger.heard_at = now
                self._want(ledger)

    def _want(self, ledger: Ledger) -> None:
        self.world.to_scheduler(
            TokensWanted(
                gateway=self.boot,
                request_id=ledger.spec.request_id,
                attempt=ledger.latest,
                position=len(ledger.prefix),
            )
        )

    def submit(self, request_id: str, prompt: int, length: int, max_tokens: int) -> None:
        spec = RequestSpec(
            request_id=request_id,
            parent_id=request_id,
            gateway=self.boot,
            model="m",
            prompt=tokens.pack(range(prompt)),
            max_tokens=max_tokens,
        )
        self.world.truth[request_id] = length
        self.ledgers[request_id] = Ledger(spec, heard_at=self.world.net.now)
        self.world.to_scheduler(Submit(spec=spec))

    def cancel(self, ledger: Ledger) -> None:
        ledger.ended = "cancelled"
        self.world.to_scheduler(Cancel(gateway=self.boot, request_id=ledger.spec.request_id))

    def stop(self, ledger: Ledger) -> None:
        ledger.ended = "stopped"
        self.world.to_scheduler(
            Stopped(
                gateway=self.boot,
                request_id=ledger.spec.request_id,
                output_tokens=len(ledger.prefix),
            )
        )

    def receive(self, message: object) -> None:
        if not self.alive:
            return
        match message:
            case TokenBatch():
                for run in message.runs:
                    self._accept(run)
            case SchedulerBeat():
                if message.epoch > self.epoch:
                    self.epoch = message.epoch
                    for ledger in self.ledgers.values():
                        if not ledger.ended:
                            self._resume(ledger)
            case Recall():
                self._recalled(message)
            case Rejected():
                ledger_or_none = self.ledgers.get(message.request_id)
                if ledger_or_none is not None and not ledger_or_none.ended:
                    ledger_or_none.ended = f"rejected: {message.reason} {message.detail}"

    def _recalled(self, recall: Recall) -> None:
        if recall.epoch < self.epoch:
            return
        ledger = self.ledgers.get(recall.request_id)
        if ledger is None or ledger.ended:
            self.world.to_scheduler(Cancel(gateway=self.boot, request_id=recall.request_id))
            return
        ledger.closed = max(ledger.closed, recall.attempt)
        self._resume(ledger)

    def _resume(self, ledger: Ledger) -> None:
        prefix = tokens.pack(ledger.prefix)
        self.world.to_scheduler(Resume(spec=ledger.spec, attempt=ledger.closed, tokens=prefix))

    def _accept(self, run: TokenRun) -> None:
        ledger = self.ledgers.get(run.request_id)
        if ledger is None or ledger.ended or run.attempt <= ledger.closed:
            return
        ledger.latest = max(ledger.latest, run.attempt)
        prefix, new = ledger.prefix, list(tokens.unpack(run.ids))
        if run.position > len(prefix):
            self._want(ledger)
            return
        overlap = len(prefix) - run.position
        assert prefix[run.position :][: len(new)] == new[:overlap], "two texts for one position"
        for token in new[overlap:]:
            request_id, computed_on = self.world.meaning[token]
            assert request_id == run.request_id
            assert computed_on == tuple(prefix), "spliced from two texts"
            prefix.append(token)
            ledger.heard_at = self.world.net.now
        if run.finish_reason and len(prefix) == run.position + len(new):
            expected = min(self.world.truth[run.request_id], ledger.spec.max_tokens)
            assert len(prefix) == expected, "ended at the wrong length"
            ledger.ended = run.finish_reason
