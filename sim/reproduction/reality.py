"""The simulator against reality: a recorded run of vLLM, replayed by preset `vllm`.

python -m sim.reproduction.reality                                    # the run that ships
python -m sim.reproduction.reality --run FILES... --profile NAME      # any other of its kind

FILES are a run's three files, or the beginning that their names share. The profile is a name of
deploy/costs or a file; nothing else is taken from the run than its arrivals, its lengths and its
engine's limits.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from shared.profiles import BadProfile, UnknownProfile, load_profile
from sim.items import WorkloadError
from sim.reproduction.real_run import RUNS, RealRun, load_run
from sim.reproduction.reality_chart import curves_svg
from sim.reproduction.reality_compare import CURVES, Comparison, lines, replayed, setup_of
from sim.reproduction.section import Check, Section, Table

NAME = "reality"
TITLE = "Reality: a recorded vLLM run, replayed"
RUN = RUNS / "rtx4090_llama-3.1-8b"
PROFILE = "llama-3.1-8b-rtx4090"
COLUMNS = ("measure", "ours", "real", "error", "allowed", "within")
SEEDS = (1, 2, 3, 4, 5)

TEXT = """
A real vLLM 0.19 (Llama-3.1-8B on one RTX 4090, {requests} ShareGPT requests; files, source and
licence in `sim/data/vllm_runs`) and the same requests under preset `vllm` on the cost profile
`{profile}`. Of the run itself only this goes in: arrivals, lengths (every output ends at its own
limit there), and what its record says of the engine: {limits}. The profile is of single kernels,
measured apart from this run. Any run of this shape can be replayed with
`python -m sim.reproduction.reality --run FILES... --profile NAME`.

What was modelled to get here is true of the engine in general: the **prefix cache** (freed blocks
stay findable until they are given away, the longest free first and of a request its end first:
who was preempted finds the rest of its beginning), **asynchronous scheduling** (the next iteration
is composed while one runs: who comes later sits one out, and two iterations' prefill is in the
pipe), and leases that end with a block. The table of steps says what each did.

The error of a curve is the mean over all seconds of |ours - real|, divided by the real mean; beyond
the end of the shorter run its curve is 0. Seconds are the log's, whose clock is set by its own
counts of prompts. Errors of other figures are (ours - real) / real. Noise of the iterations is off
but where a row says otherwise.

