"""One real run beside its replay: figures, curves, and how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.profiles import CostProfile
from sim.items import WorkloadError
from sim.reproduction.real_run import Floats, RealRun
from sim.run import Keep, Outcome, run
from sim.series import Series
from sim.setup import Setup, Value

FIRST_REQUESTS = 40
IN_PROCESS_S = 1e-6
"""vLLM's scheduler sits in the process of its engine: no network between them."""
SAMPLE_S = 0.1
POLICY = "vllm"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of both. For curves `error` is the mean |difference| over the mean of the real
    one, else the difference over the real one."""

    name: str
    unit: str
    ours: float
    real: float
    error: float
    limit: float
    """The largest error that the acceptance allows, either way."""

    @property
    def holds(self) -> bool:
        return abs(self.error) <= self.limit


@dataclass(frozen=True, slots=True)
class Curves:
    """Samples at the same seconds of one run."""

    running: Floats
    waiting: Floats
    kv_share: Floats


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out."""

    figures: tuple[Figure, ...]
    evictions: int
    times_s: Floats
    ours: Curves
    real: Curves

    def figure(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)


def setup_of(
    real: RealRun,
    profile: CostProfile,
    *,
    kv_tokens: int | None = None,
    constants: dict[str, Value] | None = None,
    prefix_cache: bool | None = None,
    composed_ahead: bool | None = None,
    noise_cv: float = 0.0,
    seed: int = 0,
) -> Setup:
    """The preset with the engine's limits as recorded. What is given here overrides the record."""
    limits = real.limits
    ahead = limits.asynchronous if composed_ahead is None else composed_ahead
    pipe = limits.iteration_tokens * (2 if ahead else 1)
    own: dict[str, Value] = {
        "iteration_tokens": limits.iteration_tokens,
        "bind_backlog_tokens": pipe,
        "running_max": limits.running_max,
    }
    room = kv_tokens or limits.kv_tokens or profile.kv_tokens
    longest = int((real.prompt_tokens + real.output_tokens).max())
    if longest > room:
        raise WorkloadError(f"a request of {longest} tokens does not fit into {room} of KV")
    return Setup(
        policy=POLICY,
        workload=real.workload,
        profile=profile,
        workers=limits.engines,
        kv_tokens=room,
        block_tokens=limits.block_tokens,
        prefix_cache=limits.prefix_cache if prefix_cache is None else prefix_cache,
        composed_ahead=ahead,
        constants={**own, **(constants or {})},
        noise_cv=noise_cv,
        seed=seed,
        network_delay_s=IN_PROCESS_S,
    )


def replayed(real: RealRun, setup: Setup) -> Comparison:
    """Run it and compare."""
    outcome = run(setup, keep=Keep(series=True, sample_s=SAMPLE_S, spans=False))
    return compared(real, outcome)


def compared(real: RealRun, outcome: Outcome) -> Comparison:
    """Every request must have completed."""
    records, series = outcome.records, outcome.series
    assert series is not None
    if len(records) != len(real.arrival_s) or any(r.outcome != "completed" for r in records):
        raise WorkloadError("not every request of the run was completed in its replay")
    ttft, tpot, e2e = (
        np.array([getattr(record, name) for record in records])
        for name in ("ttft_s", "tpot_s", "e2e_s")
    )
    duration_s = max(record.last_token_s or 0.0 for record in records)
    tokens = float(real.output_tokens.sum())
    head = slice(FIRST_REQUESTS)
    figures: list[Figure | None] = [
        *_latency("TTFT", ttft, real.ttft_s),
        *_latency("TPOT", tpot, real.tpot_s),
        *_latency("end to end", e2e, real.e2e_s),
        _relative("throughput", "tokens/s", tokens / duration_s, tokens / real.duration_s, 0.04),
        _relative(
            f"TTFT of the first {FIRST_REQUESTS}, mean",
            "s",
            float(ttft[head].mean()),
            float(real.ttft_s[head].mean()),
            0.15,
        ),
    ]
    times_s, ours, theirs = _curves(real, series, duration_s)
    figures += [
        _curve("running", "requests", ours.running, theirs.running),
        _curve("waiting", "requests", ours.waiting, theirs.waiting),
        _curve("KV in use", "share", ours.kv_share, theirs.kv_share),
    ]
    return Comparison(
        figures=tuple(figure for figure in figures if figure is not None),
        evictions=outcome.report.evictions or 0,
        times_s=times_s,
        ours=ours,
        real=theirs,
    )


def _latency(name: str, ours: Floats, real: Floats) -> list[Figure]:
    late, late_real = (float(np.percentile(values, 99)) for values in (ours, real))
    return [
        _relative(f"{name}, mean", "s", float(ours.mean()), float(real.mean()), 0.05),
        _relative(f"{name}, p99", "s", late, late_real, 0.10),
    ]


def _relative(name: str, unit: str, ours: float, real: float, limit: float) -> Figure:
    return Figure(name, unit, ours, real, ours / real - 1, limit)


def _curve(name: str, unit: str, ours: Floats, real: Floats) -> Figure | None:
    """None if the real one was not recorded."""
    if not real.any():
        return None
    error = float(np.abs(ours - real).mean() / real.mean())
    return Figure(name, unit, float(ours.mean()), float(real.mean()), error, 0.10)


def _curves(real: RealRun, series: Series, duration_s: float) -> tuple[Floats, Curves, Curves]:
    """Both at every second of the log, and at as many more as our run lasts longer. vLLM counts a
    request as running from the iteration on that its first chunk is planned for: to us those are
    all that a worker has. What runs at the end of a second is as it was after an iteration."""
    times_s = real.sampled_s
    tick_s = float(np.median(np.diff(times_s)))
    beyond = np.arange(times_s[-1] + tick_s, duration_s, tick_s)
    longer = np.concatenate((times_s, beyond))
    at = np.clip(np.searchsorted(series.times_s, longer, side="right") - 1, 0, None)
    over = longer > series.times_s[-1]

    def seen(values: Floats) -> Floats:
        return np.where(over, 0.0, np.nan_to_num(values)[at])

    held = np.nansum(series.running + series.waiting, axis=0)
    ours = Curves(
        running=seen(held),
        waiting=seen(series.waiting_centre),
        kv_share=seen(np.nansum(series.kv_used, axis=0) / series.kv_total.sum()),
    )
    none = np.zeros(len(beyond))
    theirs = Curves(
        running=np.concatenate((real.running, none)),
        waiting=np.concatenate((real.waiting, none)),
        kv_share=np.concatenate((real.kv_share, none)),
    )
    return longer, ours, theirs


def lines(comparison: Comparison) -> Sequence[tuple[str, ...]]:
    """Figures as rows of text: measure, ours, real, error, allowed, within."""
    return [
        (
            f"{figure.name}, {figure.unit}",
            f"{figure.ours:.4g}",
            f"{figure.real:.4g}",
            f"{100 * figure.error:{'.1f' if figure.name in CURVES else '+.1f'}} %",
            f"{100 * figure.limit:.0f} %",
            "yes" if figure.holds else "no",
        )
        for figure in comparison.figures
    ]


CURVES = ("running", "waiting", "KV in use")
