"""The book of requests: who is open, who waits in the pool, who ended lately."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core.state import HELD, Cause, Request, State, move
from shared import tokens
from shared.messages import Rejected, RequestSpec

PLACEMENTS_KEPT = 8
"""Of a finished request: a gateway that misses more than its last slices is recalled instead."""


@dataclass(slots=True)
class Requests:
    """Every dict is in order of insertion, so that equal histories give equal decisions."""

    done_max: int
    done_ttl_s: float
    open: dict[str, Request] = field(default_factory=dict)
    pool: dict[str, Request] = field(default_factory=dict)
    """The open ones that wait."""
    recalling: dict[str, Request] = field(default_factory=dict)
    """The open ones whose gateways are asked for the truth."""
    done: dict[str, Request] = field(default_factory=dict)
    refused: dict[str, tuple[float, Rejected | None]] = field(default_factory=dict)
    """Never taken in: rejected (with the answer), or cancelled before they were known (None)."""
    taken: int = 0
    """How many were ever opened: the next one's number."""

    def open_new(self, spec: RequestSpec) -> Request:
        """A record in state NEW."""
        self.taken += 1
        request = Request(
            spec=spec,
            number=self.taken,
            prompt_tokens=tokens.count(spec.prompt),
            predicted_tokens=spec.predicted_output_tokens or 0,
        )
        self.open[spec.request_id] = request
        return request

    def known(self, request_id: str) -> bool:
        return request_id in self.open or request_id in self.done or request_id in self.refused

    def of_gateway(self, request_id: str, gateway: str) -> Request | None:
        """The open or finished request, if it is this gateway's."""
        request = self.open.get(request_id) or self.done.get(request_id)
        return request if request and request.spec.gateway == gateway else None

    def move(self, request: Request, cause: Cause, now: float) -> None:
        """Change its state and keep the lists right."""
        request_id = request.request_id
        move(request, cause, now)
        if request.state not in HELD:
            request.worker = request.batch_id = ""
        if request.state is State.WAITING:
            self.pool[request_id] = request
        else:
            self.pool.pop(request_id, None)
        if request.state is State.RECALLING:
            self.recalling[request_id] = request
        else:
            self.recalling.pop(request_id, None)
        if request.state is State.DONE:
            self.open.pop(request_id, None)
            self._remember(request)
        elif request_id in self.done:
            del self.done[request_id]
            self.open[request_id] = request

    def refuse(self, request_id: str, answer: Rejected | None, now: float) -> None:
        """Remember that this id is not to be opened by a late or repeated Submit."""
        self.refused[request_id] = (now, answer)
        if len(self.refused) > self.done_max:
            del self.refused[next(iter(self.refused))]

    def forget(self, now: float) -> None:
        """Drop what is too old to be asked for."""
        for request_id in _older(
            ((i, r.since) for i, r in self.done.items()), now, self.done_ttl_s
        ):
            del self.done[request_id]
        for request_id in _older(
            ((i, r[0]) for i, r in self.refused.items()), now, self.done_ttl_s
        ):
            del self.refused[request_id]

    def _remember(self, request: Request) -> None:
        request.tokens = b""
        del request.placements[:-PLACEMENTS_KEPT]
        self.done[request.request_id] = request
        if len(self.done) > self.done_max:
            del self.done[next(iter(self.done))]


def _older(entries: Iterable[tuple[str, float]], now: float, ttl_s: float) -> list[str]:
    """The ids at the front that are too old; entries are in order of time."""
    old: list[str] = []
    for request_id, since in entries:
        if now - since <= ttl_s:
            break
        old.append(request_id)
    return old
