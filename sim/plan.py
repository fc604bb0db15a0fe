"""Plan: the fewest workers that are enough, found by galloping and bisection.

It rests on more workers never being worse. Where that is not so (a policy that gets worse with
size, or luck near the target), the answer is still a size that was tried and met the target, with
one less that was tried and did not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tried:
    """One size, and the share of requests that met every objective."""

    workers: int
    attainment: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`workers` None: no size up to the largest allowed one met the target."""

    workers: int | None
    tried: tuple[Tried, ...]


def fewest_workers(
    attained: Callable[[int], float], target: float, *, workers_max: int, workers_min: int = 1
) -> Plan:
    """Double from `workers_min` until the target is met, then halve the interval in between."""
    assert 1 <= workers_min <= workers_max
    tried: list[Tried] = []

    def meets(workers: int) -> bool:
        tried.append(Tried(workers, attained(workers)))
        return tried[-1].attainment >= target

    failed = workers_min - 1
    for size in _gallop(workers_min, workers_max):
        if meets(size):
            enough = size
            while enough - failed > 1:
                middle = (failed + enough) // 2
                if meets(middle):
                    enough = middle
                else:
                    failed = middle
            return Plan(enough, tuple(tried))
        failed = size
    return Plan(None, tuple(tried))


def _gallop(first: int, last: int) -> Iterator[int]:
    size = first
    while size < last:
        yield size
        size *= 2
    yield last
