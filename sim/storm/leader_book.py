"""Checked: one leader's books agree with what it said and heard.

A book of our own is kept from its commands and its events alone: who is placed where under which
attempt, how much memory that promises, which ends it has published. Its own books must say the
same after every call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.scheduler.core.books import Books
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import HELD, State
from shared.memory import leased_blocks
from shared.messages import (
    Drop,
    Finished,
    Recall,
    Rejected,
    Renewal,
    Resume,
    RunSlice,
    SchedulerCommand,
    SliceDone,
    Stopped,
)
from shared.tokens import count

Tell = Callable[[str, str], None]
AUDIT_EVERY = 16
"""Calls between two looks at every sum in the books; who is placed where is compared always."""
REFUSED_SLACK = 1


@dataclass(slots=True)
class Place:
    """One placement that this leader counts as live."""

    worker: str
    attempt: int
    batch: str
    prompt: int
    until: int


class LeaderBook:
    """See the module's text."""

    def __init__(
        self,
        books: Books,
        constants: Constants,
        tell: Tell,
        published: Callable[[Finished], None],
    ) -> None:
        """`constants` are those that were wanted; `published` hears of every end that is told to
        the estimator."""
        self._books = books
        self._constants = constants
        self._tell = tell
        self._published_to = published
        self._places: dict[str, Place] = {}
        self._published: set[str] = set()
        self._stopped: dict[str, int] = {}
        """Request to the length at which its gateway found a stop string, as far as that was heard
        before its end."""
        self._calls = 0
        self.adopted = False
        """It took over leases whose reach an earlier leader decided."""

    def after(self, event: Any, commands: Sequence[SchedulerCommand]) -> None:
        """One call of the core is over."""
        self._heard(event)
        for command in commands:
            self._said(command)
        self._compare()
        self._calls += 1
        if self._calls % AUDIT_EVERY == 0:
            self.audit()

    # ----------------------------------------------------------------------- events and commands

    def _heard(self, event: Any) -> None:
        match event:
            case SliceDone() if event.epoch > self._books.epoch:
                pass  # said to a successor: a deposed leader goes on counting what it placed
            case SliceDone():
                for result in event.results:
                    place = self._places.get(result.request_id)
                    mine = place and (place.worker, place.attempt) == (event.worker, result.attempt)
                    if mine and not result.resident and not event.refused:
                        del self._places[result.request_id]
                if event.refused and event.batch_id:
                    self._refused(event)
            case Resume():
                place = self._places.get(event.spec.request_id)
                if place is not None and place.attempt <= event.attempt:
                    del self._places[event.spec.request_id]
            case Stopped():
                if event.request_id not in self._published:
                    self._stopped.setdefault(event.request_id, event.output_tokens)
            case _:
                pass

    def _refused(self, done: SliceDone) -> None:
        for request_id, place in list(self._places.items()):
            mine = (place.worker, place.batch) == (done.worker, done.batch_id)
            request = self._books.requests.open.get(request_id)
            here = request and (request.worker, request.attempt) == (place.worker, place.attempt)
            if mine and not here:
                del self._places[request_id]

    def _said(self, command: SchedulerCommand) -> None:
        match command:
            case RunSlice():
                for order in command.orders:
                    self._place(command, order)
                for renewal in command.renewals:
                    self._renewed(command.worker, renewal)
            case Drop():
                place = self._places.get(command.request_id)
                if place is not None and place.worker == command.worker:
                    self._close(command.request_id, command.attempt)
            case Recall():
                self._close(command.request_id, command.attempt)
            case Rejected():
                self._places.pop(command.request_id, None)
            case Finished():
                self._places.pop(command.request_id, None)
                if command.request_id in self._published:
                    self._tell("history", f"{command.request_id} is published twice")
                self._published.add(command.request_id)
                true = self._stopped.get(command.request_id, command.output_tokens)
                if command.reason != "cancelled" and command.output_tokens != true:
                    self._tell("history", f"{command.request_id} was stopped at {true} tokens")
                self._published_to(command)
            case _:
                pass

    def _place(self, command: RunSlice, order: Any) -> None:
        request_id = order.spec.request_id
        known = self._places.get(request_id)
        if known is not None:
            detail = f"attempt {order.attempt} to {command.worker}, {known.attempt} still counts"
            self._tell("place", f"{request_id}: {detail} on {known.worker}")
        made = count(order.tokens)
        self._places[request_id] = Place(
            command.worker,
            order.attempt,
            command.batch_id,
            count(order.spec.prompt),
            made + order.lease_tokens,
        )
        if made + order.lease_tokens > order.spec.max_tokens:
            self._tell("lease", f"{request_id} may make more than its limit")

    def _renewed(self, worker: str, renewal: Renewal) -> None:
        place = self._places.get(renewal.request_id)
        if place is not None and (place.worker, place.attempt) == (worker, renewal.attempt):
            place.until = max(place.until, renewal.until)

    def _close(self, request_id: str, attempt: int) -> None:
        place = self._places.get(request_id)
        if place is not None and place.attempt <= attempt:
            del self._places[request_id]

    # -------------------------------------------------------------------------------- comparing

    def _compare(self) -> None:
        """Who is where, by its books and by ours."""
        places = self._places
        theirs = {r.request_id: r for r in self._books.requests.open.values() if r.worker}
        for request_id, request in theirs.items():
            place = places.get(request_id)
            if place is None:
                if request.batch_id.startswith("adopted"):
                    self._adopt(request)
                else:
                    self._tell("books", f"{request_id} is not placed, the leader thinks it is")
            elif (place.worker, place.attempt) != (request.worker, request.attempt):
                self._tell("books", f"{request_id} is elsewhere than the leader thinks")
        if len(theirs) != len(places):
            for request_id in set(places) - set(theirs):
                self._tell("books", f"{request_id} is placed, and the leader does not know it")
                del places[request_id]

    def _adopt(self, request: Any) -> None:
        self.adopted = True
        self._places[request.request_id] = Place(
            request.worker,
            request.attempt,
            request.batch_id,
            request.prompt_tokens,
            request.until,
        )

    def audit(self) -> None:
        """Every sum that is kept along the way equals what a look at everything finds."""
        books = self._books
        for request_id, request in books.requests.open.items():
            held = request.state in HELD
            self._want(held == bool(request.worker), f"{request_id}: {request.state}, no worker")
            waits = request.state is State.WAITING
            self._want(waits == (request_id in books.requests.pool), f"{request_id}: pool")
        self._want(not set(books.requests.open) & set(books.requests.done), "open and done")
        for name, worker in books.workers.active.items():
            credit = worker.credit
            leases = list(credit.leases.values())
            self._want(credit.blocks == sum(r.blocks for r in leases), f"{name}: blocks")
            backlog = sum(r.backlog_tokens for r in leases)
            self._want(credit.backlog_tokens == backlog, f"{name}: backlog")
            parking = sum(r.blocks for r in leases if r.state is State.PARKING)
            self._want(credit.parking_blocks == parking, f"{name}: parking blocks")
            load = sum((b.estimate_s for b in worker.batches.values()), start=0.0)
            self._want(worker.load_s == load, f"{name}: load")
            self._promises(name, worker)
        self._bounds()

    def _want(self, holds: bool, what: str) -> None:
        if not holds:
            self._tell("books", what)

    def _promises(self, name: str, worker: Any) -> None:
        """What is promised fits, by our own sum. A leader that took over counts leases that it did
        not give; it may find that they do not fit, and must not add to them."""
        if not self._books.leased or self.adopted:
            return
        size = worker.credit.block_tokens
        room = worker.memory.kv_tokens_capacity // size
        mine = [p for p in self._places.values() if p.worker == name]
        promised = sum(leased_blocks(p.prompt, p.until, size) for p in mine)
        if promised > room:
            self._tell("memory", f"{name} is promised {promised} of {room} blocks")

    def _bounds(self) -> None:
        books, constants = self._books, self._constants
        requests = books.requests
        bounds = {
            "done": (len(requests.done), constants.done_max),
            "refused": (len(requests.refused), constants.done_max + REFUSED_SLACK),
            "lost workers": (len(books.workers.lost), constants.lost_workers_max),
        }
        for name, (size, most) in bounds.items():
            if size > most:
                self._tell("bounds", f"{name}: {size}, at most {most}")
        for name, worker in books.workers.active.items():
            if len(worker.batches) > constants.batches_max:
                self._tell("bounds", f"{name} has {len(worker.batches)} batches")
