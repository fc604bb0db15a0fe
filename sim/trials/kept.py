"""Kept results: one line of JSON a cell, so that a long table can be made in pieces."""

import time
from collections.abc import Iterable, Sequence
from os import cpu_count
from pathlib import Path

import msgspec

from sim.parallel import run_all
from sim.progress import watched
from sim.trials.cell import Cell, Figures, measure

AT_ONCE = 4
"""Cells of each process between two savings, where there are several."""


class Line(msgspec.Struct, frozen=True):
    """One finished cell."""

    key: str
    policy: str
    figures: Figures


class Kept:
    """The file, and what is in it; a line that was cut off is left out."""

    def __init__(self, path: Path, without: Sequence[str] = ()) -> None:
        """`without`: policies of which nothing kept counts, since their rules have changed."""
        self._path = path
        self._found: dict[str, Figures] = {}
        if path.exists():
            for text in path.read_bytes().splitlines():
                try:
                    line = msgspec.json.decode(text, type=Line)
                except msgspec.DecodeError:
                    continue
                if line.policy not in without:
                    self._found[line.key] = line.figures

    def of(self, cell: Cell) -> Figures | None:
        """What came out, if it has been run."""
        return self._found.get(cell.key)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that have not, each once."""
        return list({c.key: c for c in cells if c.key not in self._found}.values())

    def add(self, cell: Cell, figures: Figures) -> None:
        """Save it."""
        self._found[cell.key] = figures
        with self._path.open("ab") as out:
            out.write(msgspec.json.encode(Line(cell.key, cell.policy, figures)) + b"\n")


def finish(kept: Kept, cells: Sequence[Cell], *, jobs: int, minutes: float, title: str) -> int:
    """Run what is missing, in order, and nothing new after so many minutes (0: no limit). Returns
    how many are still missing."""
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    todo = kept.missing(cells)
    size = AT_ONCE * (jobs or cpu_count() or 1) if jobs != 1 else 1
    while todo and time.monotonic() < until:
        now, todo = todo[:size], todo[size:]
        with watched([cell.label for cell in now], f"{title}, {len(todo)} behind these") as watch:
            for cell, figures in zip(
                now, run_all(measure, now, processes=jobs, watch=watch), strict=True
            ):
                kept.add(cell, figures)
    return len(todo)
