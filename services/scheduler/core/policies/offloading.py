"""Offloading: which worker? Each answer gives every batch a worker, or none.

Workers are numbered as the round lists them. `turn` rotates from call to call, so that ties and
round-robin do not always begin with the first worker.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heapreplace

import numpy as np

Assignment = Iterator[tuple[int, int]]
"""(batch, worker) pairs in the order of dispatch, found as they are asked for; a batch that fits
nowhere is missing."""

Offload = Callable[[Sequence[float], Sequence[Sequence[int]], Sequence[float], int], Assignment]
"""(estimates of the batches in seconds, the workers each fits on in ascending order, loads in
seconds, turn)."""


def round_robin(
    estimates: Sequence[float],
    allowed: Sequence[Sequence[int]],
    loads: Sequence[float],
    turn: int,
) -> Assignment:
    """The next worker in turn that the batch fits on, whatever its load."""
    for batch in range(len(estimates)):
        targets = allowed[batch]
        if targets:
            place = bisect_left(targets, turn % len(loads))
            worker = targets[place if place < len(targets) else 0]
            yield batch, worker
            turn = worker + 1


def max_min(
    estimates: Sequence[float],
    allowed: Sequence[Sequence[int]],
    loads: Sequence[float],
    turn: int,
) -> Assignment:
    """SCLS's max-min, as reconstructed: the longest batch first, each to the least loaded worker
    at that moment; ties rotate."""
    longest_first = sorted(range(len(estimates)), key=lambda b: -estimates[b])
    if all(len(targets) == len(loads) for targets in allowed):
        yield from _to_least(longest_first, estimates, loads, turn)
        return
    now = np.array(loads, dtype=np.float64)
    arrays = {id(targets): np.array(targets, dtype=np.intp) for targets in allowed}
    for batch in longest_first:
        targets = arrays[id(allowed[batch])]
        if not targets.size:
            continue
        there = now[targets]
        least = targets[there == there.min()]
        worker = int(least[((least - turn) % len(loads)).argmin()])
        yield batch, worker
        now[worker] += estimates[batch]
        turn = worker + 1


def _to_least(
    batches: Sequence[int], estimates: Sequence[float], loads: Sequence[float], turn: int
) -> Assignment:
    """Max-min where every batch fits everywhere, with a heap: thousands of workers stay cheap.
    Of equal loads the one that got a batch longest ago is next."""
    count = len(loads)
    heap = [(load, (worker - turn) % count, worker) for worker, load in enumerate(loads)]
    heapify(heap)
    for age, batch in enumerate(batches, start=count):
        load, _, worker = heap[0]
        yield batch, worker
        heapreplace(heap, (load + estimates[batch], age, worker))


OFFLOADINGS: dict[str, Offload] = {"round-robin": round_robin, "max-min": max_min}
