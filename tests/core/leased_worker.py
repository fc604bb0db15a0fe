"""A worker of the small world that runs leases, with a block pool of its own that must suffice."""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from shared import tokens
from shared.memory import leased_blocks
from shared.messages import (
    Drop,
    Park,
    Renewal,
    Resident,
    RunSlice,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerInfo,
)
from tests.core.world import STEP_S, FakeWorker, World

BLOCK = 4
PREFILL_STEPS = 3


@dataclass(slots=True)
class Lease:
    """One request here."""

    order: SliceOrder
    until: int
    reported: int
    prefill_left: int = PREFILL_STEPS
    marked: int = -1
    """The `until` for which its margin was reported."""
    parking: bool = False

    @property
    def request_id(self) -> str:
        return self.order.spec.request_id


class LeasedWorker(FakeWorker):
    """Continuous at iteration level; everything that it holds fits its pool, or the test fails."""

    def __init__(self, world: World, boot: str, capacity: int, batch_size_max: int) -> None:
        super().__init__(world, boot, capacity, batch_size_max)
        info: WorkerInfo = self.info
        self.info = msgspec.structs.replace(
            info, engine="simulated", forms=("leased",), kv_block_tokens=BLOCK
        )
        self.leases: dict[str, Lease] = {}
        self.margin = 1
        self.turning = False

    def held(self) -> Iterable[Resident]:
        return (
            Resident(
                request_id=lease.request_id,
                attempt=lease.order.attempt,
                position=self._position(lease.order),
                until=lease.until,
            )
            for lease in self.leases.values()
            if self._live(lease.order)
        )

    @property
    def busy(self) -> bool:
        return bool(self.leases)

    def _start(self, batch: RunSlice) -> None:
        self.margin = batch.margin_tokens or self.margin
        self._renew(batch.renewals)
        if batch.batch_id in self.seen or not batch.orders:
            return
        self.seen.add(batch.batch_id)
        if self.draining:
            self._tell(batch.batch_id, (), refused="draining")
            return
        for order in batch.orders:
            made = tokens.count(order.tokens)
            assert 1 <= order.lease_tokens <= order.spec.max_tokens - made
            known = self.leases.get(order.spec.request_id)
            if self._live(order) and (known is None or known.order.attempt < order.attempt):
                self.leases[order.spec.request_id] = Lease(order, made + order.lease_tokens, made)
        self._check_memory()
        self._turn_soon()

    def _renew(self, renewals: tuple[Renewal, ...]) -> None:
        for renewal in renewals:
            lease = self.leases.get(renewal.request_id)
            if lease is not None and lease.order.attempt == renewal.attempt:
                lease.until = max(lease.until, renewal.until)
        self._check_memory()
        self._turn_soon()

    def park(self, message: Park) -> None:
        lease = self.leases.get(message.request_id)
        if lease is not None and lease.order.attempt == message.attempt:
            lease.parking = True
            self._turn_soon()

    def leave(self) -> None:
        super().leave()
        self._turn_soon()

    def dropped_one(self, message: Drop) -> None:
        lease = self.leases.get(message.request_id)
        if lease is not None and lease.order.attempt <= message.attempt:
            del self.leases[message.request_id]

    def _check_memory(self) -> None:
        blocks = sum(
            leased_blocks(tokens.count(x.order.spec.prompt), x.until, BLOCK)
            for x in self.leases.values()
            if x.order.attempt > self.world.dropped.get((self.boot, x.request_id), 0)
        )
        overcommitted = self.world.adopted  # a new leader does not know how far leases reach
        assert overcommitted or blocks <= self.memory.kv_tokens_capacity // BLOCK, "out of memory"

    def _turn_soon(self) -> None:
        if not self.turning and self.leases:
            self.turning = True
            self.world.net.after(STEP_S, self._turn)

    def _turn(self) -> None:
        """One iteration: a token for everybody whose prefill is over and whose lease lasts."""
        self.turning = False
        if not self.alive:
            return
        reports = [r for lease in list(self.leases.values()) for r in self._advance(lease)]
        if reports:
            self._tell("", tuple(reports))
        runnable = [x for x in self.leases.values() if x.parking or not self._used_up(x)]
        if runnable or (self.draining and self.leases):
            self._turn_soon()

    def _used_up(self, lease: Lease) -> bool:
        return self._position(lease.order) >= lease.until

    def _advance(self, lease: Lease) -> list[SliceResult]:
        order = lease.order
        if not self._live(order):
            self.leases.pop(lease.request_id, None)
            return []
        kept = self._kept(order)
        first = not kept.ids
        if lease.parking or (self.draining and self._used_up(lease)):
            del self.leases[lease.request_id]
            return [self._report(lease, resident=False)]
        if lease.prefill_left > 1:
            lease.prefill_left -= 1
            return []
        if self._used_up(lease):
            return []
        self._make(order, kept)
        self._stream(order.spec, order.attempt, kept, kept.position + len(kept.ids) - 1)
        left = lease.until - self._position(order)
        if kept.finish:
            del self.leases[lease.request_id]
            return [self._report(lease, resident=False, finish=kept.finish)]
        marked = left <= self.margin and lease.marked != lease.until
        if marked:
            lease.marked = lease.until
        return [self._report(lease, resident=True)] if first or marked or left == 0 else []

    def _report(self, lease: Lease, resident: bool, finish: str | None = None) -> SliceResult:
        kept = self._kept(lease.order)
        begin = lease.reported
        lease.reported = self._position(lease.order)
        return SliceResult(
            request_id=lease.request_id,
            attempt=lease.order.attempt,
            position=begin,
            tokens=tokens.pack(kept.ids[begin - kept.position :]),
            finish_reason=finish,  # type: ignore[arg-type]
            resident=resident,
        )

    def _tell(self, batch_id: str, results: tuple[SliceResult, ...], refused: str = "") -> None:
        self.world.to_scheduler(
            SliceDone(
                epoch=self.epoch,
                worker=self.boot,
                batch_id=batch_id,
                form="leased",
                results=results,
                timings=SliceTimings(),
                memory=self.memory,
                refused=refused,
            )
        )
