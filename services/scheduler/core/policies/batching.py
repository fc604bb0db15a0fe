"""Batching: who runs together? Each answer cuts an ordered list of requests into closed batches.

Requests are given as parallel lists, in the order that the preset's order policy made; a batch is
a list of indices into them. A batch of one is always allowed here, even if it fits no worker:
offloading decides that. What is in no batch stays in the pool.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from shared.costs import Bilinear, SliceCost

Batches = list[list[int]]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What batching may know."""

    inputs: Sequence[int]
    """Input tokens of each request."""
    leases: Sequence[int]
    """New tokens each may make in this slice."""
    numbers: Sequence[int]
    """Order of arrival, for `sorted`: the smallest is the oldest."""
    cost: SliceCost
    slice_tokens: int
    size_limit: Callable[[int, int], int]
    """(longest input, iterations) -> most rows that fit each worker in question."""
    batch_size: int
    batches_max: int
    """How many can be placed now."""
    batches_wanted: int
    """With `spread_batches`: how many workers are idle. 0: no wish."""


def fixed(waiting: Waiting) -> Batches:
    """The next `batch_size` requests, again and again. A batch that would not fit is cut short."""
    batches: Batches = []
    start = 0
    while start < len(waiting.inputs) and len(batches) < waiting.batches_max:
        batch = _fitting(
            waiting, range(start, min(start + waiting.batch_size, len(waiting.inputs)))
        )
        batches.append(batch)
        start += len(batch)
    return batches


def sorted_window(waiting: Waiting) -> Batches:
    """For each place: the oldest request, with the `batch_size - 1` others whose inputs make the
    tightest window around it. Sorting alone would starve the long ones where not everybody is
    placed in a round. (Our reading of "batch requests in input-length order".)"""
    left = sorted(range(len(waiting.inputs)), key=lambda i: (waiting.inputs[i], i))
    batches: Batches = []
    while left and len(batches) < waiting.batches_max:
        oldest = min(range(len(left)), key=lambda place: waiting.numbers[left[place]])
        window = _tightest(waiting, left, oldest)
        batch = _fitting(waiting, [left[place] for place in window], keep=left[oldest])
        batches.append(batch)
        taken = set(batch)
        left = [index for index in left if index not in taken]
    return batches


def dp(waiting: Waiting) -> Batches:
    """SCLS's dynamic programme over requests sorted by input length, as reconstructed: the cut
    with the least sum of estimated serving times. Contiguous cuts are the best of all partitions,
    because swapping a batch's shorter members for longer ones never raises anything."""
    cost = waiting.cost.slice(waiting.slice_tokens)
    limits = [waiting.size_limit(length, waiting.slice_tokens) for length in waiting.inputs]
    cuts = cheapest_cuts(waiting.inputs, limits, cost)
    cuts = _spread(cuts, waiting.inputs, cost, waiting.batches_wanted)
    return [list(range(start, end)) for start, end in cuts]


BATCHINGS: dict[str, Callable[[Waiting], Batches]] = {
    "fixed": fixed,
    "sorted": sorted_window,
    "dp": dp,
}


def cheapest_cuts(
    lengths: Sequence[int], limits: Sequence[int], cost: Bilinear
) -> list[tuple[int, int]]:
    """Half-open ranges of the sorted `lengths` with the least sum of cost.at(N, longest).

    `limits[i]` is the most rows of a batch whose longest input is lengths[i]; it must not rise
    with i (below 1 counts as 1).

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
    return _cuts(start_of)


def _cuts(start_of: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges, first to last, from the best start of every end."""
    cuts: list[tuple[int, int]] = []
    end = len(start_of) - 1
    while end > 0:
        cuts.append((start_of[end], end))
        end = start_of[end]
    return cuts[::-1]


def _spread(
    cuts: list[tuple[int, int]], inputs: Sequence[int], cost: Bilinear, batches_wanted: int
) -> list[tuple[int, int]]:
    """Split the dearest batch where its parts are most alike, until there are enough."""

    def price(start: int, end: int) -> float:
        return cost.at(end - start, inputs[end - 1])

    heap = [(-price(start, end), start, end) for start, end in cuts if end - start > 1]
    heapify(heap)
    whole = [cut for cut in cuts if cut[1] - cut[0] == 1]
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
    return sorted(whole + [(start, end) for _, start, end in heap])


def _tightest(waiting: Waiting, left: Sequence[int], place: int) -> range:
    """The window of `batch_size` places in `left` around `place` with the least padding."""
    size = min(waiting.batch_size, len(left))
    starts = range(max(0, place - size + 1), min(place, len(left) - size) + 1)

    def spread(start: int) -> int:
        return waiting.inputs[left[start + size - 1]] - waiting.inputs[left[start]]

    best = min(starts, key=spread)
    return range(best, best + size)


def _fitting(waiting: Waiting, candidates: Sequence[int], keep: int = -1) -> list[int]:
    """As many of the candidates as fit together, `keep` (or the first) always among them."""
    first = keep if keep >= 0 else candidates[0]
    batch = [first]
    for index in candidates:
        if index == first:
            continue
        longest = max(waiting.inputs[i] for i in (*batch, index))
        iterations = max(waiting.leases[i] for i in (*batch, index))
        if len(batch) + 1 > waiting.size_limit(longest, iterations):
            break
        batch.append(index)
    return batch
