"""Planted bugs: cores that each keep one promise less, to be put into a storm.

A saboteur sits around a real core and changes what goes in or comes out: one named change each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace as changed
from typing import Any

import msgspec

from services.estimator.core.history import History
from services.gateway.core.ledger import Ledger, Output
from services.gateway.core.record import Arrived
from services.scheduler.core.presets import Preset
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from services.worker.core.events import CancelRequest, Command, ParkLease
from services.worker.core.worker import Worker
from shared.messages import (
    Drop,
    Elected,
    FinishAck,
    Finished,
    LengthForecast,
    Park,
    Recall,
    Renewal,
    Resume,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SendTokens,
    SliceDone,
    Stopped,
    Submit,
    TokenBatch,
    TokenRun,
    TokensWanted,
    WorkerBeat,
)
from sim.storm.storm import Parts

replace = msgspec.structs.replace


# -------------------------------------------------------------------------------------- gateways


class BadLedger(Ledger):
    """Changes what the mesh says, or what is said to it."""

    def __init__(self, boot: str, *, told: bool) -> None:
        super().__init__(boot, told=told)
        self.got: dict[str, int] = {}
        self.closed: dict[str, int] = {}
        self.acknowledged: set[str] = set()

    def run(self, run: TokenRun) -> TokenRun:
        return run

    def said(self, output: Output) -> list[Output]:
        return [output]

    def handle(self, event: Any, now: float) -> list[Output]:
        if isinstance(event, TokenBatch):
            event = replace(event, runs=tuple(self.run(run) for run in event.runs))
        outputs = [out for output in super().handle(event, now) for out in self.said(output)]
        for output in outputs:
            if isinstance(output, Arrived):
                self.got[output.request_id] = output.position + len(output.ids)
            elif isinstance(output, Resume):
                self.closed[output.spec.request_id] = output.attempt
        return outputs

    def wake(self, now: float) -> list[Output]:
        return [out for output in super().wake(now) for out in self.said(output)]

    def reconnected(self, now: float) -> list[Output]:
        return [out for output in super().reconnected(now) for out in self.said(output)]


class AppendsRepeats(BadLedger):
    def run(self, run: TokenRun) -> TokenRun:
        return replace(run, position=max(run.position, self.got.get(run.request_id, 0)))


class SkipsGaps(BadLedger):
    def run(self, run: TokenRun) -> TokenRun:
        return replace(run, position=min(run.position, self.got.get(run.request_id, 0)))


class BelievesClosed(BadLedger):
    def run(self, run: TokenRun) -> TokenRun:
        return replace(run, attempt=max(run.attempt, self.closed.get(run.request_id, 0) + 1))


class LosesPrefix(BadLedger):
    def said(self, output: Output) -> list[Output]:
        return [replace(output, tokens=b"")] if isinstance(output, Resume) else [output]


class AcknowledgesOnce(BadLedger):
    def said(self, output: Output) -> list[Output]:
        if isinstance(output, FinishAck):
            new = tuple(name for name in output.request_ids if name not in self.acknowledged)
            self.acknowledged.update(new)
            return [replace(output, request_ids=new)] if new else []
        return [output]


class NeverAsks(BadLedger):
    def said(self, output: Output) -> list[Output]:
        return [] if isinstance(output, TokensWanted) else [output]


class NeverAnswersRecalls(BadLedger):
    def said(self, output: Output) -> list[Output]:
        return [] if isinstance(output, Resume) and output.attempt else [output]


class GatewayObeysOld(BadLedger):
    def handle(self, event: Any, now: float) -> list[Output]:
        if isinstance(event, Recall | SchedulerBeat) and event.epoch < self.epoch:
            event = replace(event, epoch=self.epoch)
        return super().handle(event, now)


# --------------------------------------------------------------------------------------- workers


class BadWorker(Worker):
    """Changes what a scheduler orders, or what is answered."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.top = 0
        self.known: dict[str, int] = {}

    def order(self, event: Any) -> Any:
        return event

    def said(self, command: Command) -> list[Command]:
        return [command]

    def handle(self, event: Any, now: float) -> list[Command]:
        event = self.order(event)
        self.top = max(self.top, getattr(event, "epoch", 0))
        if event is None:
            return self.wake(now)
        return [out for command in super().handle(event, now) for out in self.said(command)]

    def times(self, order: RunSlice) -> int:
        """How often this order came before."""
        self.known[order.batch_id] = self.known.get(order.batch_id, -1) + 1
        return self.known[order.batch_id]


class WorkerObeysOld(BadWorker):
    def order(self, event: Any) -> Any:
        if isinstance(event, RunSlice | Park | Drop | SendTokens) and event.epoch < self.top:
            return replace(event, epoch=self.top)
        return event


class RunsRepeats(BadWorker):
    def order(self, event: Any) -> Any:
        if isinstance(event, RunSlice) and event.orders and self.times(event):
            return replace(event, batch_id=f"{event.batch_id}, again")
        return event


