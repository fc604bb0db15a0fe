"""Foresight: the KV peak that the scheduler's own length history predicts for a worker, for
pictures. Only read, never told to anybody."""

import numpy as np

from services.scheduler.core.books import Books
from services.scheduler.core.policies.future import Future


def foreseen_tokens(books: Books, worker: str) -> float:
    """Tokens at the future peak (M*) of the requests placed on the worker, if each makes what is
    expected of it (the mean of the history, given what it has made). Not-a-number for closed
    batches, whose memory is taken at once, and for a worker that the scheduler does not know."""
    known = books.workers.active.get(worker)
    if known is None or books.preset.form != "leased":
        return float("nan")
    placed = list(known.credit.leases.values())
    made = np.array([request.output_tokens for request in placed], dtype=np.int64)
    cap = np.array([request.spec.max_tokens for request in placed], dtype=np.int64)
    prompt = np.array([request.prompt_tokens for request in placed], dtype=np.int64)
    left = np.ceil(books.lengths.expected_remaining_all(made, cap)).astype(np.int64)
    block = known.credit.block_tokens
    return float(Future(prompt + made, left[None, :], block).peak() * block)
