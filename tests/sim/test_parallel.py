"""Runs in processes of their own: results in order, progress, failures."""

import os
from collections.abc import Callable

import pytest

from sim.parallel import RunFailed, run_all

Progress = Callable[[int, int], None]


def squared(task: int, progress: Progress) -> int:
    """A run that tells of a thousand steps."""
    for done in range(1001):
        progress(done, 1000)
    return task * task


def failing(task: int, progress: Progress) -> int:
    """One of the runs fails."""
    if task == 1:
        raise ValueError("run 1 went wrong")
    return task


def ended_from_outside(task: int, progress: Progress) -> int:
    """As the system does when memory is short."""
    os._exit(9)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_progress_reaches_the_end(processes: int) -> None:
    seen: dict[int, int] = {}

    def watch(number: int, done: int, total: int) -> None:
        assert total == 1000
        assert done >= seen.get(number, 0)
        seen[number] = done

    assert run_all(squared, [3, 1, 2], processes=processes, watch=watch) == [9, 1, 4]
    if processes == 1:
        assert seen == {0: 1000, 1: 1000, 2: 1000}


def test_what_a_run_raises_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="run 1 went wrong"):
        run_all(failing, [0, 1, 2], processes=1)


def test_a_process_ended_from_outside_is_told_with_advice() -> None:
    with pytest.raises(RunFailed, match="--jobs 1"):
        run_all(ended_from_outside, [0, 1], processes=2)
