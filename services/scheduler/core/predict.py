"""Predictions from the books: how long would a request that came now wait for its first slice?"""

from services.scheduler.core.books import Books

NO_WORKER_WAIT_S = 10.0
"""Told while there is no worker: about how long one takes to start with a small model."""


def predicted_wait_s(books: Books) -> float:
    """Seconds until a request that is submitted now would begin: what the least loaded worker
    still has to do, and the pool's first slices shared among the workers. With leases: those who
    wait, at the rate at which requests lately ended."""
    usable = books.board.taking
    if not usable:
        return NO_WORKER_WAIT_S
    if books.leased:
        waiting, rate = len(books.requests.pool), books.pace.finishes.per_s(books.called_at or 0.0)
        return waiting / rate if waiting and rate > 0 else 0.0
    least_s = books.board.least_load_s()
    pooled = len(books.requests.pool)
    if pooled == 0:
        return least_s
    rows = max(1, round(books.rounds.batch_size_mean))
    oldest = next(iter(books.requests.pool.values()))
    lease = books.constants.slice_tokens
    per_request_s = books.costs.cost.slice_s(rows, oldest.input_tokens, lease) / rows
    return least_s + pooled * per_request_s / usable
