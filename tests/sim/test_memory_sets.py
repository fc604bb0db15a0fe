"""The sets of memory-only runs, and that `chance` keeps its target on one of them."""

import pytest

from sim.memory_sets import MEMORY_SETS, memory_set
from sim.remembered import Remembered, measure, oracle, table


@pytest.mark.parametrize("name", MEMORY_SETS)
def test_a_seed_is_a_set(name: str) -> None:
    one, again, other = (memory_set(name, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.requests) == (1981 if name == "ShareGPT-o1" else 3000)
    assert all(prompt >= 0 and output > 0 for prompt, output in one.requests)
    assert max(map(sum, one.requests)) <= one.capacity_tokens


def test_predictions_belong_to_their_requests() -> None:
    chat = memory_set("ShareGPT", 0).first(500)
    assert chat.predicted is not None
    assert len(chat.predicted) == len(chat.requests) == 500
    off = [
        abs(told - output) for told, (_, output) in zip(chat.predicted, chat.requests, strict=True)
    ]
    assert sorted(off)[250] < 20
    assert memory_set("Dist-1", 0).predicted is None


def test_one_run_of_each_kind() -> None:
    steps = oracle("ShareGPT", 0, 300)
    runs = [
        measure("ShareGPT", 0, variant, 300, steps)
        for variant in ("past-future", "chance", "tranche, credits")
    ]
    assert all(0.9 < run.steps_over_oracle < 1.5 for run in runs)
    assert all(0 <= run.evictions_percent < 20 for run in runs)
    assert table(runs).row_count == 3
    assert isinstance(runs[0], Remembered)
