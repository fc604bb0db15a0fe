"""One simulated run of the survey part: a policy at a load, and what came of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.profiles import load_profile
from sim.clients import Call
from sim.mesh import SimMesh
from sim.report import Record
from sim.reproduction.survey_load import (
    CAPS,
    CHUNK,
    PROFILE,
    RUNNING_MAX,
    bound_of,
    fluid_bound,
    workload_of,
)
from sim.setup import Setup, Value
from sim.slo import Slo

SLO = Slo(ttft=2.0, tpot=0.15)
"""The note's "good"."""
LIMITS: Mapping[str, Value] = {
    "iteration_tokens": CHUNK,
    "bind_backlog_tokens": 4 * CHUNK,
    "running_max": RUNNING_MAX,
}
"""Equal for all policies. The note's cap on un-prefilled tokens is 512 to 1024 of what is left of
them; ours counts whole prompts until their first token, so it is twice that."""
WARM = 0.3
"""Tokens per second count after this share of the arrivals."""
WARM_SATURATED = 0.5
"""Until the mix of short and long ones no longer changes."""
LONGEST = 0.95
"""Quantile of prompt lengths from which a request belongs to the longest ones."""


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    study: str = ""
    label: str = ""
    policy: str = "vllm"
    """A preset or a variant of one."""
    constants: Mapping[str, Value] = field(default_factory=dict)
    trace: str = "conv"
    load: float = 0.92
    """Share of the fluid bound."""
    workers: int = 4
    requests: int = 2_500
    seed: int = 1
    burst: float | None = None
    saturated: bool = False
    """Ends with the last arrival, as what is left is only a backlog."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What came out. Latencies are those of completed requests, in seconds."""

    task: Task
    bound_rps: float
    bound_tps: float
    """Of all workers together, on the same sample."""
    completed: int
    ttft_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_longest_s: float
    """p99 among the 5 % with the longest prompts."""
    tpot_p99_s: float
    stall_p99_s: float
    """Of each request's longest gap between tokens."""
    tps: float
    """Output tokens per second until the last arrival, after the warm-up."""
    good: float
    """Share of completed requests within TTFT 2 s and TPOT 150 ms."""
    evictions: float
    """Per request that got a first token."""
    recomputed: float
    """Tokens prefilled again, over those of the prompts."""


def setup_of(task: Task) -> Setup:
    """Equal lengths and arrivals for all policies of a seed and load."""
    return Setup(
        policy=task.policy,
        workload=workload_of(
            task.trace, task.requests, task.seed, task.load, task.workers, task.burst
        ),
        profile=load_profile(PROFILE),
        workers=task.workers,
        constants={**LIMITS, **task.constants},
        seed=task.seed,
        slo=SLO,
        max_tokens=CAPS[task.trace],
    )


def run(task: Task, progress: Callable[[int, int], None]) -> Figures:
    """Simulate it."""
    setup = setup_of(task)
    mesh = SimMesh(setup, progress=progress)
    mesh.start()
    last = setup.workload.items[-1].arrival_s or 0.0
    first = (WARM_SATURATED if task.saturated else WARM) * last
    mesh.world.run(first)
    before = _made(mesh)
    mesh.world.run(last)
    tps = (_made(mesh) - before) / (last - first)
    if not task.saturated:
        _run_out(mesh)
    return _figures(task, mesh, tps, first)


def _run_out(mesh: SimMesh) -> None:
    """Until all have ended."""
    while not mesh.clients.done:
        ended = mesh.clients.ended
        mesh.world.run(mesh.world.now + mesh.setup.stalled_s)
        assert mesh.clients.ended > ended, "nobody has ended for an hour"


def _made(mesh: SimMesh) -> int:
    """Output tokens that clients have."""
    return sum(call.output_tokens for call in mesh.clients.calls)


def _figures(task: Task, mesh: SimMesh, tps: float, counted_from: float) -> Figures:
    calls = mesh.clients.calls
    done = [call.record(0.0) for call in calls if call.outcome == "completed"]
    begun = [call for call in calls if call.first_at is not None]
    bound = bound_of(task.trace, task.requests, task.seed)
    if task.saturated:  # what waits behind is no part of it
        counted = [call.item for call in begun if (call.first_at or 0.0) > counted_from]
        bound = fluid_bound(counted, mesh.setup.profile)
    evictions = sum(worker.counts.evictions for worker in mesh.all_workers)
    ttft = np.array([record.ttft_s for record in done])
    p50, p99 = np.percentile(ttft, (50, 99))
    return Figures(
        task=task,
        bound_rps=task.workers * bound.rps,
        bound_tps=task.workers * bound.tps,
        completed=len(done),
        ttft_s=float(ttft.mean()),
        ttft_p50_s=float(p50),
        ttft_p99_s=float(p99),
        ttft_longest_s=_longest(done),
        tpot_p99_s=float(np.percentile([r.tpot_s for r in done], 99)),
        stall_p99_s=float(np.percentile([r.gap_max_s for r in done], 99)),
        tps=tps,
        good=sum(SLO.met(r.ttft_s, r.tpot_s, r.gap_max_s, r.e2e_s) for r in done) / len(done),
        evictions=evictions / max(1, len(begun)),
        recomputed=_recomputed(mesh, begun),
    )


def _longest(done: Sequence[Record]) -> float:
    least = np.quantile([record.prompt_tokens for record in done], LONGEST)
    return float(np.percentile([r.ttft_s for r in done if r.prompt_tokens >= least], 99))


def _recomputed(mesh: SimMesh, begun: Sequence[Call]) -> float:
    """Prefill beyond the prompts of those that have begun. A prompt that is being prefilled at the
    end of a saturated run counts as again; that is little."""
    prompts = sum(call.item.prompt_tokens for call in begun)
    computed = sum(worker.tally.prefill_tokens for worker in mesh.all_workers)
    return max(0.0, computed / max(1, prompts) - 1)
