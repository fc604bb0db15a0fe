"""`python -m bench.peers`: ours and each installed peer on one model, one core, one workload.

Prints one table and writes JSON and markdown to `results`. How it is done, and what is fair about
it: docs/peers.md.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.peers.agreement import compare
from bench.peers.cell import Cell
from bench.peers.model import CACHE, model_folder
from bench.peers.ours import OursOptions
from bench.peers.processes import start_burner
from bench.peers.report import Comparison, SystemNote, tables, with_ratios, write
from bench.peers.rounds import Plan, Running, cells_of, two_cores
from bench.peers.systems import SYSTEMS, Place, System

ROOT = Path(__file__).parents[2]
TABLE_WIDTH = 180
"""Where the output goes to a file, which has no width of its own."""
CELL_OVERHEAD_S = 2.0
"""Waking, a first answer, and the rest of the cut requests; seen on quiet cores."""
DEFAULT_SYSTEMS = "tranche,vllm,llama,transformers"


def main(
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}.")] = DEFAULT_SYSTEMS,
    levels: Annotated[str, typer.Option(help="Clients of the closed loop.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="7 give an interval of 98 %.")] = 7,
    seconds: Annotated[float, typer.Option(help="Counted time of each cell.")] = 30.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before it that do not count.")] = 8.0,
    seed: int = 1,
    core: Annotated[int | None, typer.Option(help="The servers' core; default: the last.")] = None,
    background: Annotated[
        bool, typer.Option(help="Fill what the client leaves of its core, for all alike.")
    ] = False,
    engine: Annotated[str, typer.Option(help="Ours; default: the worker's.")] = "",
    policy: Annotated[str, typer.Option(help="Ours; default: the scheduler's.")] = "",
    worker_env: Annotated[
        list[str] | None,
        typer.Option(help="Ours: TRANCHE_WORKER_DTYPE=bfloat16 or another setting. Repeatable."),
    ] = None,
    label: Annotated[str, typer.Option(help="Part of the result's name.")] = "",
    peers: Annotated[Path, typer.Option(help="The folder of peers.sh.")] = ROOT / ".peers",
    cache: Annotated[Path, typer.Option(help="Where the model is kept.")] = CACHE,
    results: Path = ROOT / "bench" / "results",
    logs: Path = ROOT / ".run" / "peers",
) -> None:
    """Measure all systems at all levels, round by round."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left frozen
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    chosen = [SYSTEMS[name] for name in _known(systems)]
    server_core, client_core = two_cores(core)
    os.sched_setaffinity(0, {client_core})
    plan = Plan(
        levels=tuple(int(level) for level in levels.split(",")),
        rounds=rounds,
        seconds=seconds,
        warm_up_s=warm_up,
        seed=seed,
        client_core=client_core,
    )
    ours = OursOptions(engine, policy, dict(_pair(text) for text in worker_env or []))
    place = Place(model_folder(cache), peers.resolve(), logs.resolve(), server_core, ours)
    if client_core == server_core:
        console.print("[yellow]only one core: client and servers share it[/]")
    running = Running(place)
    missing: dict[str, str] = {}
    burner = start_burner(client_core) if background else None
    begun = datetime.now(UTC)
    cells: list[Cell] = []
    name = f"peers-{begun:%Y-%m-%d-%H%M}{'-' + label if label else ''}"

    def so_far() -> Comparison:
        return with_ratios(
            Comparison(
                begun=begun.isoformat(timespec="seconds"),
                commit=_commit(),
                machine=_machine(),
                plan=_shown(plan, ours, server_core, background),
                systems=[_note(system, running, missing) for system in chosen],
                cells=cells,
            )
        )

    try:
        for system in chosen:
            missing[system.name] = system.missing(place.peers)
            _start(system, running, missing[system.name], console)
        _agree(running, console)
        ready = [system for system in chosen if system.name in running.servers]
        total = rounds * len(plan.levels) * len(ready)
        minutes = total * (seconds + warm_up + CELL_OVERHEAD_S) / 60
        console.print(f"{total} cells, about {minutes:.0f} minutes", highlight=False)
        with _progress(console) as progress:
            task = progress.add_task("", total=total)
            for cell in cells_of(
                running, ready, plan, lambda text: progress.update(task, description=text)
            ):
                cells.append(cell)
                progress.update(task, advance=1)
                progress.console.print(_line(cell), highlight=False)
                write(so_far(), results, name)
    finally:
        if burner is not None:
            burner.kill()
        running.stop()
    _show(so_far(), running, results, name, console)