What remains: the profile adds up kernels of an eager run, and a decode step of 14 to 40 sequences
comes out 1 to 5 % longer than the log shows (tokens a second over running requests, in seconds
without prefill). The fit is within 1.3 % of the profile's table there, so most of this is the
table's; compiled kernels and CUDA graphs, which the real run had, are its likely cause. The
engine's first iteration took about 0.37 s longer than later ones of its size, which is not
modelled: it is most of the error of the first requests' TTFT (with arrivals held back for so long,
tried once, the first 40 are at +2.7 %; as it is, the 13th to 40th are at -2.5 %). What requests
share among each other is not in the files, so only a request's own blocks are found. When memory is
full, who is preempted hangs on single blocks: the rows with noise show how far figures move by
chance alone.
"""


@dataclass(frozen=True, slots=True)
class Task:
    """One replay, with what is changed for it."""

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    run: str = str(RUN)
    profile: str = PROFILE


MAIN = Task("as recorded: all of it")
STEPS = (
    Task("neither prefix cache nor asynchronous", {"prefix_cache": False, "composed_ahead": False}),
    Task("prefix cache only", {"composed_ahead": False}),
    Task("asynchronous only", {"prefix_cache": False}),
    Task("all, next block asked for 1 token before, not 4", {"constants": {"slice_tokens": 2}}),
)


def tasks(*, quick: bool) -> list[Task]:
    """The replay as recorded first, then its variants."""
    seeds = SEEDS[:1] if quick else SEEDS
    cv = load_profile(PROFILE).noise_cv
    noisy = [Task(f"all, noise {seed}", {"noise_cv": cv, "seed": seed}) for seed in seeds]
    return [MAIN, *STEPS, *noisy]


def run(task: Task, progress: Callable[[int, int], None]) -> Comparison:
    """One replay."""
    real = load_run([task.run])
    comparison = replayed(real, setup_of(real, load_profile(task.profile), **task.changes))
    progress(1, 1)
    return comparison


def section(results: Sequence[Comparison]) -> Section:
    """The first result decides; the others are its steps."""
    main = results[0]
    real = load_run([MAIN.run])
    labels = [task.label for task in (*STEPS, *tasks(quick=False)[1 + len(STEPS) :])]
    steps = [(MAIN.label, main), *zip(labels, results[1:], strict=False)]
    return Section(
        name=NAME,
        title=TITLE,
        text=TEXT.format(
            requests=len(real.arrival_s), profile=MAIN.profile, limits=_limits_text(real)
        ),
        checks=_checks(main),
        tables=(
            Table(title="Ours and the real run", columns=COLUMNS, rows=tuple(lines(main))),
            _steps_table(steps),
        ),
        pictures=(("Requests and KV in use: ours and the real run", _picture(real, main)),),
    )


def _checks(main: Comparison) -> tuple[Check, ...]:
    return tuple(
        Check(
            claim=figure.name if figure.name not in CURVES else f"curve: {figure.name}",
            source="fact",
            wanted=f"within {100 * figure.limit:.0f} % of {figure.real:.4g} {figure.unit}"
            if figure.name not in CURVES
            else f"mean |error| within {100 * figure.limit:.0f} %",
            got=f"{figure.ours:.4g} {figure.unit} ({error})"
            if figure.name not in CURVES
            else error,
            holds=figure.holds,
        )
        for figure, (_, _, _, error, *_) in zip(main.figures, lines(main), strict=True)
    )


def _steps_table(steps: Sequence[tuple[str, Comparison]]) -> Table:
    names = [figure.name for figure in steps[0][1].figures]
    rows = []
    for label, comparison in steps:
        errors = [line[3] for line in lines(comparison)]
        within = sum(figure.holds for figure in comparison.figures)
        rows.append((label, *errors, str(comparison.evictions), f"{within} of {len(names)}"))
    return Table(
        title="Steps of the model: errors of each, other things as recorded",
        columns=("replay", *names, "preemptions", "within"),
        rows=tuple(rows),
        note="The noise is the profile's own, of each iteration, with another seed each time.",
    )


def _limits_text(real: RealRun) -> str:
    limits = real.limits
    kv = f"{limits.kv_tokens:,}" if limits.kv_tokens else "the profile's"
    return (
        f"{limits.running_max} sequences, {limits.iteration_tokens} tokens an iteration, "
        f"{kv} KV tokens in blocks of {limits.block_tokens}, "
        f"prefix cache {'on' if limits.prefix_cache else 'off'}, "
        f"{'' if limits.asynchronous else 'no '}asynchronous scheduling"
    )


def _picture(real: RealRun, comparison: Comparison) -> str:
    return curves_svg(comparison, f"{real.name}: vLLM {real.version} and its replay")


def main(arguments: Sequence[str]) -> int:
    """Replay one run; the exit code is 1 if a figure is further off than allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m sim.reproduction.reality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", nargs="+", default=[str(RUN)], metavar="FILE")
    parser.add_argument("--profile", default=PROFILE, help="a name of deploy/costs, or a file")
    parser.add_argument("--kv-tokens", type=int, help="instead of what the run's record says")
    parser.add_argument("--svg", type=Path, help="write the curves there")
    options = parser.parse_args(arguments)
    try:
        real = load_run(options.run)
        setup = setup_of(real, load_profile(options.profile), kv_tokens=options.kv_tokens)
        comparison = replayed(real, setup)
    except (WorkloadError, UnknownProfile, BadProfile) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    _print(real, options.profile, comparison)
    if options.svg:
        options.svg.write_text(_picture(real, comparison), encoding="utf-8")
    return 0 if all(figure.holds for figure in comparison.figures) else 1


def _print(real: RealRun, profile: str, comparison: Comparison) -> None:
    console = Console()
    title = f"{real.name} ({real.model}, {real.gpu}, vLLM {real.version}) and its replay"
    table = RichTable(title=title)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if 0 < number < 5 else "left")
    for line in lines(comparison):
        table.add_row(*line)
    console.print(table)
    console.print(f"profile {profile}; {_limits_text(real)}; {comparison.evictions} preemptions")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
