"""`python -m bench.swarm`: hundreds of pretended workers, thousands of streams, the real services.

A private RabbitMQ, gateways, a scheduler, an estimator and a few processes of pretended workers are
started; a load generator keeps so many streams open. The report says what every stage costs per
token, whether each stream got exactly its tokens, and how long the queues were. With `--step` the
number of streams is raised until it is not held any more.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console

from bench.swarm.load import DRAIN, Counts
from bench.swarm.mesh import Plan, SwarmMesh, counters, swarm_mesh
from bench.swarm.report import Level, level_of, level_table
from bench.swarm.watch import Sample, look

HERE = Path(__file__).parents[1]
DEMO_MODEL = HERE.parent / "deploy" / "demo_model"
LOGS = Path(".run/swarm")
SAMPLE_S = 5.0
SETTLE_SHARE = 0.9
"""A level is measured once all its streams are open and so many have their first token (those that
begin anew wait an iteration or two for it),"""
SETTLE_SLACK = 10
SETTLE_S = 120.0
"""or after so long."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    at: str
    machine: str
    settings: dict[str, Any]
    levels: list[Level]
    begun: int
    complete: int
    short: int
    wrong: int
    cut: int
    refused: dict[str, int]
    unfinished: int
    """Streams that were still open when the drain ended."""
    gateway_counters: dict[str, float]


class Driver:
    """The load generator's process, from outside."""

    def __init__(self, command: list[str], file: Path, log: Path) -> None:
        self._file = file
        with log.open("wb") as output:
            self.process = psutil.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )

    def say(self, word: str) -> None:
        """A number of streams, or DRAIN."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def counts(self) -> Counts:
        """The latest ones. Raises SystemExit if the process ended by itself."""
        while True:
            if self.process.poll():
                raise SystemExit("the load generator ended by itself; see its log")
            if self._file.exists():
                break
            time.sleep(0.2)
        return msgspec.json.decode(self._file.read_bytes(), type=Counts)


@contextmanager
def driver(
    mesh: SwarmMesh, model: Path, tokens: int, opens_per_s: float, logs: Path
) -> Iterator[Driver]:
    """Started, and gone at the end."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "bench.swarm.load", "--model", model.name]
        command += ["--tokens", str(tokens), "--opens-per-s", f"{opens_per_s:g}"]
        command += ["--file", str(file)]
        for url in mesh.urls:
            command += ["--url", url]
        one = Driver(command, file, logs / "load.log")
        mesh.stages["load"] = [one.process]
        try:
            yield one
        finally:
            if one.process.poll() is None:
                one.process.kill()
            one.process.wait()


def measure(mesh: SwarmMesh, load: Driver, streams: int, rate: float, seconds: float) -> Level:
    """Raise the load to so many streams, let it settle, and watch it."""
    load.say(str(streams))
    deadline = time.monotonic() + SETTLE_S
    while not _settled(load.counts(), streams) and time.monotonic() < deadline:
        time.sleep(1.0)
    samples: list[Sample] = []
    idle = psutil.cpu_times().idle
    began = time.monotonic()
    while True:
        samples.append(look(mesh, load.counts()))
        left = began + seconds - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(SAMPLE_S, max(0.1, left)))
    cores = psutil.cpu_count() or 1
    busy = 1 - (psutil.cpu_times().idle - idle) / (time.monotonic() - began) / cores
    return level_of(streams, rate, samples, busy)


def _settled(counts: Counts, streams: int) -> bool:
    all_open = counts.open + counts.waiting >= streams - SETTLE_SLACK
    return all_open and counts.open >= SETTLE_SHARE * streams


def drain(load: Driver, longest_s: float) -> int:
    """Let all streams end; how many did not."""
    load.say(DRAIN)
    try:
        load.process.wait(longest_s)
    except psutil.TimeoutExpired:
        counts = load.counts()
        return counts.open + counts.waiting
    return 0


def main(
    streams: Annotated[int, typer.Option(help="Streams that stay open (the first level).")] = 5000,
    seconds: Annotated[float, typer.Option(help="How long a level is measured.")] = 300.0,
    step: Annotated[int, typer.Option(help="Raise by this until not held; 0: one level.")] = 0,
    most: Annotated[int, typer.Option(help="With --step: no level above this.")] = 20_000,
    workers: Annotated[int, typer.Option(help="Pretended workers.")] = 500,
    processes: Annotated[int, typer.Option(help="Processes that pretend to be them.")] = 2,
    gateways: int = 1,
    rate: Annotated[float, typer.Option(help="Tokens per second and stream.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Mean length of a stream.")] = 200,
    slice_tokens: Annotated[int, typer.Option(help="Length of a lease.")] = 64,
    policy: str = "past-future",
    profile: str = "llama-2-13b-a100",
    opens_per_s: Annotated[float, typer.Option(help="New streams per second, at most.")] = 100.0,
    model: Path = DEMO_MODEL,
    logs: Path = LOGS,
    results: Path = HERE / "results",
) -> None:
    """Exit code 1 if no level was held, or anything was lost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    given = dict(locals())
    console = Console()
    settings = {k: v for k, v in given.items() if isinstance(v, str | int | float)}
    logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        workers=workers,
        processes=processes,
        gateways=gateways,
        policy=policy,
        slice_tokens=slice_tokens,
        profile=profile,
        rate=rate,
        streams_per_worker=streams / workers,
        model=model,
    )
    with swarm_mesh(plan, logs) as mesh:
        console.print(f"ready: {workers} workers in {processes} processes")
        with driver(mesh, model, tokens, opens_per_s, logs) as load:
            load.counts()
            levels = list(_levels(mesh, load, streams, step, most, rate, seconds, console))
            unfinished = drain(load, 2.0 * tokens / rate + 60)
            last, gateway_counters = load.counts(), counters(mesh.urls)
    _publish(settings, levels, last, unfinished, gateway_counters, results, console)


def _levels(
    mesh: SwarmMesh,
    load: Driver,
    streams: int,
    step: int,
    most: int,
    rate: float,
    seconds: float,
    console: Console,
) -> Iterator[Level]:
    while True:
        level = measure(mesh, load, streams, rate, seconds)
        console.print(level_table([level]))
        yield level
        streams += step
        if not step or not level.held or streams > most or not mesh.alive():
            return


def _publish(
    settings: dict[str, Any],
    levels: list[Level],
    last: Counts,
    unfinished: int,
    gateway_counters: dict[str, float],
    results: Path,
    console: Console,
) -> None:
    result = Result(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{psutil.cpu_count()} cores",
        settings=settings,
        levels=levels,
        begun=last.begun,
        complete=last.complete,
        short=last.short,
        wrong=last.wrong,
        cut=last.cut,
        refused=last.refused,
        unfinished=unfinished,
        gateway_counters=gateway_counters,
    )
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"swarm-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    console.print(
        f"streams begun {last.begun:,}, complete {last.complete:,}, short {last.short}, wrong "
        f"{last.wrong}, unfinished {unfinished}, refused {last.refused}; figures: {file}"
    )
    held = [level for level in levels if level.held]
    if held:
        best = max(held, key=lambda level: level.streams)
        console.print(f"held: {best.streams:,} streams; what binds: {levels[-1].binds}")
    if not held or last.short or last.wrong or unfinished:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
