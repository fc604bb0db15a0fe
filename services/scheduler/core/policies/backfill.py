"""Backfill: how far behind a refused head others are tried in its stead."""

from collections.abc import Sequence

PREDICTED_DEEPER = 2
"""Times `backfill_max` where outputs were predicted. So many more to choose from are worth a
fifth of the evictions at equal steps where lengths are uniform (memory only, correlation 0.95),
and nothing where nobody knows who is short [T]."""


def deepest(backfill_max: int) -> int:
    """Requests that may be looked at at most, the head among them."""
    return 1 + PREDICTED_DEEPER * backfill_max


def looked_at(predicted: Sequence[int], backfill_max: int) -> int:
    """How many of the first to look at, of whom the tokens are given that were predicted (0: none
    were): beyond `backfill_max` behind the head only up to the last with a prediction."""
    count = min(len(predicted), deepest(backfill_max))
    while count > 1 + backfill_max and not predicted[count - 1]:
        count -= 1
    return count
