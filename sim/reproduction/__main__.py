"""`python -m sim.reproduction`: run the parts and write docs/reproduction.md.

Each part's section is stored as JSON when it is done, and the document is made of all that are
stored: one part can be run anew by itself.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sim.parallel import run_all
from sim.reproduction.document import document
from sim.reproduction.section import Part, Section

PARTS = ("past_future", "scls", "goodput", "goodput_counts", "survey", "reality", "speed")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "reproduction"
PAGE = ROOT / "docs" / "reproduction.md"


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for; the exit code is 1 if a statement does not hold."""
    parser = argparse.ArgumentParser(prog="python -m sim.reproduction", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable")
    parser.add_argument("--quick", action="store_true", help="few seeds, short loads; not stored")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one per core")
    options = parser.parse_args(arguments)
    console = Console()
    failed = 0
    for name in options.only or PARTS:
        section = run_part(_part(name), quick=options.quick, jobs=options.jobs, console=console)
        failed += sum(check.holds is False for check in section.checks)
        for check in section.checks:
            mark = {True: "holds", False: "DOES NOT HOLD", None: "reported"}[check.holds]
            console.print(f"{mark}: {check.claim}: {check.got} (wanted {check.wanted})")
        if not options.quick:
            _store(section)
            PAGE.write_text(document(stored()), encoding="utf-8")
    return 1 if failed else 0


def run_part(part: Part, *, quick: bool, jobs: int, console: Console) -> Section:
    """One part with a progress bar."""
    tasks = part.tasks(quick=quick)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task(part.TITLE, total=len(tasks))
        shares = [0.0] * len(tasks)

        def watch(number: int, done: int, total: int) -> None:
            shares[number] = done / max(1, total)
            bar.update(line, completed=int(sum(shares)))

        results: list[Any] = run_all(part.run, tasks, processes=jobs, watch=watch)
        bar.update(line, completed=len(tasks))
    return part.section(results)


def stored() -> list[Section]:
    """All sections whose results are there, in the order of the document."""
    files = [RESULTS / f"{name}.json" for name in PARTS]
    return [msgspec.json.decode(f.read_bytes(), type=Section) for f in files if f.exists()]


def _store(section: Section) -> None:
    """As JSON; pictures go beside the document."""
    pictures = []
    for number, (caption, text) in enumerate(section.pictures, 1):
        name = f"reproduction-{section.name}-{number}.svg"
        (PAGE.parent / name).write_text(text, encoding="utf-8")
        pictures.append((caption, name))
    kept = msgspec.structs.replace(section, pictures=tuple(pictures))
    RESULTS.mkdir(parents=True, exist_ok=True)
    body = msgspec.json.format(msgspec.json.encode(kept), indent=2)
    (RESULTS / f"{section.name}.json").write_bytes(body + b"\n")


def _part(name: str) -> Part:
    part: Part = importlib.import_module(f"sim.reproduction.{name}")
    assert name == part.NAME
    return part


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
