"""`python -m bench.scheduler_cost`: seconds of CPU per call of the scheduler's core.

A core with many workers and a long queue lives through busy seconds: workers report leases or
batches, requests end and new ones come, beats come twice a second, and the clock's deadlines are
kept. Nothing is simulated but the messages; every call is timed alone. Before every round of
closed batches the pool is filled up, so that each has the whole queue before it. The figures are
the mean per call, the slowest calls, and how the mean grows with the length of the queue.

Garbage is collected by the rules of the scheduler's process (`services/scheduler/garbage.py`),
within the timed calls.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.scheduler_growth import growth_page
from bench.scheduler_mesh import EVENT_GAP_S, ROUND_S, BenchMesh
from bench.scheduler_requests import LOADS, USUAL, Load
from services.scheduler.core.policies.pacing import PACINGS
from services.scheduler.core.presets import PRESETS, preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from services.scheduler.garbage import spare_full_collections
from shared.messages import Elected, GatewayBeat

RESULTS = Path(__file__).parent / "results"
SLOW_S = 0.05
"""No single call may take longer."""
BATCHES_DEALT = 2
"""Given to a worker by policies that deal ahead: the pool is long only where their queues are
full, and full queues of the usual length would take half a million requests to fill."""
FORECAST_EVERY = 1_000
"""Reports between two words of the estimator: four times as often as in a real mesh."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy's calls cost; seconds of CPU of this process."""

    policy: str
    waiting: int
    workers: int
    calls: int
    mean_s: float
    p99_s: float
    slowest_s: float
    slowest: str = ""
    """What the slowest call was told; empty: the clock's deadline."""
    over_limit: int
    placed: int
    """Requests placed meanwhile: a core that does nothing is quick."""
    load: str = USUAL.name
    """What came; see `scheduler_requests`."""
    rounds: int = 0
    """Rounds of closed batches that began meanwhile."""
    waiting_least: int = 0
    """The shortest queue that a round found; of leased policies, that any report found."""
    round_s_max: float = 0.0
    """All calls of the longest round together."""