def _known(systems: str) -> list[str]:
    names = [name.strip() for name in systems.split(",") if name.strip()]
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(SYSTEMS)}")
    return names


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("TRANCHE_"):
        raise typer.BadParameter(f"--worker-env {text}: TRANCHE_<SERVICE>_<NAME>=VALUE is wanted")
    return name, value


def _start(system: System, running: Running, missing: str, console: Console) -> None:
    if missing:
        console.print(f"{system.name}: [yellow]{missing}[/]", highlight=False)
        return
    with console.status(f"{system.name} starts"):
        running.start(system)
    failed = running.failed.get(system.name)
    said = f"[red]did not start[/]: {failed}" if failed else "is ready"
    console.print(f"{system.name} {said} {running.notes.get(system.name, '')}", highlight=False)


def _agree(running: Running, console: Console) -> None:
    """All have to say the same; where not, the report says so."""
    for name, text in compare(running).items():
        running.notes[name] = "; ".join(part for part in (running.notes.get(name), text) if part)
        console.print(f"{name}: {text}", highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _line(cell: Cell) -> str:
    errors = f"  {cell.errors} errors: {cell.error}" if cell.errors else ""
    return (
        f"{cell.round:>2} {cell.clients:>3} {cell.system:<14} {cell.output_tps:7.1f} tok/s"
        f"  TTFT p50 {cell.ttft_p50:7.0f} ms  {cell.completed:>4} done"
        f"  foreign {cell.usage.foreign_cores:.2f}{errors}"
    )


def _note(system: System, running: Running, missing: dict[str, str]) -> SystemNote:
    why = missing.get(system.name) or running.failed.get(system.name, "")
    return SystemNote(
        name=system.name,
        title=system.title,
        version="" if missing.get(system.name) else system.version(running.place.peers),
        settings=system.settings,
        ours=system.ours,
        missing=why,
        note=running.notes.get(system.name, ""),
        restarts=running.restarts.get(system.name, 0),
    )


def _shown(plan: Plan, ours: OursOptions, core: int, background: bool) -> dict[str, str]:
    shown = {key: str(value) for key, value in msgspec.to_builtins(plan).items()}
    shown["levels"] = " ".join(str(level) for level in plan.levels)
    shown |= {"server_core": str(core), "background": "yes" if background else "no"}
    shown |= {"engine": ours.engine or "default", "policy": ours.policy or "default"}
    return shown | ({"env": " ".join(f"{k}={v}" for k, v in ours.env.items())} if ours.env else {})


def _machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    fields = {key.strip(): value for key, _, value in (line.partition(": ") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    return {
        "CPU": fields.get("model name", platform.processor()),
        "cores": str(os.cpu_count()),
        "flags": " ".join(flags),
        "kernel": platform.release(),
    }


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "?"
    command = [git, "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or "?"


def _show(
    comparison: Comparison, running: Running, results: Path, name: str, console: Console
) -> None:
    for system in comparison.systems:
        if system.missing:
            console.print(f"{system.name}: [yellow]{system.missing}[/]", highlight=False)
    if not comparison.cells:
        console.print("nothing was measured")
        raise typer.Exit(1)
    for table in tables(comparison):
        console.print(table)
    data, page = write(comparison, results, name)
    console.print(f"written: {data} and {page.name}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
