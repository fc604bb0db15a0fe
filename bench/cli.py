"""`tranche bench`: a workload against a live OpenAI-compatible server, ours or another's."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.load import Lengths, LoadOptions, find_model, run_load
from bench.scrape import ServerCounts, scrape, with_server_counts
from sim.html_report import Heading, NoPlotly, plotly_script, write_html
from sim.report import Record, Report, summarise
from sim.report_table import report_table
from sim.runs import Load, Run
from sim.slo import SloError, parse_slo
from sim.workload import Workload, WorkloadError, make_workload


def bench(
    url: Annotated[
        str, typer.Option(help="The server, such as http://127.0.0.1:8000, with or without /v1.")
    ],
    trace: Annotated[
        str,
        typer.Option(
            help="Trace or length table (.csv, .parquet), prompts (.jsonl), or a synthetic set "
            "such as dist-1 or uniform:32-256x64-128."
        ),
    ],
    model: Annotated[str, typer.Option(help="Default: the first model the server names.")] = "",
    chat: Annotated[bool, typer.Option(help="Ask /v1/chat/completions.")] = False,
    lengths: Annotated[
        Lengths,
        typer.Option(
            help="exact: as recorded, by max_tokens and ignore_eos (the server is told the "
            "length); natural: the model ends by itself."
        ),
    ] = "exact",
    max_tokens: Annotated[int, typer.Option(help="Limit with --lengths natural.")] = 256,
    temperature: float = 1.0,
    limit: Annotated[int | None, typer.Option(help="Most requests.")] = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals a second.")] = None,
    burst: Annotated[
        float | None,
        typer.Option(help="With --rate: gamma gaps with this coefficient of variation."),
    ] = None,
    rate_scale: Annotated[float | None, typer.Option(help="Speed-up of the trace.")] = None,
    clients: Annotated[int | None, typer.Option(help="Closed loop with so many clients.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds; then no more is sent.")] = None,
    slo: Annotated[str, typer.Option(help="Such as ttft=10,gap=1.5,tpot=0.2.")] = "",
    seed: int = 0,
    policy: Annotated[str, typer.Option(help="Name of this run in the report.")] = "",
    workers: Annotated[int | None, typer.Option(help="Workers behind the server.")] = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="Further /metrics of the mesh (scheduler, workers). Repeatable."),
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the report as a page with pictures.")
    ] = None,
) -> None:
    """Drive a live server with a workload and report what its clients saw."""
    console = Console()
    try:
        objectives = parse_slo(slo)
        workload = make_workload(
            trace,
            limit=limit,
            max_prompt_tokens=max_prompt_tokens,
            max_output_tokens=max_output_tokens,
            rate=rate,
            rate_scale=rate_scale,
            clients=clients,
            burst=burst,
            seed=seed,
        )
        load = load_of(workload, rate, rate_scale)
        if html_file is not None:
            plotly_script()  # Before the load, not after it.
        options = LoadOptions(
            url=base_of(url),
            model=model,
            endpoint="chat" if chat else "completions",
            lengths=lengths,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            duration_s=duration,
            api_key=api_key,
        )
        records, counts = asyncio.run(drive(workload, options, metrics_url or [], console))
    except (WorkloadError, SloError, NoPlotly) as error:
        raise typer.BadParameter(str(error)) from error
    except httpx.HTTPError as error:
        console.print(f"{url} does not answer as an OpenAI-compatible server: {error!r}")
        raise typer.Exit(1) from error
    notes = {"lengths": lengths, "seed": str(seed), "url": url}
    report = with_server_counts(
        summarise(
            records,
            policy=policy or url,
            workers=workers,
            slo=objectives,
            workload=workload.name,
            notes=notes,
        ),
        counts,
    )
    _publish(report, json_file, console)
    if html_file is not None:
        facts = (("server", url), ("workload", workload.name), ("lengths", lengths))
        run = Run(report, records, load, seed)
        write_html(html_file, [run], Heading(f"{report.policy}: what its clients saw", facts))
        console.print(f"page: {html_file}")


def load_of(workload: Workload, rate: float | None, rate_scale: float | None) -> Load:
    """How the requests came, for the report."""
    if workload.clients is not None:
        return Load("clients", float(workload.clients))
    offered = workload.offered_rps
    if rate is not None:
        return Load("rate", rate, offered)
    return Load("recorded" if rate_scale is None else "rate-scale", rate_scale or 1.0, offered)


def base_of(url: str) -> str:
    """The server without the /v1 that OpenAI's clients want in their base URL."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def drive(
    workload: Workload, options: LoadOptions, metrics_urls: list[str], console: Console
) -> tuple[list[Record], ServerCounts]:
    """Run the load with a progress bar; what the clients saw and what the server counted."""
    if not options.model:
        name = await find_model(options.url, options.api_key)
        options = replace(options, model=name)
    urls = [f"{options.url}/metrics", *metrics_urls]
    before = await scrape(urls)
    with _bar(console) as progress:
        task = progress.add_task("requests", total=len(workload.items), failed=0)
        failed = 0

        def ended(record: Record) -> None:
            nonlocal failed
            failed += record.outcome != "completed"
            progress.update(task, advance=1, failed=failed)

        records = await run_load(workload, options, ended)
    return records, (await scrape(urls)).since(before)


def _bar(console: Console) -> Progress:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed or refused"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _publish(report: Report, json_file: Path | None, console: Console) -> None:
    console.print(report_table([report]))
    for cause, count in sorted(report.errors.items(), key=lambda pair: -pair[1])[:5]:
        console.print(f"{count} x {cause}", markup=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        console.print(f"report: {json_file}")
