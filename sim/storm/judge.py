"""The judge of a storm: what must hold after every single step, whatever happens.

It stands at the seams: it sees what each core is told and what it answers, keeps books of its own,
and knows the one text that each request must get. Rules: `text`, `closed`, `resume`, `epoch`,
`order`, `lease`, `memory`, `place`, `books`, `history`, `bounds`, `refused`; and, at the end,
`liveness`, `starvation`, `end` (`sim.storm.check_end`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.gateway.core.ledger import Ended, Refused
from services.gateway.core.record import PARKED_RUNS_MAX, Arrived
from services.scheduler.core.settings import Constants
from services.worker.core.events import (
    CancelRequest,
    EngineStepped,
    ParkLease,
    RenewLease,
    StartBatch,
)
from shared.messages import (
    Accepted,
    DrainWorker,
    Drop,
    FinishAck,
    Finished,
    Park,
    Recall,
    Rejected,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SendTokens,
    SliceDone,
    Submit,
    TokenBatch,
)
from shared.tokens import count, pack
from sim.check_places import LeaseChecker
from sim.checker import Facts, Violation
from sim.storm.asked import Asked, Texts
from sim.storm.leader_book import LeaderBook
from sim.world import World

ORDERS = (RunSlice, Park, Drop, SendTokens, DrainWorker, SchedulerBeat)
OBEYING = (StartBatch, RenewLease, ParkLease, CancelRequest)
VIOLATIONS_MAX = 50
"""Of one world; more say nothing new."""


@dataclass(slots=True)
class Stream:
    """What a client has got, by the judge's book."""

    asked: Asked
    position: int = 0
    closed: int = 0
    ended: bool = False
    heard: list[tuple[int, int, int]] = field(default_factory=list)
    """(Attempt, begin, end) of runs that came from open attempts and are not used up."""


