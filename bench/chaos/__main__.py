"""`python -m bench.chaos`: seeded storms of faults over a real mesh, judged from what clients got.

    make chaos SEEDS=3 SECONDS_EACH=60        # seeds 1, 2 and 3
    make chaos SEEDS=7-9                      # these seeds
    python -m bench.chaos --summary bench/results/chaos-*.json

Every seed has a mesh of its own (two gateways, two schedulers, three workers, an estimator, a
RabbitMQ), a load of streams, and a schedule of faults that follows from the seed alone. Exit
status 1 if a stream was lost, cut or different, a process ended by itself, or something was late.
"""

import asyncio
import os
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.console import Console

from bench.chaos.questions import MODEL
from bench.chaos.report import Run, lines_of, recovery_table, struck, total_table
from bench.chaos.run import Oracle, run_seed, save
from bench.chaos.schedule import schedule

LOGS = Path(".run/chaos")
RESULTS = Path(__file__).parents[1] / "results"
BESIDE_S = 1500.0
"""Longest time of a seed beside its storm: starts, references, settling, judging."""


def seeds_of(text: str) -> list[int]:
    """`5`: the seeds 1 to 5; `7-9`: 7, 8 and 9; `3,5`: these. Raises ValueError."""
    if text.isdigit():
        return list(range(1, int(text) + 1))
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ValueError("no seeds")
    return found


def main(
    seeds: Annotated[str, typer.Option(help="A number of seeds, or A-B, or A,B,C.")] = "1",
    seconds: Annotated[float, typer.Option(help="Length of each storm.")] = 180.0,
    results: Annotated[Path, typer.Option(help="Folder for the figures.")] = RESULTS,
    logs: Annotated[Path, typer.Option(help="Folder for logs and journals.")] = LOGS,
    show: Annotated[bool, typer.Option(help="Print the schedules only.")] = False,
    summary: Annotated[list[Path] | None, typer.Option(help="Figures of earlier runs.")] = None,
) -> None:
    """Exit code 1 if anything is wrong."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if summary:
        runs = [
            r for file in summary for r in msgspec.json.decode(file.read_bytes(), type=list[Run])
        ]
        _publish(runs, console)
        return
    wanted = seeds_of(seeds)
    if show:
        for seed in wanted:
            for fault in schedule(seed, seconds):
                console.print(f"seed {seed}  {fault.at_s:6.1f} s  #{fault.number} {fault.text()}")
        return
    at = f"{datetime.now(UTC):%Y-%m-%d-%H%M}"
    runs = []
    oracle = Oracle(MODEL)
    for seed in wanted:
        runs.append(_one(seed, seconds, logs, oracle, console))
        save(runs, results / f"chaos-{at}.json")
    console.print(f"figures: {results / f'chaos-{at}.json'}")
    _publish(runs, console)


def _one(seed: int, seconds: float, logs: Path, oracle: Oracle, console: Console) -> Run:
    folder = logs / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    faults = schedule(seed, seconds)
    console.print(f"seed {seed}: {len(faults)} faults in {seconds:g} s; logs: {folder}")
    began = time.monotonic()

    def tell(text: str) -> None:
        console.print(f"[{seed}] {time.monotonic() - began:6.1f} s  {text}", markup=False)

    async def bounded() -> Run:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with asyncio.timeout(seconds + BESIDE_S):
            return await run_seed(seed, seconds, folder, oracle, tell)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run = runner.run(bounded())
    console.print(
        f"seed {seed}: {struck(run)} faults, {sum(run.outcomes.values())} streams, "
        f"{len(run.findings)} findings, {len(run.late)} late"
    )
    for line in lines_of(run):
        console.print(line, markup=False)
    return run


def _publish(runs: list[Run], console: Console) -> None:
    console.print(recovery_table(runs))
    console.print(total_table(runs))
    for run in runs:
        for line in lines_of(run):
            console.print(line, markup=False)
    if any(run.findings or run.late for run in runs):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
