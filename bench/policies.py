"""`python -m bench.policies`: the same load on the same mesh under several policies, in turn.

Every service is a process of its own, on a RabbitMQ that is already there (`--bus`). Requests have
prompts of recorded lengths and end as the model ends them, so no length is told to anybody. The
report says for each policy what its clients saw, and for each process what share of a core it used.
"""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console

from bench.cli import drive
from bench.load import LoadOptions
from bench.mesh import process_mesh
from bench.scrape import with_server_counts
from sim.report import Report, summarise
from sim.report_table import report_table
from sim.slo import Slo
from sim.workload import Workload, make_workload

HERE = Path(__file__).parent
DEMO_MODEL = HERE.parent / "deploy" / "demo_model"
BUSY = 0.85
"""A resource used to this share of its limit is what limits the run."""


def main(
    bus: Annotated[str, typer.Option(help="amqp://... of a RabbitMQ with nothing else on it.")],
    policy: Annotated[list[str], typer.Option(help="Repeatable, at least one.")],
    rate: Annotated[float, typer.Option(help="Requests per second offered.")] = 30.0,
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 60.0,
    workers: int = 3,
    max_prompt_tokens: int = 128,
    max_tokens: int = 512,
    trace: Path = HERE / "workloads" / "sharegpt_v3.csv",
    model: Path = DEMO_MODEL,
    seed: int = 0,
    results: Path = HERE / "results",
) -> None:
    """Run each policy on a fresh mesh and write the reports and the ratios to `results`."""
    console = Console()
    workload = make_workload(
        trace,
        limit=round(rate * duration * 1.5),
        max_prompt_tokens=max_prompt_tokens,
        rate=rate,
        seed=seed,
    )
    reports = []
    for name in policy:
        console.rule(name)
        with process_mesh(bus, model, name, workers) as mesh:
            options = LoadOptions(
                url=mesh.url,
                model=model.name,
                lengths="natural",
                max_tokens=max_tokens,
                seed=seed,
                duration_s=duration,
            )
            started = mesh.cpu_seconds()
            idle, began = psutil.cpu_times().idle, datetime.now(UTC)
            report = _run(workload, options, mesh.metrics_urls, name, workers, console)
            seconds = (datetime.now(UTC) - began).total_seconds()
            ended = mesh.cpu_seconds()
        shares = {key: (ended[key] - started[key]) / seconds for key in ended}
        machine = 1 - (psutil.cpu_times().idle - idle) / seconds / (psutil.cpu_count() or 1)
        notes = {f"cores used by {key}": f"{share:.2f}" for key, share in shares.items()}
        notes |= {"machine busy": f"{machine:.2f}", "limit": _limit(shares, machine)}
        notes |= {"offered_rps": f"{rate:g}", "lengths": "natural", "seed": str(seed)}
        reports.append(msgspec.structs.replace(report, notes=notes))
    _publish(reports, results, console)


def _run(
    workload: Workload,
    options: LoadOptions,
    metrics_urls: list[str],
    policy: str,
    workers: int,
    console: Console,
) -> Report:
    records, counts = asyncio.run(drive(workload, options, metrics_urls, console))
    report = summarise(records, policy=policy, workers=workers, slo=Slo(), workload=workload.name)
    return with_server_counts(report, counts)


def _limit(shares: dict[str, float], machine: float) -> str:
    """Which resource bound the run."""
    full = sorted(name for name, share in shares.items() if share > BUSY)
    if full:
        return f"one core each: {', '.join(full)}"
    return "all cores of the machine" if machine > BUSY else "none: the load was below saturation"


def _publish(reports: list[Report], results: Path, console: Console) -> None:
    console.print(report_table(reports))
    base = reports[0]
    for report in reports:
        ratio = report.throughput_rps / base.throughput_rps if base.throughput_rps else 0.0
        console.print(
            f"{report.policy}: {ratio:.2f}x the throughput of {base.policy}; "
            f"limit: {report.notes['limit']}"
        )
    names = "-".join(report.policy for report in reports)
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"policies-{names}-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=2) + b"\n")
    console.print(f"reports: {file}")


if __name__ == "__main__":
    typer.run(main)
