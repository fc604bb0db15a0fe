"""One run: a set-up goes in, the report comes out, with as much of its inside as is wanted."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, pstdev

import msgspec

from services.scheduler.core.calibration import LEVELS
from services.scheduler.core.replay import Step as JournalStep, started, to_bytes
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from sim.leader import Spent, Step
from sim.mesh import SimMesh
from sim.network import Seen
from sim.report import Calibration, Record, Report, summarise
from sim.sampler import Sampler
from sim.series import Series
from sim.setup import Setup
from sim.worker_leased import PAUSED_MAX_S

SETTLE_S = 2 * PAUSED_MAX_S
"""After the last request has ended: for what is still on its way, and for forgotten leases."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep of a run's inside; everything costs memory, and some of it time."""

    series: bool = False
    sample_s: float = 1.0
    spans: bool = True
    """With `series`: the workers' timelines."""
    journal: bool = False
    """Every call of the scheduler's core, for `tranche replay`."""
    messages: bool = False
    """Every message sent and received, for the checkers."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out. Two runs of equal set-ups differ in `spent` only (and in the report's
    `scheduler_cpu_s`), which this machine's clock has measured."""

    report: Report
    records: Sequence[Record]
    series: Series | None
    steps: Sequence[Step]
    """The journal: empty unless kept. An election begins a new leadership."""
    messages: Sequence[Seen]
    spent: Spent
    policy: str
    constants: Constants
    events: int
    """Of the world."""

    @property
    def transcript(self) -> bytes:
        """The journal as bytes, as the real scheduler writes it and `tranche replay` reads it."""
        parts = []
        for step in self.steps:
            if step.event is not None and type(step.event).__name__ == "Elected":
                parts.append(to_bytes(started(self.policy, self.constants)))
            record = JournalStep(now=step.now, event=step.event, commands=tuple(step.commands))
            parts.append(to_bytes(record))
        return b"".join(parts)

    @property
    def digest(self) -> str:
        """A fingerprint of the journal and of the records."""
        whole = hashlib.sha256(self.transcript)
        whole.update(msgspec.msgpack.encode([repr(record) for record in self.records]))
        return whole.hexdigest()


NOTHING = Keep()


def run(
    setup: Setup,
    *,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = NOTHING,
) -> Outcome:
    """Simulate the set-up to its end. `progress(done, total)` counts requests."""
    journal: list[Step] | None = [] if keep.journal else None
    log: list[Seen] | None = [] if keep.messages else None
    mesh = SimMesh(
        setup,
        progress=progress,
        journal=journal,
        log=log,
        spans=keep.series and keep.spans,
    )
    sampler = Sampler(mesh, keep.sample_s) if keep.series else None
    with _quiet_collector():
        mesh.start()
        begun_at = mesh.world.now
        run_out(mesh)
    series = sampler.series() if sampler is not None else None
    records = [call.record(0.0) for call in mesh.clients.calls]
    report = _report(mesh, records, begun_at)
    if keep.messages:
        mesh.world.run(mesh.world.now + SETTLE_S)
    return Outcome(
        report=report,
        records=records,
        series=series,
        steps=journal or (),
        messages=log or (),
        spent=mesh.leader.spent,
        policy=setup.policy,
        constants=setup.all_constants(),
        events=mesh.world.events,
    )


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Messages make no reference cycles, so looking for some after every few hundred of them finds
    nothing and costs a tenth of the run."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_out(mesh: SimMesh) -> None:
    """On from the start until all requests have ended, or none has for too long."""
    clients, world, stalled_s = mesh.clients, mesh.world, mesh.setup.stalled_s
    last_arrival = max(item.arrival_s or 0.0 for item in mesh.setup.workload.items)
    while not clients.done:
        seen = (clients.ended, len(clients.calls))
        world.run(world.now + stalled_s)
        if seen == (clients.ended, len(clients.calls)) and world.now > last_arrival + stalled_s:
            return
    world.stopped = False


def _report(mesh: SimMesh, records: Sequence[Record], begun_at: float) -> Report:
    setup = mesh.setup
    report = summarise(
        records,
        policy=setup.policy,
        workers=setup.workers,
        slo=setup.slo,
        workload=setup.workload.name,
    )
    workers = mesh.all_workers
    tallies = [worker.tally for worker in workers]
    counts = [worker.counts for worker in workers]
    evicted: set[str] = set()
    for count in counts:
        evicted |= count.evicted.keys()
    leased = workers[0].form == "leased"
    block_tokens = setup.block_tokens_each if leased else 1
    iterations = sum(tally.iterations for tally in tallies)
    batches = sum(tally.batches for tally in tallies)
    together = sum(t.sequence_iterations for t in tallies) / max(1, iterations)
    rows = sum(count.batch_rows for count in counts) / max(1, batches)
    kv_seconds = block_tokens * sum(tally.kv_block_seconds for tally in tallies)
    room = setup.kv_tokens_each * setup.workers * max(report.duration_s, 1e-9)
    return msgspec.structs.replace(
        report,
        evictions=sum(count.evictions for count in counts),
        evicted_requests=len(evicted),
        kv_util_mean=kv_seconds / room,
        kv_peak_max=max(t.kv_blocks_peak for t in tallies) * block_tokens / setup.kv_tokens_each,
        invalid_tokens=sum(count.invalid_tokens for count in counts),
        pad_tokens=sum(count.pad_tokens for count in counts),
        slices_per_request=sum(count.slices for count in counts) / max(1, len(records)),
        batch_size_mean=together if leased else rows,
        early_return_ratio=None
        if leased
        else sum(tally.early_returns for tally in tallies) / max(1, batches),
        completion_time_std_s=pstdev(count.last_end_at - begun_at for count in counts),
        busy_time_std_s=pstdev(tally.busy_s for tally in tallies),
        scheduler_cpu_s=mesh.leader.spent.seconds(),
        decisions=mesh.leader.spent.calls,
        calibration=_calibration(mesh.leader.core),
    )


def _calibration(core: Scheduler | None) -> Calibration | None:
    """What the last leader found of its own predictions."""
    if core is None:
        return None
    books, counted = core.books, core.books.calibration
    margin, of = books.margin, max(1, counted.compared)
    errors: dict[str, list[float]] = {"start": [], "finish": []}
    for miss in books.promises.misses:
        errors[miss.kind].append(miss.error)
    levels = [f"{level:g}" for level in LEVELS]
    chance = books.preset.admission == "chance"
    return Calibration(
        outputs=counted.compared,
        coverage=dict(zip(levels, (n / of for n in counted.covered), strict=True)),
        pinball_tokens=dict(zip(levels, (x / of for x in counted.pinball_tokens), strict=True)),
        evicted_share=books.evictions / max(1, margin.finished),
        evicted_target=margin.target(books.constants, books.board.taking) if chance else None,
        start_error=median(errors["start"]) if errors["start"] else None,
        finish_error=median(errors["finish"]) if errors["finish"] else None,
    )
