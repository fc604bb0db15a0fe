"""Parallel runs: many simulations in processes of their own, watched by one display."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task", contravariant=True)
Result = TypeVar("Result", covariant=True)
Watch = Callable[[int, int, int], None]
"""Called with (number of the task, done, total) while it runs."""
STEPS = 100
"""A task tells of its progress so often at most: each is a message between processes."""
POLL_S = 0.1


class RunFailed(Exception):
    """A run ended without a result; the message says which and why."""


class Simulate(Protocol[Task, Result]):
    """Runs one task; a function at the top of a module, so that a process can find it."""

    def __call__(self, task: Task, progress: Callable[[int, int], None], /) -> Result: ...


def run_all(
    simulate: Simulate[Task, Result],
    tasks: Sequence[Task],
    *,
    processes: int = 0,
    watch: Watch = lambda number, done, total: None,
) -> list[Result]:
    """The results in the order of the tasks. `processes` 0: as many as there are cores.

    One task, or one process, runs here. Raises RunFailed if a process was ended from outside, and
    whatever a task raises; the others are given up then.
    """
    count = min(processes or os.cpu_count() or 1, len(tasks))
    if count <= 1:
        return [simulate(task, _stepped(_local(watch, at))) for at, task in enumerate(tasks)]
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    pool = ProcessPoolExecutor(count, context, _adopt, (news,))
    try:
        futures = [pool.submit(_perform, simulate, at, task) for at, task in enumerate(tasks)]
        for waiting in _until_done(futures):
            for told in _drained(news):
                watch(*told)
            if any(future.exception() for future in futures if future not in waiting):
                break
        return [future.result() for future in futures if future.done()]
    except BrokenProcessPool as error:
        raise RunFailed(
            "a process was ended from outside, perhaps for lack of memory; "
            "try fewer at once with --jobs 1"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()


def _until_done(futures: Sequence[Future[Any]]) -> Iterator[set[Future[Any]]]:
    """Those that still run, again and again, until none does."""
    waiting = set(futures)
    while waiting:
        waiting = wait(waiting, POLL_S, FIRST_COMPLETED).not_done
        yield waiting


def _local(watch: Watch, at: int) -> Callable[[int, int], None]:
    return lambda done, total: watch(at, done, total)


def _stepped(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Passes on the last call, and others when a hundredth more is done."""
    told = -1

    def progress(done: int, total: int) -> None:
        nonlocal told
        step = STEPS * done // max(total, 1)
        if step != told:
            told = step
            tell(done, total)

    return progress


_news: Any = None


def _adopt(news: Any) -> None:
    """In the new process: where to tell of progress."""
    global _news
    _news = news


def _perform(simulate: Simulate[Task, Result], at: int, task: Task) -> Result:
    return simulate(task, _stepped(lambda done, total: _news.put((at, done, total))))


def _drained(news: Any) -> Iterable[tuple[int, int, int]]:
    while not news.empty():
        yield news.get()
