"""Batching: who runs together? Each answer cuts the waiting requests into closed batches.

Requests are told by number. A batch of one is always allowed here, even if it fits no worker:
offloading decides that. What is in no batch stays in the pool.

A long pool takes longer than a call of the core may: each answer is a generator that yields now
and then how much work it has done, in about microseconds, and returns the batches.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

from shared.costs import Bilinear, SliceCost

T = TypeVar("T")
Batches = list[list[int]]
Cuts = list[tuple[int, int]]
CHUNK = 512
"""Requests or batches looked at between two yields."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What batching may know."""

    order: Sequence[int]
    """Numbers of requests, in the order of the policy."""
    lengths: Sequence[tuple[int, int]]
    """(input tokens, number), ascending: all who wait. Only for SORTED_BY_LENGTH."""
    inputs: Callable[[int], int]
    """Input tokens of a request."""
    leases: Callable[[int], int]
    """New tokens that a request may make in this slice."""
    cost: SliceCost
    slice_tokens: int
    size_limit: Callable[[int, int], int]
    """(longest input, iterations) -> most rows that fit each worker in question."""
    batch_size: int
    batches_max: int
    """How many can be placed now."""
    batches_wanted: int
    """With `spread_batches`: how many workers are idle. 0: no wish."""


Batching = Callable[[Waiting], Generator[int, None, Batches]]


def fixed(waiting: Waiting) -> Generator[int, None, Batches]:
    """The next `batch_size` requests, again and again. A batch that would not fit is cut short."""
    batches: Batches = []
    start = 0
    while start < len(waiting.order) and len(batches) < waiting.batches_max:
        candidates = waiting.order[start : start + waiting.batch_size]
        batch = _fitting(waiting, candidates[0], candidates[1:])
        batches.append(batch)
        start += len(batch)
        yield 3 * len(batch)
    return batches


def sorted_window(waiting: Waiting) -> Generator[int, None, Batches]:
    """For each place: the first request, with the `batch_size - 1` others whose inputs make the
    tightest window around it. Sorting alone would starve the long ones where not everybody is
    placed in a round. (Our reading of "batch requests in input-length order".)"""
    left = list(waiting.lengths)
    yield len(left) // 100
    taken: set[int] = set()
    batches: Batches = []
    for number in waiting.order:
        if len(batches) >= waiting.batches_max:
            break
        if number in taken:
            continue
        place = bisect_left(left, (waiting.inputs(number), number))
        if place == len(left) or left[place][1] != number:
            continue  # it left, or changed, since this began
        window = _tightest(left, place, waiting.batch_size)
        others = [other for _, other in left[window.start : window.stop] if other != number]
        batch = _fitting(waiting, number, others)
        batches.append(batch)
        taken.update(batch)
        kept = [entry for entry in left[window.start : window.stop] if entry[1] not in taken]
        left[window.start : window.stop] = kept
        yield 6 * len(batch)
    return batches


def dp(waiting: Waiting) -> Generator[int, None, Batches]:
    """SCLS's dynamic programme over requests sorted by input length, as reconstructed: the cut
    with the least sum of estimated serving times. Contiguous cuts are the best of all partitions,
    because swapping a batch's shorter members for longer ones never raises anything."""
    cost = waiting.cost.slice(waiting.slice_tokens)
    lengths = [length for length, _ in waiting.lengths]
    limit_of: dict[int, int] = {}
    for place, length in enumerate(lengths):
        if length not in limit_of:
            limit_of[length] = waiting.size_limit(length, waiting.slice_tokens)
        if place % CHUNK == CHUNK - 1:
            yield CHUNK
    cuts = yield from _cutting(lengths, [limit_of[length] for length in lengths], cost)
    cuts = yield from _spreading(cuts, lengths, cost, waiting.batches_wanted)
    return [[number for _, number in waiting.lengths[start:end]] for start, end in cuts]


BATCHINGS: dict[str, Batching] = {
    "fixed": fixed,
    "sorted": sorted_window,
    "dp": dp,
}
SORTED_BY_LENGTH = frozenset({"sorted", "dp"})
"""These want the pool by input length, too."""


def cheapest_cuts(lengths: Sequence[int], limits: Sequence[int], cost: Bilinear) -> Cuts:
    """Half-open ranges of the sorted `lengths` with the least sum of cost.at(N, longest).

    `limits[i]` is the most rows of a batch whose longest input is lengths[i]; it must not rise
    with i (below 1 counts as 1).
    """
    return run_through(_cutting(lengths, limits, cost))


