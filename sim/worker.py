"""A worker in virtual time: the protocol's part of it. What it computes is the pretend engine's.

It follows the largest epoch, obeys every order once, streams tokens to gateways with its reports,
keeps what a finish may need until the gateway confirms it, beats, drains, and dies.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, Protocol

from services.worker.core.pretend_parts import Noise, Progress, Spans, Tally, noise_of
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    Form,
    Park,
    Resident,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    TokenBatch,
    TokenRun,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)
from sim.network import CALM, Network
from sim.setup import Setup
from sim.text import output, output_begins
from sim.worker_books import Counts, Held, Times, run_of
from sim.world import World

BEAT_S = 0.5
STREAMED_S = 0.025
"""A real worker coalesces tokens for so long: what is younger dies with it."""
KEPT_MAX = 10_000
BATCH_IDS_MAX = 4_096
UNKNOWN_REQUEST = "unknown request"


class Mesh(Protocol):
    """What a worker may know of its world."""

    setup: Setup
    world: World
    network: Network

    def to_leader(self, message: Any) -> None: ...

    def to_gateway(self, gateway: str, message: Any, times: Any) -> None: ...

    def truth(self, request_id: str) -> int:
        """Where the model would end this output."""

    def gone(self, worker: str) -> None: ...


class SimWorker:
    """The common part; `sim.worker_leased` and `sim.worker_closed` have the engines."""

    form: Form

    def __init__(self, mesh: Mesh, boot: str, rng: Random, spans: bool) -> None:
        setup = mesh.setup
        self.boot = boot
        self.alive = True
        self.epoch = 0
        self.counts = Counts()
        self.spans: Spans | None = [] if spans else None
        self._mesh = mesh
        self._world = mesh.world
        self._draining = False
        self._calm = setup.faults == CALM
        self._held: dict[str, Held] = {}
        self._kept: dict[str, Held] = {}
        self._known: dict[str, None] = {}
        self._leaving: set[str] = set()
        """Parked, though nobody is short of memory for those who run."""
        self._armed_at: float | None = None
        self._capacity = setup.kv_tokens_each
        self._info = WorkerInfo(
            worker=boot,
            name=boot,
            engine="simulated",
            forms=(self.form,),
            model=setup.profile.model,
            context_tokens_max=self._capacity,
            batch_size_max=setup.batch_size_max,
            kv_block_tokens=setup.block_tokens_each if self.form == "leased" else 1,
        )
        self._noise: Noise = noise_of(rng.gauss, setup.cv)

    # ----------------------------------------------------------------- what the engines answer

    @property
    def tally(self) -> Tally:
        raise NotImplementedError

    @property
    def kv_tokens(self) -> int:
        raise NotImplementedError

    @property
    def running(self) -> int:
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        raise NotImplementedError

    def last_token_at(self, request_id: str) -> float | None:
        """When the request's newest token was made, if it is here."""
        raise NotImplementedError

    def _next_at(self) -> float | None:
        raise NotImplementedError

    def _advance(self) -> None:
        """Complete what is over by now, and report it."""
        raise NotImplementedError

    def _order(self, order: RunSlice) -> None:
        raise NotImplementedError

    def _drop(self, request_id: str, attempt: int) -> None:
        raise NotImplementedError

    def _park(self, request_id: str, attempt: int) -> None:
        """Only leases can be parked."""

    def _tidy(self) -> None:
        """What a worker does without being asked, now and then."""

    def _until(self, request_id: str) -> int:
        """Where its lease ends; 0: it has none."""
        return 0

    def _positions(self, now: float) -> Iterable[tuple[str, int, int]]:
        raise NotImplementedError

    def holds(self, request_id: str) -> bool:
        """Whether it is here, in whatever stage."""
        return request_id in self._held

    # ------------------------------------------------------------------------------ the outside

    def start(self) -> None:
        """Say hello, and beat from now on."""
        self._say(listed=True)
        self._world.after(BEAT_S, self._beat)

    def receive(self, message: Any, extra: Any = None) -> None:
        """What scheduler and gateways say; orders of deposed leaders are dropped."""
        if not self.alive:
            return
        if type(message) is FinishAck:
            for request_id in message.request_ids:
                self._kept.pop(request_id, None)
            return
        if message.epoch != self.epoch:
            if message.epoch < self.epoch:
                return
            self.epoch = message.epoch
            self._say(listed=True)
        kind = type(message)
        if kind is RunSlice:
            self._order(message)
        elif kind is SchedulerBeat:
            return
        elif kind is Park:
            if message.reason in ("move", "turn"):
                self._leaving.add(message.request_id)
            self._park(message.request_id, message.attempt)
        elif kind is Drop:
            self._dropped(message)
        elif kind is SendTokens:
            self._send_again(message)
        elif kind is DrainWorker:
            self.drain()
        self._arm()

    def die(self) -> None:
        """Without a word. What was made before the last moment is on its way to the gateways."""
        streamed = self._world.now - STREAMED_S
        for request_id, attempt, position in self._positions(max(0.0, streamed)):
            held = self._held.get(request_id)
            if held is not None and held.attempt == attempt and position > held.sent:
                self._stream(held.gateway, [run_of(request_id, held, held.sent, position)], [None])
        self.alive = False
        self._mesh.gone(self.boot)

    def drain(self) -> None:
        """Take nothing new; leave when nothing is here any more."""
        if not self._draining:
            self._draining = True
            self._say(listed=False)

    # ------------------------------------------------------------------------------- time

    def _arm(self) -> None:
        at = self._next_at()
        if at is not None and at != self._armed_at:
            self._armed_at = at
            self._world.at(at, self._tick, at)

    def _tick(self, armed_at: float) -> None:
        if armed_at == self._armed_at and self.alive:
            self._armed_at = None
            self._advance()
            self._arm()

    def _beat(self) -> None:
        if not self.alive:
            return
        if self._draining and not self._held:
            self._say(listed=True, leaving=True)
            self.alive = False
            self._mesh.gone(self.boot)
            return
        self._tidy()
        self._say(listed=False)
        self._world.after(BEAT_S, self._beat)

    # ------------------------------------------------------------------------------- words

    def _memory(self) -> WorkerMemory:
        return WorkerMemory(kv_tokens_capacity=self._capacity, kv_tokens_used=self.kv_tokens)

    def _say(self, *, listed: bool, leaving: bool = False) -> None:
        residents: tuple[Resident, ...] = ()
        if listed:
            residents = tuple(
                Resident(
                    request_id=request_id,
                    attempt=attempt,
                    position=position,
                    until=self._until(request_id),
                )
                for request_id, attempt, position in self._positions(self._world.now)
            )
        beat = WorkerBeat(
            info=self._info,
            memory=self._memory(),
            epoch=self.epoch,
            residents=residents,
            residents_listed=listed,
            draining=self._draining,
            leaving=leaving,
        )
        self._mesh.to_leader(beat)

    def _done(
        self,
        batch_id: str,
        results: tuple[SliceResult, ...],
        timings: SliceTimings | None = None,
        refused: str = "",
    ) -> None:
        done = SliceDone(
            epoch=self.epoch,
            worker=self.boot,
            batch_id=batch_id,
            form=self.form,
            results=results,
            timings=timings or SliceTimings(),
            memory=self._memory(),
            refused=refused,
        )
        self._mesh.to_leader(done)

    def _tell(
        self,
        batch_id: str,
        progress: Sequence[Progress],
        timings: SliceTimings,
        silent: bool = False,
    ) -> None:
        """Tokens to the gateways, results to the scheduler. `silent`: clients see nothing before
        the batch has ended."""
        results = []
        streams: dict[str, tuple[list[TokenRun], list[Times | None]]] = {}
        for told in progress:
            held = self._held.get(told.request_id)
            if held is None or held.attempt != told.attempt:
                held = None  # dropped: nobody waits for its tokens
                begins = output_begins(told.request_id)
            else:
                begins = held.begins
                self._note(told, held, streams, silent)
            results.append(
                SliceResult(
                    request_id=told.request_id,
                    attempt=told.attempt,
                    position=told.position,
                    tokens=output(begins, told.position, told.tokens),
                    finish_reason=told.finish_reason,
                    resident=told.resident,
                    evicted=told.evicted,
                    cached_tokens=told.cached_tokens,
                    invalid_tokens=told.invalid_tokens,
                    pad_tokens=told.pad_tokens,
                )
            )
        for gateway, (runs, all_times) in streams.items():
            self._stream(gateway, runs, all_times)
        self.counts.last_end_at = self._world.now
        self._done(batch_id, tuple(results), timings)

    def _note(
        self,
        told: Progress,
        held: Held,
        streams: dict[str, tuple[list[TokenRun], list[Times | None]]],
        silent: bool,
    ) -> None:
        """Put what its client is to see into `streams`. A stream that goes on undisturbed needs no
        message: its client sees it all the same (see `Times`)."""
        held.end = told.position + told.tokens
        if told.gap_s > held.gap_s and not silent:
            held.gap_s = told.gap_s
        if told.resident and not told.first and self._calm:
            return
        reason = None if told.finish_reason == "cancelled" else told.finish_reason
        held.finish_reason = reason
        if held.end > held.sent or reason is not None:
            first_at, last_at = (told.at, told.at) if silent else (told.first_at, told.last_at)
            times = Times(self._world.now, told.first, first_at, last_at, held.gap_s)
            runs, all_times = streams.setdefault(held.gateway, ([], []))
            runs.append(run_of(told.request_id, held, held.sent, held.end))
            all_times.append(times)
            held.sent, held.gap_s = held.end, 0.0
        if not told.resident:
            self._leaves(told.request_id, held)

    def _leaves(self, request_id: str, held: Held) -> None:
        """It is not here any more; its tokens are kept for the gateway's questions."""
        del self._held[request_id]
        self._kept[request_id] = held
        if len(self._kept) > KEPT_MAX:
            del self._kept[next(iter(self._kept))]

    def _stream(self, gateway: str, runs: list[TokenRun], times: list[Times | None]) -> None:
        batch = TokenBatch(gateway=gateway, worker=self.boot, epoch=self.epoch, runs=tuple(runs))
        self._mesh.to_gateway(gateway, batch, times)

    # ------------------------------------------------------------------------------- orders

    def _new(self, batch_id: str) -> bool:
        """Whether this batch was not known; it is from now on."""
        if batch_id in self._known:
            return False
        self._known[batch_id] = None
        if len(self._known) > BATCH_IDS_MAX:
            del self._known[next(iter(self._known))]
        return True

    def _take_in(self, order: SliceOrder, made: int) -> bool:
        """Whether this order is to run; a newer attempt may be here."""
        spec = order.spec
        held = self._held.get(spec.request_id)
        if held is not None and held.attempt >= order.attempt:
            return False
        self._kept.pop(spec.request_id, None)
        begins = output_begins(spec.request_id)
        self._held[spec.request_id] = Held(order.attempt, spec.gateway, begins, made, made, made)
        self.counts.slices += 1
        return True

    def _dropped(self, drop: Drop) -> None:
        for book in (self._held, self._kept):
            held = book.get(drop.request_id)
            if held is not None and held.attempt <= drop.attempt:
                del book[drop.request_id]
        self._drop(drop.request_id, drop.attempt)

    def _send_again(self, wish: SendTokens) -> None:
        request_id, attempt, wanted = wish.request_id, wish.attempt, wish.position
        held = self._held.get(request_id)
        if held is not None and held.attempt == attempt and held.start <= wanted:
            positions = self._positions(self._world.now)
            position = next((at for name, _, at in positions if name == request_id), held.end)
            if wanted < position:
                self._stream(held.gateway, [run_of(request_id, held, wanted, position)], [None])
                held.sent = max(held.sent, position)
            return
        kept = self._kept.get(request_id)
        if kept is not None and kept.attempt == attempt and kept.start <= wanted <= kept.end:
            run = run_of(request_id, kept, wanted, kept.end)
            if run.ids or run.finish_reason:
                self._stream(kept.gateway, [run], [None])
                return
        result = SliceResult(request_id=request_id, attempt=attempt, position=wanted)
        self._done("", (result,), refused=UNKNOWN_REQUEST)
