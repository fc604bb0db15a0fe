"""Checked: one place for a request at a time, and no token without a lease."""

from shared.messages import Drop, Recall, Resume, RunSlice, SliceDone, TokenBatch
from shared.tokens import count
from sim.checker import Checker, Facts, Tell


class PlaceChecker(Checker):
    """No request is on two workers with an open attempt, as far as its scheduler can know."""

    rule = "place"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._places: dict[str, tuple[int, str, str, int]] = {}
        """Request to (epoch, worker, batch, attempt)."""

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case RunSlice() if moment == "sent":
                for order in message.orders:
                    self._place(at, message, order.spec.request_id, order.attempt)
            case SliceDone() if moment == "got":
                for result in message.results:
                    place = self._places.get(result.request_id)
                    mine = (message.worker, result.attempt)
                    if place and not result.resident and (place[1], place[3]) == mine:
                        del self._places[result.request_id]
                if message.refused:
                    self._refused(message)
            case Drop() | Recall() if moment == "sent":
                self._close(message.request_id, message.attempt)
            case Resume() if moment == "got":
                self._close(message.spec.request_id, message.attempt)

    def _place(self, at: float, order: RunSlice, request_id: str, attempt: int) -> None:
        place = self._places.get(request_id)
        if place is not None and place[0] == order.epoch:
            detail = f"attempt {attempt} to {order.worker}, {place[3]} still on {place[1]}"
            self.tell(at, f"{request_id}: {detail}")
        self._places[request_id] = (order.epoch, order.worker, order.batch_id, attempt)

    def _close(self, request_id: str, attempt: int) -> None:
        place = self._places.get(request_id)
        if place is not None and place[3] <= attempt:
            del self._places[request_id]

    def _refused(self, done: SliceDone) -> None:
        mine = (done.worker, done.batch_id)
        gone = [r for r, p in self._places.items() if (p[1], p[2]) == mine]
        for request_id in gone:
            del self._places[request_id]


class LeaseChecker(Checker):
    """No worker makes a token that it was not given a lease for."""

    rule = "lease"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._until: dict[tuple[str, str, int], int] = {}

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case RunSlice() if moment == "got":
                for order in message.orders:
                    until = count(order.tokens) + order.lease_tokens
                    self._raise(message.worker, order.spec.request_id, order.attempt, until)
                for renewal in message.renewals:
                    worker, until = message.worker, renewal.until
                    self._raise(worker, renewal.request_id, renewal.attempt, until)
            case SliceDone() if moment == "sent" and not message.refused:
                for result in message.results:
                    end = result.position + count(result.tokens)
                    self._check(at, message.worker, result.request_id, result.attempt, end)
            case TokenBatch() if moment == "sent":
                for run in message.runs:
                    end = run.position + count(run.ids)
                    self._check(at, message.worker, run.request_id, run.attempt, end)

    def _raise(self, worker: str, request_id: str, attempt: int, until: int) -> None:
        key = (worker, request_id, attempt)
        self._until[key] = max(until, self._until.get(key, 0))

    def _check(self, at: float, worker: str, request_id: str, attempt: int, end: int) -> None:
        until = self._until.get((worker, request_id, attempt))
        if until is None:
            self.tell(at, f"{worker} has {request_id} without an order")
        elif end > until:
            self.tell(at, f"{worker} made {end} tokens of {request_id}, with a lease to {until}")
