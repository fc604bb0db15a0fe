"""Speed: how much CPU the simulator takes for a whole trace, and whether its journals replay.

The figures depend on the machine; each run measures the CPU time of its own process.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from services.scheduler.core.replay import replay
from shared.profiles import load_profile
from sim.reproduction.section import Check, Section, Table
from sim.run import Keep, run as simulate
from sim.setup import Setup
from sim.workload import make_workload

NAME = "speed"
TITLE = "Speed of the simulator"
TRACE = Path(__file__).parents[2] / "bench" / "workloads" / "azure2023_conv.csv"
PROFILE = "llama-2-13b-a100"
WORKERS = 8
NOISE_CV = 0.05
LIMIT_S = {1.0: 20.0, 3.2: 60.0}
"""CPU seconds that the whole trace may take at each speed-up of its arrivals."""
POLICIES = ("past-future", "vllm", "sarathi", "tgi", "sal+larry")
QUICK_REQUESTS = 300


class Task(msgspec.Struct, frozen=True):
    """One run of the trace."""

    policy: str
    scale: float
    limit: int | None
    journal: bool = False


class Result(msgspec.Struct, frozen=True):
    """What it took."""

    policy: str
    scale: float
    requests: int
    completed: int
    cpu_s: float
    core_s: float
    """Of these in the scheduler's core."""
    decisions: int
    simulated_s: float
    steps: int = 0
    """Of the journal."""
    same: bool | None = None
    """The journal's bytes gave the same commands again; None: not tried."""


def tasks(*, quick: bool) -> Sequence[Task]:
    """Every policy at every load, and one journal."""
    limit = QUICK_REQUESTS if quick else None
    made = [Task(policy, scale, limit) for policy in POLICIES for scale in LIMIT_S]
    return [*made, Task("past-future", 1.0, limit, journal=True)]


def run(task: Task, progress: Callable[[int, int], None], /) -> Result:
    """The trace through the simulator, timed by the CPU clock of this process."""
    workload = make_workload(TRACE, rate_scale=task.scale, limit=task.limit)
    setup = Setup(
        policy=task.policy,
        workload=workload,
        profile=load_profile(PROFILE),
        workers=WORKERS,
        noise_cv=NOISE_CV,
    )
    began = time.process_time()
    outcome = simulate(setup, progress=progress, keep=Keep(journal=task.journal))
    cpu_s = time.process_time() - began
    report = outcome.report
    steps, same = 0, None
    if task.journal:
        steps, difference = replay(outcome.transcript)
        same = difference is None
    return Result(
        policy=task.policy,
        scale=task.scale,
        requests=report.requests,
        completed=report.completed,
        cpu_s=cpu_s,
        core_s=report.scheduler_cpu_s or 0.0,
        decisions=report.decisions or 0,
        simulated_s=report.duration_s,
        steps=steps,
        same=same,
    )


def section(results: Sequence[Result]) -> Section:
    """A row per run; limits are for the whole trace."""
    timed = [result for result in results if result.same is None]
    checks = [_in_time(timed, scale, limit_s) for scale, limit_s in LIMIT_S.items()]
    checks += [_replayed(result) for result in results if result.same is not None]
    rows = tuple(
        (
            result.policy,
            f"{result.scale:g}",
            f"{result.completed:,} of {result.requests:,}",
            f"{result.cpu_s:.1f}",
            f"{result.core_s:.1f}",
            f"{result.decisions:,}",
            f"{result.simulated_s / result.cpu_s:,.0f}",
        )
        for result in timed
    )
    columns = (
        "policy",
        "arrivals sped up by",
        "completed",
        "CPU, s",
        "of these in the scheduler's core, s",
        "calls of the core",
        "simulated seconds per second of CPU",
    )
    return Section(
        name=NAME,
        title=TITLE,
        text=(
            f"The whole Azure 2023 conversation trace on {WORKERS} workers of {PROFILE} with "
            f"{NOISE_CV:.0%} noise in each iteration, one process on one core. The figures are of "
            "the machine that wrote this page: 2 cores without a GPU."
        ),
        tables=(Table(title="CPU of a whole trace", columns=columns, rows=rows),),
        checks=tuple(checks),
    )


def _in_time(results: Sequence[Result], scale: float, limit_s: float) -> Check:
    mine = [result for result in results if result.scale == scale]
    slowest = max(mine, key=lambda result: result.cpu_s)
    whole = all(result.completed == result.requests for result in mine)
    return Check(
        claim=f"The whole trace at {scale:g} times its rate, any of {len(mine)} leased presets",
        source="ours",
        wanted=f"under {limit_s:g} s of CPU",
        got=f"{slowest.cpu_s:.1f} s at most ({slowest.policy})",
        holds=whole and slowest.cpu_s < limit_s,
    )


def _replayed(result: Result) -> Check:
    return Check(
        claim=f"The journal of the whole trace replays byte for byte ({result.policy})",
        source="ours",
        wanted="every decision the same",
        got=f"{result.steps:,} steps, {'all the same' if result.same else 'a difference'}",
        holds=bool(result.same),
    )
