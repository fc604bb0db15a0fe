"""Clients: who sends which request when, and what they do when one ends or takes too long."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sim.items import Item, Workload
from sim.report import Outcome, Record
from sim.world import World


@dataclass(slots=True)
class Call:
    """One sending of one item, as its client sees it. Times are the world's."""

    number: int
    """Of the sending, from 0."""
    item: Item
    sent_at: float
    first_at: float | None = None
    last_at: float | None = None
    gap_s: float = 0.0
    output_tokens: int = 0
    outcome: Outcome | None = None
    """None: it is open."""
    detail: str = ""
    worker: str = ""
    """That sent the latest tokens."""
    finish_reason: str = ""
    promise: tuple[float, float] | None = None
    """What was predicted of its first and last token, in seconds."""
    retry_after_s: float | None = None
    """Told with its refusal."""

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    def record(self, start: float) -> Record:
        """For the report, with times from `start` on."""
        first, last = self.first_at, self.last_at
        return Record(
            sent_s=self.sent_at - start,
            outcome=self.outcome or "failed",
            first_token_s=None if first is None else first - start,
            last_token_s=None if last is None else last - start,
            gap_max_s=self.gap_s,
            prompt_tokens=self.item.prompt_tokens,
            output_tokens=self.output_tokens,
            detail=self.detail if self.outcome else "still open",
        )


@dataclass(slots=True)
class Clients:
    """All clients of a run. An open loop sends at the recorded times; in a closed loop each client
    sends its next request when its last one has ended."""

    world: World
    workload: Workload
    submit: Callable[[Call], None]
    progress: Callable[[int, int], None] | None = None
    resubmit: bool = False
    calls: list[Call] = field(default_factory=list)
    ended: int = 0
    """Items that are done with."""
    failures: int = 0
    _queue: "deque[Item]" = field(default_factory=deque)
    _next: int = 0

    def start(self) -> None:
        """Everybody begins."""
        if self.workload.clients is None:
            self._schedule_next()
            return
        self._queue.extend(self.workload.items)
        for _ in range(min(self.workload.clients, len(self._queue))):
            self._send(self._queue.popleft())

    @property
    def done(self) -> bool:
        """Every item has been answered, for better or worse."""
        return self.ended >= len(self.workload.items)

    def finished(self, call: Call) -> None:
        """Its output is complete."""
        call.outcome = "completed"
        self._over()

    def failed(
        self, call: Call, outcome: Outcome, detail: str, retry_after_s: float | None = None
    ) -> None:
        """It was refused, or its client hung up."""
        call.outcome, call.detail = outcome, detail
        self.failures += 1
        if not self.resubmit or (outcome == "rejected" and retry_after_s is None):
            self._over()
        elif self.workload.clients is None:
            self.world.after(retry_after_s or 0.0, self._send, call.item)
        else:
            self._queue.append(call.item)
            self._send(self._queue.popleft())

    def _over(self) -> None:
        self.ended += 1
        self.world.stopped = self.done
        if self.progress is not None:
            self.progress(self.ended, len(self.workload.items))
        if self.workload.clients is not None and self._queue:
            self._send(self._queue.popleft())

    def _schedule_next(self) -> None:
        items = self.workload.items
        if self._next < len(items):
            item = items[self._next]
            self._next += 1
            self.world.at(item.arrival_s or 0.0, self._arrives, item)

    def _arrives(self, item: Item) -> None:
        self._send(item)
        self._schedule_next()

    def _send(self, item: Item) -> None:
        call = Call(len(self.calls), item, self.world.now)
        self.calls.append(call)
        self.submit(call)