def measure(
    policy: str, waiting: int, workers: int, events: int, load: Load = USUAL, seed: int = 0
) -> Cost:
    """One policy's cost with this many waiting requests and workers, over so many reports."""
    waiting = int(load.waiting_share * waiting)
    mesh = _made(policy, waiting, workers, load, seed)
    names = [f"w{number}" for number in range(workers)]
    mesh.seconds.clear()
    mesh.slowest.clear()
    mesh.placed = mesh.rounds = 0
    mesh.round_s_max, mesh.waiting_least = 0.0, 1 << 62
    for number in range(events):
        if not mesh.timed or mesh.round_is_near():
            mesh.fill_up()
        if mesh.preset.form == "leased":
            mesh.waiting_least = min(mesh.waiting_least, len(mesh.core.books.requests.pool))
        mesh.report(names[number % workers])
        mesh.pass_time(EVENT_GAP_S)
        if number % 2 == 0:
            mesh.beat(names[(number // 2) % workers])
        if number % 1000 == 0:
            mesh.say(GatewayBeat(gateway="g"))
        if number % FORECAST_EVERY == 0:
            mesh.foretell()
    ordered = sorted(mesh.seconds)
    slowest_s, slowest = max((seconds, name) for name, seconds in mesh.slowest.items())
    return Cost(
        policy=policy,
        load=load.name,
        waiting=waiting,
        workers=workers,
        calls=len(ordered),
        mean_s=sum(ordered) / len(ordered),
        p99_s=ordered[int(len(ordered) * 0.99)],
        slowest_s=slowest_s,
        slowest=slowest,
        over_limit=sum(seconds > SLOW_S for seconds in ordered),
        placed=mesh.placed,
        rounds=mesh.rounds,
        waiting_least=mesh.waiting_least,
        round_s_max=mesh.round_s_max,
    )


def _made(policy: str, waiting: int, workers: int, load: Load, seed: int) -> BenchMesh:
    """A full mesh: every worker has work, and the queue is as long as asked."""
    preset = preset_named(policy)
    deals = preset.form == "closed" and PACINGS[preset.pacing].deals
    constants = preset.with_constants(
        batches_max=BATCHES_DEALT if deals else Constants().batches_max,
        waiting_max=1_000_000,
        interval_share=0.0,
        interval_floor_s=ROUND_S,
        interval_s=ROUND_S,
        worker_timeout_s=1e9,
        **dict(load.constants),
    )
    truth = (lambda request_id: 200) if preset.needs_truth else None
    mesh = BenchMesh(preset, Random(seed), Scheduler(preset, constants, truth), load)
    mesh.say(Elected(epoch=1))
    mesh.foretell()
    for number in range(workers):
        mesh.beat(f"w{number}")
    for _ in range(100 * workers + 2 * waiting):
        if len(mesh.core.books.requests.pool) >= waiting and mesh.placed:
            break
        mesh.submit()
        if not mesh.timed:
            mesh.pass_time(EVENT_GAP_S)
        elif mesh.sent >= waiting:
            mesh.pass_time(ROUND_S)
            break
    mesh.queue, mesh.open_least = waiting, load.open_each * workers
    mesh.fill_up()
    return mesh


def main(
    policy: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: every preset.")
    ] = None,
    waiting: Annotated[int, typer.Option(help="Requests that wait.")] = 10_000,
    workers: Annotated[int, typer.Option(help="Workers of the mesh.")] = 1_000,
    events: Annotated[int, typer.Option(help="Reports of workers.")] = 4_000,
    growth: Annotated[bool, typer.Option(help="Also with shorter queues, and a plot.")] = False,
    load: Annotated[
        list[str] | None, typer.Option(help="Repeatable: what requests ask for, or `all`.")
    ] = None,
    results: Path = RESULTS,
) -> None:
    """Time every call of the core; exit code 1 if a limit is missed."""
    spare_full_collections()
    console = Console()
    costs: list[Cost] = []
    runs = list(_runs(policy or list(PRESETS), waiting, growth=growth))
    loads = list(LOADS) if load and "all" in load else load or [USUAL.name]
    cases = [(*run, LOADS[one]) for run in runs for one in loads]
    for name, queue, one in track(cases, description="policies", console=console):
        costs.append(measure(name, queue, workers, events, one))
        cost = costs[-1]
        console.print(
            f"{name} {queue:,} {one.name}: {1e3 * cost.mean_s:.3f}, {1e3 * cost.slowest_s:.1f} ms"
        )
    console.print(_table(costs))
    results.mkdir(parents=True, exist_ok=True)
    which = "-".join(["scheduler-cost", *(policy or ())])
    file = results / f"{which}-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
    console.print(f"figures: {file}")
    if growth:
        plot = file.with_suffix(".html")
        plot.write_text(growth_page(costs))
        console.print(f"plot: {plot}")
    missed = [cost.policy for cost in costs if cost.over_limit or cost.mean_s > 1e-3]
    if missed:
        console.print(f"over 1 ms in the mean, or over 50 ms in a call: {', '.join(missed)}")
        raise typer.Exit(1)


def _runs(policies: Sequence[str], waiting: int, *, growth: bool) -> Iterator[tuple[str, int]]:
    """(policy, queue length) pairs."""
    for name in policies:
        yield name, waiting
        if growth:
            yield from ((name, waiting // part) for part in (2, 4, 8, 16))


def _table(costs: Sequence[Cost]) -> Table:
    table = Table(title="CPU of the scheduler's core per call, in milliseconds")
    for column in ("policy", "load"):
        table.add_column(column)
    for column in ("waiting", "workers", "calls", "mean", "p99", "slowest", "placed"):
        table.add_column(column, justify="right")
    for cost in costs:
        milliseconds = (cost.mean_s, cost.p99_s, cost.slowest_s)
        table.add_row(
            cost.policy,
            cost.load,
            f"{cost.waiting:,}",
            f"{cost.workers:,}",
            f"{cost.calls:,}",
            *(f"{1000 * value:.3f}" for value in milliseconds),
            f"{cost.placed:,}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
