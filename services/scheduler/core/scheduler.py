"""The scheduler's core: one gate for all events, one for time, and the deadline between them.

Theory of operation. `handle` takes what happened, `wake` what time it is; both return commands in
the order in which they are to go out. All state is soft and lives in `Books`. An event changes the
books through `gateway_events`, `worker_events` or `takeover`, each of which moves single requests
with `moves`; then a round is made if one is due. `deadline` says when to call `wake`.

Total: an event that is late, repeated or unknown answers []. Deterministic: equal histories give
equal commands. Nothing here reads a clock or draws a number.
"""

from collections.abc import Callable

from services.scheduler.core import (
    foretelling,
    gateway_events,
    refusals,
    takeover,
    watch,
    worker_events,
)
from services.scheduler.core.books import Books, new_books, take_forecast
from services.scheduler.core.leasing import lease_round
from services.scheduler.core.presets import Preset
from services.scheduler.core.rounds import go_on_with_round, next_round_at
from services.scheduler.core.settings import Constants
from shared.messages import (
    Cancel,
    Elected,
    GatewayBeat,
    LengthForecast,
    LengthPredicted,
    OrderReturned,
    Reading,
    Resume,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    Stopped,
    Submit,
    TokensWanted,
    WorkerBeat,
    WorkerBeats,
)

BEATS = (WorkerBeat, WorkerBeats, GatewayBeat, LengthForecast)
"""They come whether anything happens or not: a round follows only if they bring news."""


class Scheduler:
    """One leader. A new leadership is a new object: nothing is carried over."""

    def __init__(
        self, preset: Preset, constants: Constants, truth: Callable[[str], int] | None = None
    ) -> None:
        """`truth`: request id to its true output length. Only a simulation has it, and only the
        policy `oracle` may be told."""
        assert (truth is not None) == preset.needs_truth, "true lengths are for the oracle alone"
        self.books: Books = new_books(preset, constants, truth)
        """For reading only: metrics, tests, simulation."""

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerCommand]:
        """Something happened. Before `Elected` nothing is answered."""
        books = self.books
        watch.notice_stall(books, now)
        if isinstance(event, Elected):
            if event.epoch > books.epoch == 0:
                takeover.elected(books, event.epoch, now)
        elif books.epoch:
            if not isinstance(event, BEATS):
                books.stirred = True
            _happened(books, event, now)
        return self._due(now)

    def wake(self, now: float) -> list[SchedulerCommand]:
        """The deadline came, or any other time."""
        watch.notice_stall(self.books, now)
        return self._due(now)

    def deadline(self) -> float | None:
        """When to call `wake` at the latest; None before the election."""
        books = self.books
        if not books.epoch:
            return None
        times = [books.beat_at, books.watch_at]
        if books.collecting_until is not None:
            times.append(books.collecting_until)
        if books.round_at is not None:
            times.append(books.round_at)
        return min(times)

    @property
    def advice(self) -> str:
        """Why no worker can serve this policy, and what to do; empty if all is well."""
        return refusals.advice(self.books)

    def _due(self, now: float) -> list[SchedulerCommand]:
        """Do what is due and hand out the commands."""
        books = self.books
        if books.epoch:
            if books.collecting_until is not None and now >= books.collecting_until:
                takeover.settle(books, now)
                books.stirred = True
            if now >= books.watch_at:
                watch.watch(books, now)
            if now >= books.beat_at:
                watch.beat(books, now)
            _round_if_due(books, now)
        commands, books.commands = books.commands, []
        return commands


def _round_if_due(books: Books, now: float) -> None:
    due = books.round_at is not None and now >= books.round_at
    if not due and not books.stirred:
        return
    if books.leased:
        books.stirred, books.round_at = False, None
        if books.collecting_until is None:
            lease_round(books, now)
        return
    go_on_with_round(books, now)
    books.round_at = now if books.rounds.making is not None else next_round_at(books, now)
    books.stirred = False


def _happened(books: Books, event: SchedulerEvent, now: float) -> None:
    match event:
        case Submit():
            gateway_events.submit(books, event, now)
        case Resume():
            gateway_events.resume(books, event, now)
        case Cancel():
            gateway_events.cancel(books, event, now)
        case Stopped():
            gateway_events.stopped(books, event, now)
        case Reading():
            gateway_events.reading(books, event, now)
        case TokensWanted():
            gateway_events.tokens_wanted(books, event, now)
        case GatewayBeat():
            gateway_events.gateway_beat(books, event, now)
        case SliceDone():
            worker_events.slice_done(books, event, now)
        case WorkerBeat():
            worker_events.worker_beat(books, event, now)
        case WorkerBeats():
            for beat in event.beats:
                worker_events.worker_beat(books, beat, now)
        case OrderReturned():
            worker_events.worker_lost(books, event.worker, now)
        case LengthForecast():
            take_forecast(books, event)
        case LengthPredicted():
            foretelling.predicted(books, event, now)
        case Elected():
            pass
