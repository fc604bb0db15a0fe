"""Checked: workers are never promised, and never use, more KV than they have."""

from shared.memory import closed_batch_tokens, leased_blocks
from shared.messages import Drop, RunSlice, SliceDone, WorkerBeat
from shared.tokens import count
from sim.checker import Checker, Facts, Tell


class MemoryChecker(Checker):
    """No worker is promised more KV than it has, uses more, or has to evict anybody itself."""

    rule = "memory"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._room: dict[str, tuple[int, int]] = {}
        """Worker to (blocks, tokens in a block)."""
        self._leases: dict[str, dict[str, tuple[int, int, int]]] = {}
        """Worker to request to (attempt, prompt tokens, until)."""
        self._blocks: dict[str, int] = {}
        self._known: set[tuple[str, str]] = set()

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case WorkerBeat() if moment == "sent":
                size = message.info.kv_block_tokens
                self._room[message.info.worker] = (message.memory.kv_tokens_capacity // size, size)
            case RunSlice() if moment == "got":
                if message.form == "leased":
                    self._leased(at, message)
                else:
                    self._closed(at, message)
            case SliceDone() if moment == "sent":
                self._done(at, message)
            case Drop() if moment == "got":
                lease = self._leases.get(message.worker, {}).get(message.request_id)
                if lease is not None and lease[0] <= message.attempt:
                    self._free(message.worker, message.request_id)

    def _closed(self, at: float, order: RunSlice) -> None:
        blocks, size = self._room[order.worker]
        longest = max(count(o.spec.prompt) + count(o.tokens) for o in order.orders)
        need = closed_batch_tokens(len(order.orders), longest, order.iterations)
        if need > blocks * size:
            self.tell(at, f"{order.worker} gets a batch of {need} of {blocks * size} KV tokens")

    def _leased(self, at: float, order: RunSlice) -> None:
        worker = order.worker
        leases = self._leases.setdefault(worker, {})
        for renewal in order.renewals:
            known = leases.get(renewal.request_id)
            if known is not None and known[0] == renewal.attempt and renewal.until > known[2]:
                self._set(worker, renewal.request_id, (*known[:2], renewal.until))
        if order.orders and (worker, order.batch_id) not in self._known:
            self._known.add((worker, order.batch_id))
            for share in order.orders:
                until = count(share.tokens) + share.lease_tokens
                lease = (share.attempt, count(share.spec.prompt), until)
                self._set(worker, share.spec.request_id, lease)
        blocks, _ = self._room[worker]
        if self.facts.calm and self._blocks.get(worker, 0) > blocks:
            self.tell(at, f"{worker} has promised {self._blocks[worker]} of {blocks} blocks")

    def _set(self, worker: str, request_id: str, lease: tuple[int, int, int]) -> None:
        self._free(worker, request_id)
        self._leases[worker][request_id] = lease
        size = self._room[worker][1]
        self._blocks[worker] = self._blocks.get(worker, 0) + leased_blocks(*lease[1:], size)

    def _free(self, worker: str, request_id: str) -> None:
        lease = self._leases.get(worker, {}).pop(request_id, None)
        if lease is not None:
            self._blocks[worker] -= leased_blocks(*lease[1:], self._room[worker][1])

    def _done(self, at: float, done: SliceDone) -> None:
        used, capacity = done.memory.kv_tokens_used, done.memory.kv_tokens_capacity
        if used > capacity:
            self.tell(at, f"{done.worker} uses {used} of {capacity} KV tokens")
        for result in done.results:
            if result.evicted and self.facts.calm:
                self.tell(at, f"{done.worker} had to evict {result.request_id}")
            lease = self._leases.get(done.worker, {}).get(result.request_id)
            if lease is not None and lease[0] == result.attempt and not result.resident:
                self._free(done.worker, result.request_id)
