"""SCLS: what is run for the part, and what is kept of each run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from services.scheduler.core.presets import preset_named
from shared.memory import batch_size_limit, token_budget
from shared.profiles import load_profile
from sim.items import Workload
from sim.report import Record, Report
from sim.run import run as simulate
from sim.setup import Setup
from sim.workload import make_workload

PROFILE = "llama-2-13b-a100"
LENGTHS = Path(__file__).parents[2] / "bench" / "workloads" / "sharegpt_v3.csv"
CAP = 1024
"""Most input tokens, and most output tokens [M]."""
SLICE = 128
"""S [M]."""
WORKERS = 8
REQUESTS = 10_000
QUICK_REQUESTS = 48
OVERLOAD_RPS = 60.0
BUSY_RPS = 20.0
SEEDS = (1, 2, 3, 4, 5)
SWEEP_SEED = 1
LADDER = ("sls", "so", "pm", "ab", "lb", "scls")
SLICES = (16, 32, 64, 128, 256, 512, 1024)
FLEETS = (1, 2, 4, 8, 16)
RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 30.0)
RATE_POLICIES = ("sls", "scls", "ils", "vllm")
CAPS = (12, 16, 24, 32, 64, 128, 512)
BLOCK_FASTGEN = 128
PAGED = ("vllm", "sarathi", "past-future")
SHARES = (0.25, 0.5, 0.75, 1.0)
FLOORS = (1.0, 3.0, 6.0)
UNLIMITED_BATCHES = 1 << 20
"""Queues at the workers have no end here; the live mesh's limit of 48 batches would balance the
load-blind policies a little."""
Value = int | float | bool


@dataclass(frozen=True, slots=True)
class Task:
    """One simulated run: `study` is the table it is for, `x` its place there."""

    study: str
    policy: str
    x: float = 0.0
    seed: int = SWEEP_SEED
    requests: int = REQUESTS
    rate: float = OVERLOAD_RPS
    workers: int = WORKERS
    constants: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is kept of a run. Tokens are per request, times in seconds."""

    task: Task
    completed: int
    rps: float
    window_rps: float
    """Completions while requests still arrived, per second of that time."""
    mean_s: float
    p95_s: float
    ttft_s: float
    invalid: float
    pads: float
    slices: float
    batch: float
    early: float
    """Share of batches that returned early."""
    end_std_s: float
    busy_std_s: float
    evictions: int


def worst_case_batch(share: float) -> int:
    """The largest batch that memory allows whatever its requests will make: N x (L + G) within
    this share of a worker's KV tokens."""
    budget = token_budget(load_profile(PROFILE).kv_tokens, share)
    return batch_size_limit(budget, CAP, CAP)


def tasks(*, quick: bool) -> list[Task]:
    """All runs; `quick`: few requests, one seed, and only the ends of the sweeps."""
    whole = list(_tasks())
    if not quick:
        return whole
    return [_small(task) for task in whole if task.seed == SWEEP_SEED and _at_an_end(task)]


def _tasks() -> Iterator[Task]:
    for seed in SEEDS:
        for policy in LADDER:
            yield Task("ladder", policy, seed=seed)
    for size in (16, worst_case_batch(0.9), worst_case_batch(1.0)):
        whole = {"memory_share": 1.0} if size > worst_case_batch(0.9) else {}
        yield Task("batch", "sls", size, constants={"batch_size": size, **whole})
    yield Task("fetch", "sls", constants={"deal_ahead": False})
    for policy in LADDER:
        yield Task("busy", policy, rate=BUSY_RPS)
    for size in (16, worst_case_batch(0.9)):
        yield Task("busy", "sls", size, rate=BUSY_RPS, constants={"batch_size": size})
    for tokens in SLICES:
        for rate in (OVERLOAD_RPS, BUSY_RPS):
            yield _shorter("slice", "scls", tokens, rate, slice_tokens=tokens)
    for workers in FLEETS:
        yield Task("workers", "scls", workers, workers=workers)
    for rate in RATES:
        for policy in RATE_POLICIES:
            yield Task("rate", policy, rate, requests=2_000, rate=rate)
    for rate in (OVERLOAD_RPS, BUSY_RPS):
        for cap in CAPS:
            yield _shorter("cap", "ils", cap, rate, running_max=cap)
        for policy in (*PAGED, "scls"):
            yield _shorter("cap", policy, 0, rate)
    for share in SHARES:
        for floor in FLOORS:
            chosen: dict[str, Value] = {"interval_share": share, "interval_floor_s": floor}
            yield _shorter("interval", "scls", 0, OVERLOAD_RPS, **chosen)
    yield Task("spread", "scls", constants={"spread_batches": True})


def _shorter(study: str, policy: str, x: float, rate: float, **constants: Value) -> Task:
    """Half the requests: sweeps compare among themselves."""
    return Task(study, policy, x, requests=5_000, rate=rate, constants=constants)


def _at_an_end(task: Task) -> bool:
    kept = {"slice": (16, 128, 1024), "workers": (1, 8), "rate": (1.0, 20.0), "cap": (0, 12, 512)}
    return task.x in kept.get(task.study, (task.x,)) and task.study != "interval"


def _small(task: Task) -> Task:
    return replace(task, requests=QUICK_REQUESTS)


def setup_of(task: Task) -> Setup:
    """The set-up: equal lengths and arrivals for all policies with the same seed and rate."""
    closed = preset_named(task.policy).form == "closed"
    ours: dict[str, Value] = {"slice_tokens": SLICE, "batches_max": UNLIMITED_BATCHES}
    return Setup(
        policy=task.policy,
        workload=_workload(task.requests, task.rate, task.seed),
        profile=load_profile(PROFILE),
        workers=task.workers,
        constants={**(ours if closed else {}), **task.constants},
        seed=task.seed,
        max_tokens=CAP,
        block_tokens=BLOCK_FASTGEN if task.policy == "ils" else None,
        streamed=not closed,
    )


@lru_cache(maxsize=8)
def _workload(requests: int, rate: float, seed: int) -> Workload:
    """Rows of the table in random order; reading it takes as long as a short run."""
    return make_workload(
        LENGTHS,
        limit=requests,
        max_prompt_tokens=CAP,
        max_output_tokens=CAP,
        rate=rate,
        shuffle=True,
        seed=seed,
    )


def run(task: Task, progress: Callable[[int, int], None]) -> Figures:
    """Simulate it."""
    outcome = simulate(setup_of(task), progress=progress)
    return _figures(task, outcome.report, outcome.records)


def _figures(task: Task, report: Report, records: object) -> Figures:
    assert isinstance(records, list)
    count = max(1, report.requests)
    return Figures(
        task=task,
        completed=report.completed,
        rps=report.throughput_rps,
        window_rps=_within_arrivals(records),
        mean_s=report.e2e_s.mean or 0.0,
        p95_s=report.e2e_s.p95 or 0.0,
        ttft_s=report.ttft_s.mean or 0.0,
        invalid=(report.invalid_tokens or 0) / count,
        pads=(report.pad_tokens or 0) / count,
        slices=report.slices_per_request or 0.0,
        batch=report.batch_size_mean or 0.0,
        early=report.early_return_ratio or 0.0,
        end_std_s=report.completion_time_std_s or 0.0,
        busy_std_s=report.busy_time_std_s or 0.0,
        evictions=report.evictions or 0,
    )


def _within_arrivals(records: list[Record]) -> float:
    first, last = min(r.sent_s for r in records), max(r.sent_s for r in records)
    done = sum(r.last_token_s is not None and r.last_token_s <= last for r in records)
    return done / max(last - first, 1e-9)
