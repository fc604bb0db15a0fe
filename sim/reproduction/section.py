"""A section of the reproduction: what a source says beside what we get, and whether they agree."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

Source = Literal["fact", "reconstruction", "ours", "unavailable"]
"""Where the value compared with comes from: read in a source; our reading of what a source leaves
open; a target of our own; known to exist and not to be had."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Cells are ready to print, numbers with their units in the column's name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One statement that the runs were to show."""

    claim: str
    source: Source
    wanted: str
    got: str
    holds: bool | None
    """None: reported only."""
    why: str = ""
    """Why it does not hold, or what is to be known about it."""


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the document."""

    name: str
    title: str
    text: str
    """Markdown: what was run, with which settings, and what is fact and what reconstruction."""
    tables: tuple[Table, ...] = ()
    checks: tuple[Check, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    """(caption, SVG text) pairs."""


class Part(Protocol):
    """A module of this package: what it runs, and what it makes of the results.

    Tasks and results are values that can be sent to a process and back.
    """

    NAME: str
    TITLE: str

    def tasks(self, *, quick: bool) -> Sequence[Any]:
        """Independent runs. `quick`: fewer seeds and shorter loads, to see that all works."""

    def run(self, task: Any, progress: Callable[[int, int], None], /) -> Any:
        """One task; called in any process."""

    def section(self, results: Sequence[Any]) -> Section:
        """The results, in the order of the tasks, as a section."""
