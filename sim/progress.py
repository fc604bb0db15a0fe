"""Progress: one display for many runs at once, on the terminal's error stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sim.parallel import Watch


@contextmanager
def watched(labels: Sequence[str], title: str = "") -> Iterator[Watch]:
    """A bar over all runs, and one for each run that is under way; they vanish at the end.
    Nothing is shown where the error stream is no terminal."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        every = progress.add_task(title or f"{len(labels)} runs", total=float(len(labels)))
        shares = [0.0] * len(labels)
        bars: dict[int, TaskID] = {}

        def watch(number: int, done: int, total: int) -> None:
            shares[number] = done / total if total else 1.0
            progress.update(every, completed=sum(shares))
            if len(labels) == 1:
                return
            if number not in bars:
                bars[number] = progress.add_task(labels[number], total=1.0)
            ended = shares[number] >= 1
            progress.update(bars[number], completed=shares[number], visible=not ended)

        yield watch