class RenewsRelatively(BadWorker):
    def order(self, event: Any) -> Any:
        if isinstance(event, RunSlice) and event.renewals and self.times(event):
            more = tuple(
                Renewal(request_id=r.request_id, attempt=r.attempt, until=r.until + 40)
                for r in event.renewals
            )
            return replace(event, renewals=more)
        return event


class LeasesOneMore(BadWorker):
    def order(self, event: Any) -> Any:
        if isinstance(event, RunSlice) and event.form == "leased":
            longer = tuple(replace(o, lease_tokens=o.lease_tokens + 1) for o in event.orders)
            return replace(event, orders=longer)
        return event


class IgnoresAcks(BadWorker):
    def order(self, event: Any) -> Any:
        return None if isinstance(event, FinishAck) else event


class ComputesDropped(BadWorker):
    def said(self, command: Command) -> list[Command]:
        return [] if isinstance(command, CancelRequest) else [command]


class NeverParks(BadWorker):
    def said(self, command: Command) -> list[Command]:
        return [] if isinstance(command, ParkLease) else [command]


# ------------------------------------------------------------------------------------- schedulers


class BadScheduler(Scheduler):
    """Changes what a leader hears or orders."""

    def heard(self, event: SchedulerEvent) -> SchedulerEvent | None:
        return event

    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        return [command]

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerCommand]:
        told = self.heard(event)
        commands = super().wake(now) if told is None else super().handle(told, now)
        return [out for command in commands for out in self.said(command)]

    def wake(self, now: float) -> list[SchedulerCommand]:
        return [out for command in super().wake(now) for out in self.said(command)]


