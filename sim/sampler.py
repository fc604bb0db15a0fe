"""Samples of what goes on inside: KV in use and foreseen, who runs and who waits, by worker."""

import numpy as np

from sim.foresight import foreseen_tokens
from sim.mesh import SimMesh
from sim.series import Series, Span
from sim.worker import SimWorker

SPANS_MAX = 20_000
"""Of all workers together; a picture has fewer pixels."""
SAMPLES_MAX = 20_000


class Sampler:
    """Looks every `every_s` seconds, twice as seldom each time there are too many samples."""

    def __init__(self, mesh: SimMesh, every_s: float) -> None:
        self._mesh = mesh
        self._every_s = every_s
        self._start = mesh.world.now
        self._times: list[float] = []
        self._rows: list[dict[str, tuple[float, float, float, float]]] = []
        self._centre: list[float] = []
        mesh.world.after(0.0, self._look)

    def _look(self) -> None:
        mesh = self._mesh
        self._times.append(mesh.world.now - self._start)
        self._rows.append({boot: self._of(worker) for boot, worker in mesh.workers.items()})
        core = mesh.leader.core
        bound = sum(row[3] for row in self._rows[-1].values())
        waiting = float(core.books.waiting) if core is not None else float("nan")
        self._centre.append(max(0.0, waiting - bound))
        if len(self._times) >= SAMPLES_MAX:
            self._times, self._rows = self._times[::2], self._rows[::2]
            self._centre, self._every_s = self._centre[::2], self._every_s * 2
        mesh.world.after(self._every_s, self._look)

    def _of(self, worker: SimWorker) -> tuple[float, float, float, float]:
        """(KV used, KV foreseen, running, waiting)."""
        return (
            float(worker.kv_tokens),
            self._foreseen(worker.boot),
            float(worker.running),
            float(worker.waiting),
        )

    def _foreseen(self, boot: str) -> float:
        core = self._mesh.leader.core
        return float("nan") if core is None else foreseen_tokens(core.books, boot)

    def series(self) -> Series:
        """What was seen."""
        workers = [worker.boot for worker in self._mesh.all_workers]
        shape = (len(workers), len(self._times))
        arrays = [np.full(shape, np.nan) for _ in range(4)]
        for at, row in enumerate(self._rows):
            for place, boot in enumerate(workers):
                for array, value in zip(arrays, row.get(boot, ()), strict=False):
                    array[place, at] = value
        return Series(
            times_s=np.array(self._times),
            workers=tuple(workers),
            kv_total=np.full(len(workers), float(self._mesh.setup.kv_tokens_each)),
            kv_used=arrays[0],
            kv_predicted=arrays[1],
            running=arrays[2],
            waiting=arrays[3],
            waiting_centre=np.array(self._centre),
            spans=self._spans(),
        )

    def _spans(self) -> tuple[Span, ...]:
        workers = self._mesh.all_workers
        whole = [
            Span(place, start - self._start, end - self._start, kind, rows)
            for place, worker in enumerate(workers)
            for start, end, kind, rows in worker.spans or ()
        ]
        share = SPANS_MAX // max(1, len(workers))
        resolution_s = 0.0
        while len(whole) > SPANS_MAX:
            resolution_s = max(2 * resolution_s, (whole[-1].end_s or 1.0) / share / 8)
            whole = _coarser(whole, resolution_s)
        return tuple(whole)


def _coarser(spans: list[Span], resolution_s: float) -> list[Span]:
    """Neighbours that are shorter than the resolution, or less than it apart, become one."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if (
            last is None
            or last.worker != span.worker
            or span.end_s - last.start_s > resolution_s
            or span.start_s - last.end_s > resolution_s
        ):
            merged.append(span)
            continue
        kind = last.kind if last.kind == span.kind else "mixed"
        requests = max(last.requests, span.requests)
        merged[-1] = Span(span.worker, last.start_s, span.end_s, kind, requests)
    return merged
