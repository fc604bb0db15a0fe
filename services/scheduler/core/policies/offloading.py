"""Offloading: which worker? Each answer gives every batch a worker, or none.

Workers are numbered as the round lists them. `turn` rotates from call to call, so that ties and
round-robin do not always begin with the first worker.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

Assignment = list[tuple[int, int]]
"""(batch, worker) pairs in the order of dispatch; a batch that fits nowhere is missing."""

Offload = Callable[[Sequence[float], Sequence[Sequence[int]], Sequence[float], int], Assignment]
"""(estimates of the batches in seconds, the workers each fits on, loads in seconds, turn)."""


def round_robin(
    estimates: Sequence[float],
    allowed: Sequence[Sequence[int]],
    loads: Sequence[float],
    turn: int,
) -> Assignment:
    """The next worker in turn that the batch fits on, whatever its load."""
    assignment: Assignment = []
    for batch in range(len(estimates)):
        if allowed[batch]:
            worker = min(allowed[batch], key=lambda w: (w - turn) % len(loads))
            assignment.append((batch, worker))
            turn = worker + 1
    return assignment


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
        return _to_least(longest_first, estimates, loads, turn)
    loads = list(loads)
    assignment: Assignment = []
    for batch in longest_first:
        if allowed[batch]:
            worker = min(allowed[batch], key=lambda w: (loads[w], (w - turn) % len(loads)))
            assignment.append((batch, worker))
            loads[worker] += estimates[batch]
            turn = worker + 1
    return assignment


def _to_least(
    batches: Sequence[int], estimates: Sequence[float], loads: Sequence[float], turn: int
) -> Assignment:
    """Max-min where every batch fits everywhere, with a heap: thousands of workers stay cheap.
    Of equal loads the one that got a batch longest ago is next."""
    count = len(loads)
    heap = [(load, (worker - turn) % count, worker) for worker, load in enumerate(loads)]
    heapify(heap)
    assignment: Assignment = []
    for age, batch in enumerate(batches, start=count):
        load, _, worker = heap[0]
        assignment.append((batch, worker))
        heapreplace(heap, (load + estimates[batch], age, worker))
    return assignment


OFFLOADINGS: dict[str, Offload] = {"round-robin": round_robin, "max-min": max_min}
