"""`python -m bench.peers.price`: what the mesh costs: its tokens per second over the bare engine's.

The worker is alone on one core; gateway, scheduler, estimator, RabbitMQ and the clients share the
other. Beside it, on the worker's core, the same engine called directly (`bench.peers.direct`). All
get the same seeded workload in turn, round by round; meshes with short and with unlimited leases
show what renewing costs. Only the one that is measured is not frozen.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.peers.cell import percentile
from bench.peers.clients import Trace, closed_loop
from bench.peers.direct import Measured, Run
from bench.peers.model import CACHE, model_folder
from bench.peers.ours import OursOptions, start_mesh
from bench.peers.processes import ONE_THREAD, Tree
from bench.peers.ratios import median_interval
from bench.peers.rounds import PROBE, two_cores
from bench.peers.systems import EXACT, HOST, PROBE_S, START_S, Server
from bench.peers.workload import asks

RESULTS = Path(__file__).parents[1] / "results"
DIRECT = "engine alone"
USUAL, SHORT, WHOLE = "mesh", "mesh, leases of 16", "mesh, unlimited leases"
MESHES = {
    USUAL: OursOptions(),
    SHORT: OursOptions(env={"TRANCHE_SCHEDULER_SLICE_TOKENS": "16"}),
    WHOLE: OursOptions(policy="past-future+pacing=whole"),
}
PAIRS = ((USUAL, DIRECT, 0.95), (SHORT, WHOLE, 0.97))
"""Ours, over what, and what is owed."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio over interleaved rounds."""

    ours: str
    over: str
    owed: float
    median: float
    low: float
    high: float
    pairs: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored: tokens per second by system, round by round."""

    begun: str
    clients: int
    seconds: float
    warm_up_s: float
    output_tps: dict[str, list[float]]
    prices: list[Price]


@dataclass(slots=True)
class Engine:
    """`bench.peers.direct` in a process of its own."""

    process: "subprocess.Popen[str]"

    def measure(self, run: Run) -> float:
        """Tokens per second."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(msgspec.json.encode(run).decode() + "\n")
        self.process.stdin.flush()
        return msgspec.json.decode(self.process.stdout.readline(), type=Measured).output_tps


def main(
    rounds: Annotated[int, typer.Option(help="7 give an interval of 98 %.")] = 7,
    seconds: Annotated[float, typer.Option(help="Counted time of each cell.")] = 15.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before it that do not count.")] = 5.0,
    clients: int = 32,
    seed: int = 1,
    core: Annotated[int | None, typer.Option(help="The worker's; default: the last.")] = None,
    cache: Annotated[Path, typer.Option(help="Where the model is kept.")] = CACHE,
    results: Path = RESULTS,
    logs: Path = Path(__file__).parents[2] / ".run" / "price",
) -> None:
    """Measure, print and store."""
    console = Console()
    worker_core, other_core = two_cores(core)
    os.sched_setaffinity(0, {other_core})
    model = model_folder(cache)
    begun = datetime.now(UTC)
    direct = _start_direct(model, worker_core)
    meshes: dict[str, Server] = {}
    found: dict[str, list[float]] = {name: [] for name in (DIRECT, *MESHES)}
    try:
        for name, options in MESHES.items():
            meshes[name] = _start(name, options, model, worker_core, other_core, logs)
            console.print(f"{name} is ready", highlight=False)
        with Progress(console=console) as progress:
            task = progress.add_task("", total=rounds * len(found))
            for number in range(1, rounds + 1):
                run = Run(seed * 1000 + number, clients, warm_up, seconds)
                order = list(found)
                Random(number).shuffle(order)
                for name in order:
                    progress.update(task, description=f"round {number}: {name}")
                    mesh = meshes.get(name)
                    value = direct.measure(run) if mesh is None else _measure(mesh, run)
                    found[name].append(value)
                    progress.update(task, advance=1)
                    console.print(f"{number:>2} {name:<24} {value:7.1f} tok/s", highlight=False)
    finally:
        direct.process.kill()
        for mesh in meshes.values():
            mesh.tree.stop()
    report = Report(
        begun=begun.isoformat(timespec="seconds"),
        clients=clients,
        seconds=seconds,
        warm_up_s=warm_up,
        output_tps=found,
        prices=[_price(found, *pair) for pair in PAIRS],
    )
    console.print(_table(report))
    path = results / f"mesh-price-{begun:%Y-%m-%d-%H%M}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    console.print(f"written: {path.name}")


def _start_direct(model: Path, core: int) -> Engine:
    command = [sys.executable, "-m", "bench.peers.direct", "--model", str(model)]
    process = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_THREAD,
    )
    _move(process.pid, core)
    assert process.stdout
    process.stdout.readline()
    _move(process.pid, core)
    return Engine(process)


def _start(
    name: str, options: OursOptions, model: Path, worker_core: int, other_core: int, logs: Path
) -> Server:
    """A mesh on the other core, its worker moved to a core of its own; frozen."""
    tree = Tree(other_core, logs / name.replace(" ", "-").replace(",", ""))
    try:
        port = start_mesh(tree, model, options)
        _move(tree.roots["worker"].pid, worker_core)
        server = Server(name, tree, port, model.name, EXACT)
        asyncio.run(server.probe(PROBE, START_S))
    except BaseException:
        tree.stop()
        raise
    tree.freeze()
    return server


def _move(pid: int, core: int) -> None:
    """All threads of a process to a core; threads that they start inherit it."""
    for thread in psutil.Process(pid).threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, {core})


def _measure(server: Server, run: Run) -> float:
    server.tree.thaw()
    try:
        return asyncio.run(_closed_loop(server, run))
    finally:
        server.tree.freeze()


async def _closed_loop(server: Server, run: Run) -> float:
    await server.probe(PROBE, PROBE_S)
    at: list[float] = []
    mark: Callable[[int], None] = lambda _: at.append(asyncio.get_running_loop().time())  # noqa: E731
    marks = (run.warm_up_s, run.warm_up_s + run.seconds)
    traces = await closed_loop(
        HOST, server.port, asks(run.seed), server.body, run.clients, marks, mark
    )
    await asyncio.sleep(1.0)  # cut requests are cancelled before the freeze
    begin, end = at
    failed = [trace.error for trace in traces if trace.error and trace.ended_s is not None]
    if failed:
        raise RuntimeError(f"{server.name}: {failed[0]}")
    return _tokens(traces, begin, end) / (end - begin)


def _tokens(traces: list[Trace], begin: float, end: float) -> int:
    return sum(n for trace in traces for at, n in trace.arrivals if begin <= at < end)


def _price(found: dict[str, list[float]], ours: str, over: str, owed: float) -> Price:
    ratios = [a / b for a, b in zip(found[ours], found[over], strict=True)]
    low, high, _ = median_interval(ratios)
    return Price(
        ours=ours,
        over=over,
        owed=owed,
        median=percentile(ratios, 0.5),
        low=low,
        high=high,
        pairs=len(ratios),
    )


def _table(report: Report) -> Table:
    table = Table(title=f"{report.clients} clients, output tokens/s over interleaved rounds")
    for name in ("", "over", "median", "interval", "pairs", "owed"):
        table.add_column(name)
    for price in report.prices:
        table.add_row(
            price.ours,
            price.over,
            f"{price.median:.3f}x",
            f"{price.low:.3f} to {price.high:.3f}",
            str(price.pairs),
            f"{price.owed:g}x",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
