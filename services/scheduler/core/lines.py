"""Lines: where leased requests wait, in the order of the policy.

With late binding there is one line in the centre. With early binding a request is bound to a
worker when it comes, as a load balancer in front of servers does, and waits in that worker's line;
the central one then holds only those that no worker could be found for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from services.scheduler.core.policies.order import Queue
from services.scheduler.core.state import Request
from services.scheduler.core.workers import Worker


@dataclass(slots=True)
class Lines:
    """Every open leased request in state WAITING is in exactly one line."""

    make: Callable[[], Queue]
    early: bool
    central: Queue
    bound: dict[str, Worker] = field(default_factory=dict)
    """Request id to the worker in whose line it is."""
    stirred: bool = False
    """Early binding: somebody in the centre, or a worker, is new since they were last bound."""

    def push(self, request: Request, worker: Worker | None, now: float) -> None:
        """It waits: for this worker, or in the centre."""
        if worker is None:
            self.central.push(request, now)
            self.stirred = True
            return
        if worker.line is None:
            worker.line = self.make()
        worker.line.push(request, now)
        worker.waiting_tokens += request.input_tokens
        self.bound[request.request_id] = worker

    def remove(self, request: Request) -> Worker | None:
        """It does not wait any more; the worker in whose line it was."""
        worker = self.bound.pop(request.request_id, None)
        if worker is None:
            self.central.remove(request)
            return None
        assert worker.line is not None
        worker.line.remove(request)
        worker.waiting_tokens -= request.input_tokens
        return worker

    def charge(
        self, request: Request, worker: Worker, prefill_tokens: int, decode_tokens: int
    ) -> None:
        """Service that a request was given on a worker, to the line that keeps accounts of it."""
        line = worker.line if self.early else self.central
        if line is not None:
            line.charge(request, prefill_tokens, decode_tokens)
