"""`tranche simulate`: policies x loads x seeds in virtual time, as a table, JSON and HTML."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from services.scheduler.core.presets import preset_named
from sim import options
from sim.comparison import comparison_table
from sim.html_report import Heading, NoPlotly, plotly_script, write_html
from sim.known_error import fit_error, known_error
from sim.parallel import RunFailed
from sim.report import Report
from sim.report_table import report_table
from sim.run import Keep
from sim.runs import Run, groups_of
from sim.setup import Setup
from sim.slo import SloError, parse_slo
from sim.tasks import Fixed, Task, run_tasks, tasks_of
from sim.workload import WorkloadError

NOTHING_DONE_EXIT_CODE = 1
CAUSES_SHOWN_MAX = 3
ADVICE = {
    "too_long": "raise --kv-tokens, lower --max-tokens, or cut requests with --max-prompt-tokens "
    "and --max-output-tokens",
    "queue_full": "offer less, add --workers, or raise the queue with --set waiting_max=N",
    "no_worker": "no worker could take them: another --policy, or more memory with --kv-tokens",
    "expired": "offer less, or add --workers",
}
"""What to change, by the reason of a refusal."""


def simulate(
    trace: options.Trace,
    profile: options.Profile,
    workers: Annotated[int, typer.Option(min=1, help="Each with the profile's GPUs.")],
    policy: options.Policies = None,
    limit: options.Limit = None,
    max_prompt_tokens: options.PromptCap = None,
    max_output_tokens: options.OutputCap = None,
    rate: options.Rates = None,
    rate_scale: options.RateScales = None,
    clients: options.Clients = None,
    burst: options.Burst = None,
    tenants: options.Tenants = None,
    shuffle: options.Shuffle = False,
    slo: options.Slo = "",
    kv_tokens: options.KvTokens = None,
    max_tokens: options.MaxTokens = None,
    slice_tokens: options.SliceTokens = None,
    changes: options.Sets = None,
    seed: options.Seeds = None,
    jobs: options.Jobs = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the reports; '-': to the output.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures, to open offline.")
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="Write the scheduler's journal, for tranche replay. One run only."),
    ] = None,
) -> None:
    """Run the scheduler's core against simulated workers and clients, in virtual time."""
    options.check_writable(None if _is_output(json_file) else json_file, html_file, journal)
    console = Console(stderr=_is_output(json_file))
    choice = options.WorkloadChoice(
        trace, limit, max_prompt_tokens, max_output_tokens, burst, tenants, shuffle
    )
    try:
        if html_file is not None:
            plotly_script()  # Before the runs, not after them.
        fixed = Fixed(
            options.profile_of(profile),
            parse_slo(slo),
            kv_tokens,
            max_tokens,
            options.constants(changes or (), slice_tokens),
        )
        tasks = list(
            tasks_of(
                options.policies(policy),
                options.loads(rate, rate_scale, clients),
                list(dict.fromkeys(seed or [0])),
                choice,
                fixed,
                workers,
                Keep(series=html_file is not None, journal=journal is not None),
            )
        )
        if journal is not None and len(tasks) > 1:
            raise WorkloadError("--journal records one run: give one policy, one load, one seed")
        if journal is not None and preset_named(tasks[0].setup.policy).needs_truth:
            raise WorkloadError("--journal: this policy needs true lengths, which no journal holds")
        done = run_tasks(tasks, jobs)
    except (WorkloadError, SloError, NoPlotly) as error:
        raise typer.BadParameter(str(error)) from error
    except RunFailed as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error
    runs = [each.run for each in done]
    show(runs, console, tasks[0].setup)
    if json_file is not None:
        _write_json([run.report for run in runs], json_file, console)
    if html_file is not None:
        write_html(html_file, runs, heading_of(tasks, runs))
        console.print(f"page: {html_file}", soft_wrap=True)
    if journal is not None:
        journal.write_bytes(done[0].journal)
        console.print(f"journal: {journal}; try: tranche replay {journal}", soft_wrap=True)
    if not _any_completed(runs):
        raise typer.Exit(NOTHING_DONE_EXIT_CODE)


def show(runs: Sequence[Run], console: Console, setup: Setup) -> None:
    """One run with everything; several one below the other, as means over their seeds. `setup`:
    any of theirs."""
    first = runs[0].report
    if len(runs) == 1:
        console.print(report_table([first]))
    else:
        title = f"{first.workload}, {first.workers} x {setup.profile.name}"
        console.print(comparison_table(groups_of(runs), title, console.width))
    for line in losses(runs, setup):
        console.print(line, markup=False, highlight=False)
    if _any_completed(runs):
        for line in (known_error(), fit_error(setup.profile)):
            console.print(line, style="dim", highlight=False)


def losses(runs: Sequence[Run], setup: Setup) -> list[str]:
    """Why requests were not completed, by policy, and what to do about each reason."""
    causes: dict[str, Counter[str]] = {}
    for run in runs:
        causes.setdefault(run.policy, Counter()).update(run.report.errors)
    most = {policy: found.most_common(CAUSES_SHOWN_MAX) for policy, found in causes.items()}
    lines = [f"{policy}: {n} x {cause}" for policy, found in most.items() for cause, n in found]
    if not _any_completed(runs):
        lines.append("No request was completed.")
    longest = max(item.prompt_tokens for item in setup.workload.items) + setup.cap_tokens
    for cause in dict.fromkeys(cause for found in most.values() for cause, _ in found):
        told = (
            f" (the longest may need {longest:,} tokens, prompt and max_tokens; a worker has "
            f"{setup.kv_tokens_each:,})"
            if cause == "too_long"
            else ""
        )
        if cause in ADVICE:
            lines.append(f"{cause}{told}: {ADVICE[cause]}")
    return lines


def heading_of(tasks: Sequence[Task], runs: Sequence[Run]) -> Heading:
    """Of the HTML page: what was simulated, on what."""
    setup = tasks[0].setup
    profile = setup.profile
    limits = ", ".join(f"{name} {limit:g} s" for name, limit in setup.slo.as_dict().items())
    changed = ", ".join(f"{name}={value}" for name, value in setup.constants.items())
    facts = {
        "workload": f"{setup.workload.name}, {len(setup.workload.items):,} requests",
        "workers": f"{setup.workers} x {profile.name} ({setup.kv_tokens_each:,} KV tokens each)",
        "objectives": limits or "none",
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(t.setup.seed for t in tasks)),
        "constants": changed or "the policies' own",
        "made by": "tranche simulate: the scheduler's own core in virtual time; the workers and "
        "their times are simulated from the cost profile",
    }
    if _any_completed(runs):
        facts |= {"error": known_error(), "fit": fit_error(profile)}
    names = list(dict.fromkeys(task.setup.policy for task in tasks))
    title = f"{names[0]} in simulation" if len(names) == 1 else "Policies in simulation"
    return Heading(title, tuple(facts.items()))


def _any_completed(runs: Sequence[Run]) -> bool:
    return any(run.report.completed for run in runs)


def _is_output(path: Path | None) -> bool:
    return path is not None and str(path) == "-"


def _write_json(reports: Sequence[Report], path: Path, console: Console) -> None:
    """One report, or a list of several."""
    body = msgspec.json.encode(reports[0] if len(reports) == 1 else reports)
    text = msgspec.json.format(body, indent=2) + b"\n"
    if _is_output(path):
        typer.echo(text.decode(), nl=False)
        return
    path.write_bytes(text)
    console.print(f"report: {path}", soft_wrap=True)