class Judge:
    """See the module's text."""

    def __init__(self, world: World, texts: Texts, constants: Constants) -> None:
        self.violations: list[Violation] = []
        self.published: dict[str, list[Finished]] = {}
        self.excused: dict[str, float] = {}
        """Worker to when its memory may be short, since words to it were lost or are an earlier
        leader's."""
        self.strange: list[str] = []
        """Evictions and refusals that were excused, for people."""
        self._world, self._texts = world, texts
        self._constants = constants
        self._streams: dict[str, Stream] = {}
        self._epochs: dict[str, int] = {}
        """Process to the largest epoch that it has heard of."""
        self._attempts: dict[str, int] = {}
        self._obeyed: set[tuple[str, str, int]] = set()
        self._shortages: dict[str, int] = {}
        self._leaders: dict[str, LeaderBook] = {}
        self._leases = LeaseChecker(Facts({}), lambda at, detail: self.tell("lease", detail))

    def tell(self, rule: str, detail: str) -> None:
        """A promise was broken."""
        self._world.stopped = True
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(self._world.now, rule, detail))

    # -------------------------------------------------------------------------------- gateways

    def asked(self, asked: Asked) -> None:
        """A client calls."""
        self._streams[asked.request_id] = Stream(asked)

    def gateway_did(self, gateway: Any, event: Any, outputs: Sequence[Any]) -> None:
        """One call of a gateway's ledger."""
        if isinstance(event, TokenBatch):
            self._listen(event)
        elif isinstance(event, SchedulerBeat | Recall | Accepted | Rejected):
            if self._is_old(gateway.name, event):
                if outputs:
                    self.tell("epoch", f"{gateway.name} obeys {type(event).__name__} of old")
                return
            if isinstance(event, Recall) and event.request_id in self._streams:
                stream = self._streams[event.request_id]
                if not stream.ended:
                    stream.closed = max(stream.closed, event.attempt)
                    stream.heard = [run for run in stream.heard if run[0] > stream.closed]
        if isinstance(event, TokenBatch):
            self._acknowledged(event, outputs)
        for output in outputs:
            match output:
                case Arrived():
                    self._arrived(self._streams[output.request_id], output)
                case Ended():
                    self._ended(self._streams[output.request_id], output)
                case Refused():
                    self._refused(output.rejection)
                case _:
                    pass

    def _is_old(self, process: str, event: Any) -> bool:
        known = self._epochs.get(process, 0)
        if event.epoch < known:
            return True
        self._epochs[process] = event.epoch
        return False

    def _listen(self, batch: TokenBatch) -> None:
        for run in batch.runs:
            stream = self._streams.get(run.request_id)
            if stream is not None and run.attempt > stream.closed and not stream.ended:
                end = run.position + count(run.ids)
                if end > stream.position and len(stream.heard) < 4 * PARKED_RUNS_MAX:
                    stream.heard.append((run.attempt, run.position, end))

    def _acknowledged(self, batch: TokenBatch, outputs: Sequence[Any]) -> None:
        """Every finish that is heard of a request that is over is acknowledged, each time."""
        for run in batch.runs:
            self._attempts[run.request_id] = run.attempt
        ends = {run.request_id for run in batch.runs if run.finish_reason is not None}
        over = {name for name in ends if name in self._streams and self._streams[name].ended}
        acks = [output for output in outputs if isinstance(output, FinishAck)]
        if over - {name for ack in acks for name in ack.request_ids}:
            self.tell("ack", f"the ends of {sorted(over)} are not acknowledged")

    def attempt_of(self, request_id: str) -> int:
        """The latest attempt that a gateway was sent tokens of."""
        return self._attempts.get(request_id, 0)

    def _arrived(self, stream: Stream, arrived: Arrived) -> None:
        request_id, begin = arrived.request_id, arrived.position
        end = begin + len(arrived.ids)
        if stream.ended:
            self.tell("text", f"{request_id} goes on after its end")
        if begin != stream.position:
            self.tell("text", f"{request_id} goes on at {begin}, it has {stream.position}")
        if pack(arrived.ids) != self._texts.true(stream.asked.spec, begin, len(arrived.ids)):
            self.tell("text", f"{request_id} gets foreign tokens from {begin} on")
        if end > stream.asked.length:
            self.tell("text", f"{request_id} has {end} of {stream.asked.length} tokens")
        at = begin
        for attempt, first, last in sorted(stream.heard, key=lambda run: run[1]):
            if attempt > stream.closed and first <= at < last:
                at = last
        if at < end:
            self.tell("closed", f"{request_id} gets tokens at {at} that no open attempt sent")
        stream.position = max(stream.position, end)
        stream.heard = [run for run in stream.heard if run[2] > stream.position]

    def _ended(self, stream: Stream, ended: Ended) -> None:
        stream.ended = True
        if ended.reason == "error":
            self.tell("refused", f"{ended.request_id} fails: {ended.detail}")
        elif stream.position != stream.asked.length:
            told = f"{stream.position} of {stream.asked.length}"
            self.tell("text", f"{ended.request_id} ends with {told} tokens")

    def _refused(self, rejection: Rejected) -> None:
        if rejection.reason != "queue_full":
            told = f"{rejection.reason}, {rejection.detail}"
            self.tell("refused", f"{rejection.request_id} is refused: {told}")

    def resumed(self, gateway: Any, message: Any) -> None:
        """What a gateway says to the scheduler."""
        if not isinstance(message, Resume):
            return
        stream = self._streams[message.spec.request_id]
        true = self._texts.true(message.spec, 0, stream.position)
        if message.tokens != true or message.attempt < stream.closed:
            self.tell("resume", f"{message.spec.request_id} resumes with other tokens or attempts")

    def ended(self, asked: Asked) -> None:
        """A client is done, for whatever reason."""
        self._streams[asked.request_id].ended = True

    # --------------------------------------------------------------------------------- workers

    def worker_did(self, worker: Any, event: Any, commands: Sequence[Any]) -> None:
        """One call of a worker's core."""
        at = self._world.now
        if isinstance(event, ORDERS):
            if self._is_old(worker.name, event):
                if any(isinstance(command, OBEYING) for command in commands):
                    self.tell("epoch", f"{worker.name} obeys {type(event).__name__} of old")
            else:
                self._leases.see(at, "got", event)
        for command in commands:
            if isinstance(command, StartBatch):
                self._obeys(worker, command.order)
            elif isinstance(command, TokenBatch | SliceDone):
                self._leases.see(at, "sent", command)
        if isinstance(event, EngineStepped):
            self._memory(worker)

    def _obeys(self, worker: Any, order: RunSlice) -> None:
        for share in order.orders:
            key = (worker.name, share.spec.request_id, share.attempt)
            if key in self._obeyed:
                self.tell("order", f"{worker.name} begins {key[1]}, attempt {key[2]}, twice")
            self._obeyed.add(key)

    def _memory(self, worker: Any) -> None:
        counts = worker.engine.counts
        if counts.over:
            counts.over = 0
            self.tell("memory", f"{worker.name} holds more than it has")
        short = counts.evicted + counts.out_of_memory
        if short > self._shortages.get(worker.name, 0):
            self._shortages[worker.name] = short
            detail = f"{worker.name} has no memory for what it was promised"
            if self._world.now <= self.excused.get(worker.name, -1.0):
                self.strange.append(detail)
            else:
                self.tell("memory", detail)

    def excuse(self, worker: str, until: float) -> None:
        """Words to this worker are lost or late: what its leader counts and what it holds may
        differ until then."""
        self.excused[worker] = max(until, self.excused.get(worker, 0.0))

    # --------------------------------------------------------------------------------- leaders

    def elected(self, scheduler: Any) -> None:
        """A new leader, with a new core."""
        book = LeaderBook(scheduler.core.books, self._constants, self.tell, self._publishes)
        self._leaders[scheduler.name] = book

    def leader_did(self, scheduler: Any, event: Any, commands: Sequence[SchedulerCommand]) -> None:
        """One call of a leader's core."""
        self._leaders[scheduler.name].after(event, commands)
        if isinstance(event, Submit) and not any(isinstance(c, Recall) for c in commands):
            books = scheduler.core.books
            request = books.requests.pool.get(event.spec.request_id)
            taken_in = request is not None and request.arrived_at == scheduler.now()
            if taken_in and books.waiting > self._constants.waiting_max:
                self.tell("bounds", f"{books.waiting} requests wait")

    def audit(self, scheduler: Any) -> None:
        """Look at all of a leader's sums now."""
        self._leaders[scheduler.name].audit()

    def _publishes(self, finished: Finished) -> None:
        request_id = finished.request_id
        self.published.setdefault(request_id, []).append(finished)
        stream = self._streams.get(request_id)
        if stream is None or finished.reason not in ("stop", "length"):
            return
        asked = stream.asked
        true = {asked.length, asked.wish.stop_at}
        if finished.output_tokens not in true:
            self.tell("history", f"{request_id} is published with {finished.output_tokens} tokens")
