"""The search for the fewest workers."""

import pytest

from sim.plan import Tried, fewest_workers


@pytest.mark.parametrize(("least", "most"), [(1, 40), (1, 33), (3, 40), (7, 7)])
def test_it_finds_the_first_size_that_is_enough(least: int, most: int) -> None:
    for enough in range(1, 42):
        plan = fewest_workers(
            lambda workers, enough=enough: 1.0 if workers >= enough else 0.2,  # type: ignore[misc]
            0.99,
            workers_min=least,
            workers_max=most,
        )
        wanted = max(enough, least)
        assert plan.workers == (wanted if wanted <= most else None)
        sizes = [tried.workers for tried in plan.tried]
        assert len(sizes) == len(set(sizes)) <= 12
        assert all(least <= size <= most for size in sizes)


def test_without_an_answer_every_doubling_and_the_largest_size_were_tried() -> None:
    plan = fewest_workers(lambda workers: 0.5, 0.99, workers_max=12)
    assert plan.workers is None
    assert plan.tried == tuple(Tried(size, 0.5) for size in (1, 2, 4, 8, 12))


def test_where_more_is_not_always_better_the_answer_was_tried_and_one_less_failed() -> None:
    met = {1: 0.1, 2: 0.995, 3: 0.4, 4: 0.4, 5: 0.2, 6: 0.99, 7: 1.0, 8: 1.0}
    plan = fewest_workers(met.__getitem__, 0.99, workers_max=8, workers_min=3)
    tried = {each.workers: each.attainment for each in plan.tried}
    assert plan.workers == 6
    assert tried[6] >= 0.99 > tried[5]
