"""Waits: how much work waits, before whom, and how fast it lately went to the workers.

The unit of work is a token of the prompt: the prefill that it costs and the memory that it takes
are what keeps a request waiting, and both grow with it. Who comes back for want of memory counts as
when it was new: where many do, their output would make the queue look fast. On the Azure
conversations this predicts waits with half the error of counting requests (docs/operations.md,
overload).
"""

from dataclasses import dataclass, field

from services.scheduler.core.rate import BusyRate
from services.scheduler.core.state import Request

PRIORITIES_MAX = 64
"""Different priorities that are told apart; with more of them all count as one."""


@dataclass(slots=True)
class Waits:
    """Every request in state WAITING that may be placed is counted here."""

    tokens: int = 0
    served: BusyRate = field(default_factory=BusyRate)
    """Tokens of prompts placed per second, of those that had to wait."""
    _by_priority: dict[int, int] = field(default_factory=dict)
    _counted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Request id to (priority, tokens), as it was counted."""

    def __len__(self) -> int:
        return len(self._counted)

    def joined(self, request: Request, now: float, *, workers: int) -> None:
        """It waits. Time without a worker says nothing of how fast workers are."""
        priority, tokens = request.spec.priority, request.prompt_tokens
        self._counted[request.request_id] = priority, tokens
        self._by_priority[priority] = self._by_priority.get(priority, 0) + tokens
        self.tokens += tokens
        self.served.turn(now, busy=workers > 0)

    def left(self, request: Request, now: float, *, placed: bool, workers: int) -> None:
        """It does not wait any more; `placed`: because its turn came."""
        counted = self._counted.pop(request.request_id, None)
        if counted is None:
            return
        priority, tokens = counted
        self.tokens -= tokens
        rest = self._by_priority.pop(priority, 0) - tokens  # gone already if all had no tokens
        if rest:
            self._by_priority[priority] = rest
        if placed and now > request.since:
            self.served.add(now, tokens)
        self.served.turn(now, busy=bool(self._counted) and workers > 0)

    def look(self, now: float, *, workers: int) -> None:
        """Workers may have come or gone."""
        self.served.turn(now, busy=bool(self._counted) and workers > 0)

    def ahead_tokens(self, priority: int, of_priority: float | None = None) -> float:
        """What is served before a newcomer of this priority: of the same one `of_priority`, if that
        is told, else all in order of arrival."""
        if len(self._by_priority) > PRIORITIES_MAX:
            return self.tokens
        own = self._by_priority.get(priority, 0)
        better = sum(tokens for known, tokens in self._by_priority.items() if known < priority)
        return better + (own if of_priority is None else min(own, of_priority))


@dataclass(slots=True)
class Door:
    """Whether new requests are taken in (refusals.py)."""

    closed: bool = False
    opens_at_tokens: int = 0
    """It opens once no more input than this waits."""
