"""Backfill: how far behind a refused head others are tried, with predictions and without."""

from dataclasses import replace

import pytest

from services.scheduler.core.policies.backfill import looked_at
from shared import tokens
from shared.messages import RunSlice
from tests.core.seam import LIVE, Bench, submit

LARGE = tokens.pack(range(1500))
"""A prompt that fits into a worker once."""
SMALL = tokens.pack(range(5))


@pytest.mark.parametrize(
    ("predicted", "looked"),
    [
        ([0] * 9, 3),
        ([0, 0], 2),
        ([0, 0, 0, 7, 0, 0], 4),
        ([7] * 9, 5),
        ([0, 0, 0, 0, 0, 7], 3),  # too far behind for anybody
    ],
)
def test_predictions_are_looked_for_twice_as_far_behind(predicted: list[int], looked: int) -> None:
    assert looked_at(predicted, backfill_max=2) == looked


@pytest.mark.parametrize(("predicted", "placed"), [(5, ["small"]), (None, [])])
def test_a_small_one_far_behind_is_tried_if_it_is_known_to_be_small(
    predicted: int | None, placed: list[str]
) -> None:
    """Behind the head two are tried, and up to four of those with a prediction."""
    bench = Bench("past-future", replace(LIVE, backfill_max=2, bind_backlog_tokens=0))
    bench.join(capacity=2_500, forms=("leased",), context_tokens_max=4_000)
    bench.say(submit("runs", prompt=LARGE, max_tokens=400))
    for number in range(3):
        bench.say(submit(f"waits-{number}", prompt=LARGE, max_tokens=400))
    bench.after(0.1)
    said = bench.say(submit("small", prompt=SMALL, max_tokens=5, predicted_output_tokens=predicted))
    said += bench.after(0.1)
    orders = [order for run in said if isinstance(run, RunSlice) for order in run.orders]
    assert [order.spec.request_id for order in orders] == placed
    near = bench.core.books.requests.pool["waits-0"]
    assert near.overtaken == len(placed)
