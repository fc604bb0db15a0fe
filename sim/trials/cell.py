"""A cell: one preset on one workload at one load and seed, and the figures that come of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import msgspec

from services.scheduler.core.presets import preset_named
from shared.profiles import load_profile
from sim.reproduction.survey_load import CHUNK, PROFILE, fluid_bound
from sim.run import run
from sim.setup import Setup, Value
from sim.slo import Slo
from sim.trials.sets import SETS
from sim.workload import Workload, make_workload

SLO = Slo(ttft=2.0, tpot=0.15)
"""What counts as good, on every set: the survey note's limits."""
WORKERS = 4
EQUAL: Mapping[str, Value] = {"iteration_tokens": CHUNK}
"""The worker's loop is the same for every preset: only scheduling differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run. Lengths and arrivals of a seed are the same for every preset."""

    workload: str
    """A name of `sets`."""
    load: float
    """Share of the fluid bound of the workers on this sample."""
    policy: str
    constants: Mapping[str, Value] = field(default_factory=dict)
    requests: int = 3_000
    burst: float | None = None
    """Coefficient of variation of random gaps; None: the trace's own arrivals, or Poisson."""
    seed: int = 1
    ttft_ms: int | None = None
    """The limit to the first token that every request names; whoever would miss it is refused."""

    @property
    def key(self) -> str:
        """Its identity among kept results. A preset whose answers or constants have changed is
        another one; what the code makes of them is not seen here (`Kept(without=...)`)."""
        row = preset_named(self.policy)
        answers = (row.order, row.admission, row.batching, row.offloading, row.pacing, row.victim)
        constants = {**row.constants, **self.constants}
        told = (self.workload, self.load, self.policy, self.requests, self.burst, self.seed)
        limit = () if self.ttft_ms is None else (self.ttft_ms,)
        return repr((*told, *limit, *answers, row.binding, sorted(constants.items())))

    @property
    def label(self) -> str:
        """For the display."""
        return f"{self.policy} on {self.workload} at {self.load:g}, seed {self.seed}"


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; seconds. Latencies are those of completed requests."""

    completed: float
    """Share of all requests."""
    output_tps: float
    """Drained to the end."""
    good_share: float
    """Within SLO, of all requests."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    gap_p99_s: float
    """Of each request's longest time between two tokens."""
    evictions: float
    """Per request."""
    kv_mean: float
    """Share of memory in use, the drain included."""
    bound_rps: float
    """The fluid bound of all workers."""


def measure(cell: Cell, progress: Callable[[int, int], None]) -> Figures:
    """Simulate it."""
    workload, bound_rps = workload_of(
        cell.workload, cell.load, cell.requests, cell.burst, cell.seed
    )
    row = SETS[cell.workload]
    items = tuple(replace(item, ttft_deadline_ms=cell.ttft_ms) for item in workload.items)
    setup = Setup(
        policy=cell.policy,
        workload=replace(workload, items=items),
        profile=load_profile(PROFILE),
        workers=WORKERS,
        constants={**EQUAL, **cell.constants},
        seed=cell.seed,
        slo=SLO,
        max_tokens=row.max_tokens,
    )
    report = run(setup, progress=progress).report
    return Figures(
        completed=report.completed / report.requests,
        output_tps=report.output_tps,
        good_share=report.good_share or 0.0,
        ttft_mean_s=_known(report.ttft_s.mean),
        ttft_p50_s=_known(report.ttft_s.p50),
        ttft_p99_s=_known(report.ttft_s.p99),
        e2e_mean_s=_known(report.e2e_s.mean),
        gap_p99_s=_known(report.max_tpot_s.p99),
        evictions=(report.evictions or 0) / report.requests,
        kv_mean=report.kv_util_mean or 0.0,
        bound_rps=bound_rps,
    )


def _known(value: float | None) -> float:
    return float("inf") if value is None else value


@lru_cache(maxsize=2)
def workload_of(
    name: str, load: float, requests: int, burst: float | None, seed: int
) -> tuple[Workload, float]:
    """The requests at this share of the fluid bound, and that bound in requests/s."""
    row = SETS[name]
    sampled = make_workload(
        row.source,
        limit=requests,
        max_prompt_tokens=row.length_max,
        max_output_tokens=row.length_max,
        shuffle=row.shuffled,
        rate=1.0,
        seed=seed,
    )
    bound_rps = WORKERS * fluid_bound(sampled.items, load_profile(PROFILE)).rps
    recorded = row.recorded and burst is None
    plain = None if not recorded else make_workload(row.source, limit=requests, seed=seed)
    own = plain.offered_rps if plain is not None else None
    workload = make_workload(
        row.source,
        limit=requests,
        max_prompt_tokens=row.length_max,
        max_output_tokens=row.length_max,
        shuffle=row.shuffled and not recorded,
        rate=None if own else load * bound_rps,
        rate_scale=load * bound_rps / own if own else None,
        burst=burst if not own else None,
        seed=seed,
    )
    return workload, bound_rps