class NeverRecalls(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        return [] if isinstance(command, Recall) else [command]


class RecallsOnce(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        if isinstance(command, Recall):
            request = self.books.requests.open.get(command.request_id)
            return [] if request is not None and request.recalls > 1 else [command]
        return [command]


class NeverDrops(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        return [] if isinstance(command, Drop) else [command]


class DropsOnce(BadScheduler):
    """What a listing shows that should not be there is not dropped again."""

    dropped: dict[tuple[str, str], int]

    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        if isinstance(command, Drop):
            self.dropped = getattr(self, "dropped", {})
            key = (command.worker, command.request_id)
            if self.dropped.get(key, 0) >= command.attempt:
                return []
            self.dropped[key] = command.attempt
        return [command]


class PlacesTwice(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        if isinstance(command, RunSlice) and command.orders:
            others = [name for name in self.books.workers.active if name != command.worker]
            return [command, *(replace(command, worker=name) for name in others[:1])]
        return [command]


class CountsMemoryTwice(BadScheduler):
    def heard(self, event: SchedulerEvent) -> SchedulerEvent:
        if isinstance(event, WorkerBeat | SliceDone):
            slots = 2 * event.memory.kv_tokens_capacity
            return replace(event, memory=replace(event.memory, kv_tokens_capacity=slots))
        return event


class GrantsTwice(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        if isinstance(command, RunSlice) and command.form == "leased":
            open_ = self.books.requests.open
            renewals = tuple(
                Renewal(
                    request_id=r.request_id,
                    attempt=r.attempt,
                    until=open_[r.request_id].spec.max_tokens,
                )
                for r in command.renewals
                if r.request_id in open_
            )
            return [replace(command, renewals=renewals)]
        return [command]


class PublishesTwice(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        return [command, command] if isinstance(command, Finished) else [command]


class PublishesOneMore(BadScheduler):
    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        if isinstance(command, Finished):
            return [replace(command, output_tokens=command.output_tokens + 1)]
        return [command]


class ForgetsTheLast(BadScheduler):
    """Whoever has the lowest priority is passed over for ever."""

    def heard(self, event: SchedulerEvent) -> SchedulerEvent | None:
        late = isinstance(event, Submit | Resume) and event.spec.priority == 2
        return None if late else event


class IgnoresReports(BadScheduler):
    """Of leases that are used up."""

    def heard(self, event: SchedulerEvent) -> SchedulerEvent | None:
        if isinstance(event, SliceDone) and event.form == "leased" and not event.refused:
            ends = tuple(result for result in event.results if not result.resident)
            return replace(event, results=ends)
        return event


class KeepsEpoch(BadScheduler):
    """A new leader takes the epoch of the one before."""

    def heard(self, event: SchedulerEvent) -> SchedulerEvent:
        return Elected(epoch=1) if isinstance(event, Elected) else event


class IgnoresStops(BadScheduler):
    def heard(self, event: SchedulerEvent) -> SchedulerEvent | None:
        return None if isinstance(event, Stopped) else event


class GivesNoRoom(BadScheduler):
    """Parking is ordered once, and not again."""

    def said(self, command: SchedulerCommand) -> list[SchedulerCommand]:
        return [] if isinstance(command, Park) else [command]


def tuned(**constants: Any) -> Callable[[Preset, Constants], Scheduler]:
    """A scheduler that has other constants than it was given."""

    def make(preset: Preset, given: Constants) -> Scheduler:
        return Scheduler(preset, changed(given, **constants))

    return make


# ------------------------------------------------------------------------------------ the history


class CountsRepeats(History):
    def knows(self, request_id: str) -> bool:
        return False


class CountsCensoredTwice(History):
    def forecast(self) -> LengthForecast:
        forecast = super().forecast()
        classes = tuple(replace(row, finished=row.finished + 1) for row in forecast.classes)
        return replace(forecast, classes=classes)


WORLDS = 60


@dataclass(frozen=True, slots=True)
class Sabotage:
    """One planted bug, and the rules that may catch it: the first that it breaks counts."""

    name: str
    parts: Parts
    rules: frozenset[str]
    worlds: range
    """Seeds in which it has to be found. Rare ones begin where they are found soon."""


def _gateway(name: str, ledger: Callable[..., Ledger], *rules: str, first: int = 1) -> Sabotage:
    return Sabotage(name, Parts(ledger=ledger), frozenset(rules), range(first, first + WORLDS))


def _worker(name: str, worker: Callable[..., Worker], *rules: str, first: int = 1) -> Sabotage:
    return Sabotage(name, Parts(worker=worker), frozenset(rules), range(first, first + WORLDS))


def _scheduler(
    name: str, scheduler: Callable[..., Scheduler], *rules: str, first: int = 1
) -> Sabotage:
    return Sabotage(
        name, Parts(scheduler=scheduler), frozenset(rules), range(first, first + WORLDS)
    )


def _history(name: str, history: Callable[..., History], *rules: str, first: int = 1) -> Sabotage:
    return Sabotage(name, Parts(history=history), frozenset(rules), range(first, first + WORLDS))


SABOTAGES: Sequence[Sabotage] = (
    _gateway("a repeat is appended", AppendsRepeats, "text"),
    _gateway("a gap is passed over", SkipsGaps, "text"),
    _gateway("closed attempts are believed", BelievesClosed, "closed"),
    _gateway("a resume loses the prefix", LosesPrefix, "resume"),
    _gateway("an end is acknowledged once only", AcknowledgesOnce, "ack"),
    _gateway("missing tokens are not asked for", NeverAsks, "liveness", "starvation"),
    _gateway("recalls are not answered", NeverAnswersRecalls, "liveness", "starvation", "refused"),
    _gateway("a gateway obeys deposed leaders", GatewayObeysOld, "epoch"),
    _worker("a worker obeys deposed leaders", WorkerObeysOld, "epoch"),
    _worker("a repeated order is run again", RunsRepeats, "order"),
    _worker("renewals are relative", RenewsRelatively, "lease"),
    _worker("a lease is one token longer", LeasesOneMore, "lease", "memory"),
    _worker("acknowledgements are not heard", IgnoresAcks, "ack"),
    _worker("what is dropped is computed on", ComputesDropped, "end", "memory"),
    _worker("nobody is parked", NeverParks, "liveness", "starvation", first=12),
    _scheduler("nothing is recalled", NeverRecalls, "liveness", "starvation", "books"),
    _scheduler("a recall is not repeated", RecallsOnce, "liveness", "starvation", "refused"),
    _scheduler("nothing is dropped", NeverDrops, "end", "books", "memory"),
    _scheduler("a drop is not repeated", DropsOnce, "end", "books", "memory", first=40),
    _scheduler("a request is placed twice", PlacesTwice, "place"),
    _scheduler("memory is counted twice", CountsMemoryTwice, "memory"),
    _scheduler("leases are granted without counting", GrantsTwice, "memory"),
    _scheduler("ends are published twice", PublishesTwice, "history"),
    _scheduler("a length is one too long", PublishesOneMore, "history"),
    _scheduler("the last priority is passed over", ForgetsTheLast, "starvation"),
    _scheduler("used-up leases are not renewed", IgnoresReports, "liveness", "starvation", "books"),
    _scheduler("parking is not ordered", GivesNoRoom, "liveness", "starvation", first=40),
    _scheduler(
        "all leaders have one epoch", KeepsEpoch, "liveness", "starvation", "place", "order"
    ),
    _scheduler("stop strings end nothing", IgnoresStops, "history", "end", "text"),
    _scheduler("queues have no limit", tuned(waiting_max=1 << 30), "bounds"),
    _scheduler("a dead gateway is not noticed", tuned(gateway_timeout_s=1e9), "end"),
    _scheduler("a request is given up early", tuned(recalls_max=1), "refused"),
    _history("a repeat counts", CountsRepeats, "history"),
    _history("a length counts that never was", CountsCensoredTwice, "history"),
)