def run_through(steps: Generator[int, None, T]) -> T:
    """What the steps return, all of them taken at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _cutting(
    lengths: Sequence[int], limits: Sequence[int], cost: Bilinear
) -> Generator[int, None, Cuts]:
    """The steps of `cheapest_cuts`.

    The recurrence is SCLS's, f(e) = min over s of f(s) + (e - s) x slope(e) + fixed(e), and costs
    O(n x rows) if every s is tried. But slope(e) never falls with e, so once a later start is as
    good as an earlier one it stays so, and so does a start that became too far away. Hence the
    starts worth trying form a queue, each with the first end from which it is the best, found by
    bisection: O(n log n), about 30 ms for 10,000 requests.
    """
    count = len(lengths)
    slopes = [cost.per_row_token * length + cost.per_row for length in lengths]
    earliest = [end - max(1, limits[end - 1]) for end in range(1, count + 1)]
    best = [0.0] * (count + 1)
    start_of = [0] * (count + 1)
    queue: deque[tuple[int, int]] = deque([(0, 1)])
    yield count // 2

    def better_from(start: int, later: int) -> int:
        """The first end at which `later` is as good a start as `start`, or `start` too far."""
        break_even = (best[later] - best[start]) / (later - start)
        by_cost = bisect_left(slopes, break_even) + 1
        by_limit = bisect_right(earliest, start) + 1
        return max(later + 1, min(by_cost, by_limit))

    for end in range(1, count + 1):
        while len(queue) > 1 and queue[1][1] <= end:
            queue.popleft()
        start = start_of[end] = queue[0][0]
        fixed = cost.per_token * lengths[end - 1] + cost.fixed
        best[end] = best[start] + (end - start) * slopes[end - 1] + fixed
        first = better_from(queue[-1][0], end)
        while first <= queue[-1][1]:
            queue.pop()
            first = better_from(queue[-1][0], end)
        if first <= count:
            queue.append((end, first))
        if end % CHUNK == 0:
            yield 4 * CHUNK
    return _cuts(start_of)


def _cuts(start_of: Sequence[int]) -> Cuts:
    """The ranges, first to last, from the best start of every end."""
    cuts: Cuts = []
    end = len(start_of) - 1
    while end > 0:
        cuts.append((start_of[end], end))
        end = start_of[end]
    return cuts[::-1]


def _spreading(
    cuts: Cuts, inputs: Sequence[int], cost: Bilinear, batches_wanted: int
) -> Generator[int, None, Cuts]:
    """Split the dearest batch where its parts are most alike, until there are enough."""

    def price(start: int, end: int) -> float:
        return cost.at(end - start, inputs[end - 1])

    heap = [(-price(start, end), start, end) for start, end in cuts if end - start > 1]
    heapify(heap)
    whole = [cut for cut in cuts if cut[1] - cut[0] == 1]
    yield len(cuts)
    while heap and len(heap) + len(whole) < batches_wanted:
        _, start, end = heappop(heap)
        # The left part's price rises with the cut, the right part's falls.
        left = bisect_left(
            range(start + 1, end), True, key=lambda c: price(start, c) >= price(c, end)
        )
        middle = min(start + 1 + left, end - 1)
        for part in ((start, middle), (middle, end)):
            if part[1] - part[0] > 1:
                heappush(heap, (-price(*part), *part))
            else:
                whole.append(part)
        yield 20
    return sorted(whole + [(start, end) for _, start, end in heap])


def _tightest(left: Sequence[tuple[int, int]], place: int, batch_size: int) -> range:
    """The window of `batch_size` places in `left` around `place` with the least padding."""
    size = min(batch_size, len(left))
    starts = range(max(0, place - size + 1), min(place, len(left) - size) + 1)
    best = min(starts, key=lambda start: left[start + size - 1][0] - left[start][0])
    return range(best, best + size)


def _fitting(waiting: Waiting, first: int, others: Sequence[int]) -> list[int]:
    """The first, and as many of the others as fit together with it."""
    batch = [first]
    longest, iterations = waiting.inputs(first), waiting.leases(first)
    for number in others:
        longest = max(longest, waiting.inputs(number))
        iterations = max(iterations, waiting.leases(number))
        if len(batch) + 1 > waiting.size_limit(longest, iterations):
            break
        batch.append(number)
    return batch
