"""`tranche plan`: the fewest workers that meet the objectives for a workload."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from sim import options
from sim.parallel import RunFailed
from sim.plan import Plan, fewest_workers
from sim.run import NOTHING
from sim.runs import Load, Run
from sim.slo import Slo, SloError, parse_slo
from sim.tasks import Fixed, run_tasks, tasks_of
from sim.workload import Workload, WorkloadError

UNMET_EXIT_CODE = 3
REQUESTS_FEW = 1000
"""With fewer, ten requests more or less within the objectives are one per cent or more."""


def plan(
    trace: options.Trace,
    profile: options.Profile,
    slo: options.Slo,
    policy: options.Policies = None,
    target: Annotated[
        float, typer.Option(help="Share of all requests that must meet every objective.")
    ] = 0.99,
    workers_max: Annotated[int, typer.Option(min=1, help="Try no more than this.")] = 64,
    workers_min: Annotated[int, typer.Option(min=1, help="Try no fewer than this.")] = 1,
    limit: options.Limit = None,
    max_prompt_tokens: options.PromptCap = None,
    max_output_tokens: options.OutputCap = None,
    rate: options.OneRate = None,
    rate_scale: options.OneRateScale = None,
    clients: options.OneClients = None,
    burst: options.Burst = None,
    tenants: options.Tenants = None,
    shuffle: options.Shuffle = False,
    kv_tokens: options.KvTokens = None,
    max_tokens: options.MaxTokens = None,
    slice_tokens: options.SliceTokens = None,
    changes: options.Sets = None,
    seed: options.Seeds = None,
    jobs: options.Jobs = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan.")] = None,
) -> None:
    """Find the fewest workers with which so many requests meet the objectives.

    Exit code 3 if no number up to --workers-max is enough.
    """
    options.check_writable(json_file)
    if not 0 < target <= 1:
        raise typer.BadParameter("--target is a share: above 0, at most 1, such as 0.99")
    if workers_min > workers_max:
        raise typer.BadParameter("--workers-min is above --workers-max")
    console = Console()
    choice = options.WorkloadChoice(
        trace, limit, max_prompt_tokens, max_output_tokens, burst, tenants, shuffle
    )
    try:
        objectives = parse_slo(slo)
        if not objectives.as_dict():
            raise SloError("--slo is empty: give objectives such as ttft=10,tpot=0.2")
        fixed = Fixed(
            options.profile_of(profile),
            objectives,
            kv_tokens,
            max_tokens,
            options.constants(changes or (), slice_tokens),
        )
        load = the_load(options.loads(rate, rate_scale, clients))
        seeds = list(dict.fromkeys(seed or [0]))
        workload, offered = choice.made(load, seeds[0])
        plans = {}
        for name in options.policies(policy):

            def attained(workers: int, name: str = name) -> float:
                tasks = list(tasks_of([name], [load], seeds, choice, fixed, workers, NOTHING))
                runs = [done.run for done in run_tasks(tasks, jobs, f"{name}, {counted(workers)}")]
                share = attainment(runs, objectives)
                console.print(f"{name}: {counted(workers)}, {share:.2%} within the objectives")
                return share

            plans[name] = fewest_workers(
                attained, target, workers_max=workers_max, workers_min=workers_min
            )
    except (WorkloadError, SloError) as error:
        raise typer.BadParameter(str(error)) from error
    except RunFailed as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error
    console.print(f"Share within the objectives, {offered.label}; wanted: {target:.2%}")
    console.print(plan_table(plans))
    for sentence in sentences(plans, target, workers_max):
        console.print(sentence, markup=False, highlight=False)
    console.print(length_note(workload), highlight=False)
    if json_file is not None:
        json_file.write_bytes(_as_json(plans, objectives, target, offered))
        console.print(f"plan: {json_file}", soft_wrap=True)
    if any(each.workers is None for each in plans.values()):
        raise typer.Exit(UNMET_EXIT_CODE)


def the_load(loads: Sequence[Load]) -> Load:
    """The only one. Raises WorkloadError."""
    if len(loads) > 1:
        kind = loads[0].kind
        apart = " and ".join(f"--{kind} {load.value:g}" for load in loads)
        raise WorkloadError(
            f"a plan is for one load: call it once with each of {apart}, or plan for the heaviest"
        )
    return loads[0]


def attainment(runs: Sequence[Run], slo: Slo) -> float:
    """The share of all requests that were completed within every objective; refused and failed
    ones count as missed. The mean over the runs (seeds)."""
    shares = []
    for run in runs:
        good = sum(
            record.outcome == "completed"
            and slo.met(record.ttft_s, record.tpot_s, record.gap_max_s, record.e2e_s)
            for record in run.records
        )
        shares.append(good / max(len(run.records), 1))
    return sum(shares) / len(shares)


def length_note(workload: Workload) -> str:
    """What the answer rests on: the workload's length."""
    count = len(workload.items)
    note = (
        f"It rests on {count:,} requests, beginning with idle workers: queues and memory need time "
        "to fill, and the last requests run while the load drains. A longer trace may need more."
    )
    if count < REQUESTS_FEW:
        note += f" Warning: fewer than {REQUESTS_FEW:,} requests; raise --limit for a firm answer."
    return note


def plan_table(plans: dict[str, Plan]) -> Table:
    """Sizes that were tried, from small to large, and what share each policy attained."""
    table = Table()
    table.add_column("workers", justify="right")
    for name in plans:
        table.add_column(name, justify="right")
    for size in sorted({tried.workers for each in plans.values() for tried in each.tried}):
        cells = []
        for each in plans.values():
            found = {tried.workers: tried.attainment for tried in each.tried}.get(size)
            text = "-" if found is None else f"{found:.2%}"
            cells.append(f"[bold green]{text}[/]" if size == each.workers else text)
        table.add_row(str(size), *cells)
    return table


def sentences(plans: dict[str, Plan], target: float, workers_max: int) -> list[str]:
    """The answers, in words."""
    lines = []
    for name, each in plans.items():
        if each.workers is None:
            best = max(each.tried, key=lambda tried: tried.attainment)
            lines.append(
                f"{name}: no number of workers up to {workers_max} meets {target:.2%}; the best "
                f"was {best.attainment:.2%} with {best.workers}. More workers do not help a "
                "request that is too slow when it is alone: compare the objectives with a run at "
                "a low rate, or raise --workers-max."
            )
            continue
        shares = {tried.workers: tried.attainment for tried in each.tried}
        fewer = shares.get(each.workers - 1)
        below = f"; with {each.workers - 1} it is {fewer:.2%}" if fewer is not None else ""
        lines.append(f"{name}: {counted(each.workers)}, {shares[each.workers]:.2%}{below}")
    return lines


def counted(workers: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{workers} worker{'' if workers == 1 else 's'}"


def _as_json(plans: dict[str, Plan], slo: Slo, target: float, load: Load) -> bytes:
    body: list[dict[str, Any]] = [
        {
            "policy": name,
            "workers": each.workers,
            "target": target,
            "slo": slo.as_dict(),
            "load": load.label,
            "tried": [
                {"workers": tried.workers, "attainment": tried.attainment} for tried in each.tried
            ],
        }
        for name, each in plans.items()
    ]
    shown: Any = body[0] if len(body) == 1 else body
    return msgspec.json.format(msgspec.json.encode(shown), indent=2) + b"\n"
