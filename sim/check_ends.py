"""Checked: nobody starves, and when all is over nothing is left."""

from shared.messages import Drop, Finished, Rejected, RunSlice, SliceDone, Submit, WorkerBeat
from sim.checker import Checker, Facts, Tell


class StarvationChecker(Checker):
    """Nobody waits too long: for a place, or placed, for a word of its worker."""

    rule = "starvation"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._since: dict[str, float] = {}
        self._limit_s = facts.waiting_max_s

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case Submit() if moment == "got":
                self._since.setdefault(message.spec.request_id, at)
            case RunSlice() if moment == "sent":
                for order in message.orders:
                    self._moves(at, order.spec.request_id)
            case SliceDone() if moment == "got":
                for result in message.results:
                    self._moves(at, result.request_id)
                    if result.finish_reason is not None:
                        self._since.pop(result.request_id, None)
            case Finished() | Rejected() if moment == "sent":
                self._since.pop(message.request_id, None)

    def _moves(self, at: float, request_id: str) -> None:
        since = self._since.get(request_id)
        if since is None:
            return
        if at - since > self._limit_s:
            self.tell(at, f"{request_id} waited {at - since:.1f} s")
        self._since[request_id] = at

    def end(self, at: float) -> None:
        for request_id, since in self._since.items():
            if at - since > self._limit_s:
                self.tell(at, f"{request_id} still waits after {at - since:.1f} s")


class EndChecker(Checker):
    """When all is over nothing is left: no lease, no order, no block in use."""

    rule = "end"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._open: dict[tuple[str, str], int] = {}
        """(Worker, request) to attempt, as the worker has them."""
        self._used: dict[str, int] = {}
        self._heard: dict[str, float] = {}

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case RunSlice() if moment == "got":
                for order in message.orders:
                    key = (message.worker, order.spec.request_id)
                    self._open[key] = max(order.attempt, self._open.get(key, 0))
            case SliceDone() if moment == "sent":
                for result in message.results:
                    if not result.resident:
                        self._gone(message.worker, result.request_id, result.attempt)
                if message.refused:
                    self._used[message.worker] = message.memory.kv_tokens_used
            case Drop() if moment == "got":
                self._gone(message.worker, message.request_id, message.attempt)
            case WorkerBeat() if moment == "sent":
                worker = message.info.worker
                self._used[worker], self._heard[worker] = message.memory.kv_tokens_used, at
                if message.leaving:
                    del self._used[worker]

    def _gone(self, worker: str, request_id: str, attempt: int) -> None:
        if self._open.get((worker, request_id), attempt + 1) <= attempt:
            del self._open[worker, request_id]

    def end(self, at: float) -> None:
        alive = {worker for worker, heard in self._heard.items() if at - heard < 1.0}
        for (worker, request_id), attempt in self._open.items():
            if worker in alive and self.facts.calm:
                self.tell(at, f"{worker} still has attempt {attempt} of {request_id}")
        for worker, used in self._used.items():
            if worker in alive and used:
                self.tell(at, f"{worker} still uses {used} KV tokens")
