"""`python -m sim.trials`: presets against each other in virtual time, in pieces if need be."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sim.options import constants as parsed_constants
from sim.parallel import RunFailed
from sim.trials import everywhere, four_workers, ladder
from sim.trials.cell import Cell
from sim.trials.kept import Kept, finish

KEPT = Path(__file__).parents[2] / "bench" / "results" / "trials.jsonl"
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, with samples of their own.")]
Jobs = Annotated[int, typer.Option(min=0, help="Runs at once; 0: one for each core.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin nothing new after so long; 0: ever.")]
KeptFile = Annotated[Path, typer.Option("--kept", help="JSON lines; finished runs are reused.")]
Again = Annotated[list[str] | None, typer.Option(help="Run this policy again. Repeatable.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the table.")]
app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console(width=160)


@app.callback()
def trials() -> None:
    """Presets against each other in virtual time; finished runs are kept and reused."""


def completed(
    cells: Sequence[Cell], kept_file: Path, again: Sequence[str], jobs: int, minutes: float
) -> tuple[Kept, int]:
    """Run what is missing; what is kept then, and how much is missing still."""
    kept_file.parent.mkdir(parents=True, exist_ok=True)
    kept = Kept(kept_file, again)
    try:
        return kept, finish(kept, cells, jobs=jobs, minutes=minutes, title="trials")
    except RunFailed as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error


def written(json_file: Path | None, body: dict[str, object], missing: int) -> None:
    """The table as a file, with the command that made it."""
    if missing:
        console.print(f"{missing} runs are missing; run the same command again")
    if json_file is not None:
        command = "python -m sim.trials " + " ".join(sys.argv[1:])
        text = json.dumps({"command": command, "missing": missing, **body}, indent=1)
        json_file.write_text(text + "\n")


@app.command("four-workers")
def four_workers_command(
    seeds: Seeds = 5,
    jobs: Jobs = 0,
    minutes: Minutes = 0,
    everybody: Annotated[bool, typer.Option("--all", help="More presets.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case. Repeatable.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE")] = None,
    kept_file: KeptFile = KEPT,
    again: Again = None,
    json_file: JsonFile = None,
) -> None:
    """13B on four A100: conversations, bursts, decode-heavy; exit code 1 if a limit is not held."""
    contenders = four_workers.CONTENDERS + (four_workers.MORE if everybody else ())
    changed = parsed_constants(changes or (), None)
    cells = [
        four_workers.cell_of(each, one, seed, changed)
        for seed in range(1, seeds + 1)
        for each in four_workers.CASES
        if not case or each.name in case
        for one in contenders
    ]
    kept, missing = completed(cells, kept_file, again or (), jobs, minutes)
    found = four_workers.rows(kept, seeds, contenders, changed)
    judged = four_workers.verdicts(found)
    console.print(four_workers.table(found))
    for verdict in judged:
        console.print(verdict.told(), highlight=False)
    written(json_file, four_workers.as_json(found, judged), missing)
    if not all(verdict.held for verdict in judged):
        raise typer.Exit(1)


@app.command("ladder")
def ladder_command(
    seeds: Seeds = 3,
    jobs: Jobs = 0,
    minutes: Minutes = 0,
    kept_file: KeptFile = KEPT,
    again: Again = None,
    json_file: JsonFile = None,
) -> None:
    """What each part of `tranche` is worth, taken out alone and put on one after the other."""
    kept, missing = completed(ladder.cells(seeds), kept_file, again or (), jobs, minutes)
    found = ladder.rows(kept, seeds)
    console.print(ladder.table(found))
    written(json_file, ladder.as_json(found), missing)


@app.command("everywhere")
def everywhere_command(
    seeds: Seeds = 1,
    requests: Annotated[int, typer.Option(min=100, help="Of each run.")] = 1_500,
    policy: Annotated[list[str] | None, typer.Option(help="Only these beside tranche.")] = None,
    jobs: Jobs = 0,
    minutes: Minutes = 0,
    kept_file: KeptFile = KEPT,
    again: Again = None,
    json_file: JsonFile = None,
) -> None:
    """Every preset on every open trace and length set; where `tranche` is best, and where not."""
    names = list(dict.fromkeys((everywhere.OURS, *(policy or everywhere.policies()))))
    cells = list(everywhere.cells(seeds, requests, names))
    kept, missing = completed(cells, kept_file, again or (), jobs, minutes)
    found = everywhere.places(kept, seeds, requests, names)
    console.print(everywhere.table(found))
    behind = everywhere.losses(found)
    console.print(f"behind in {len(behind)} of {len(found) * len(everywhere.FIGURES)} figures")
    written(json_file, everywhere.as_json(found), missing)


if __name__ == "__main__":
    app()
