"""The end of a run that is judged: its figures are kept, shown, and what failed is said last."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec
import typer
from rich.console import Console
from rich.table import Table


class Judged(Protocol):
    """A result that is written as JSON."""

    @property
    def failures(self) -> Sequence[str]:
        """What is not as it should be."""


def conclude(
    name: str, result: Judged, results: Path, console: Console, shown: Table, said: str
) -> None:
    """Raises typer.Exit(1) if anything failed."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{name}-{datetime.now(UTC):%Y-%m-%d-%H%M}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    console.print(shown)
    console.print(f"{said}; figures: {file}")
    for failure in result.failures:
        console.print(f"[red]{failure}[/red]")
    if result.failures:
        raise typer.Exit(1)
