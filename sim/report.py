"""The report: what a run of a workload did, live or simulated, in the same words and units.

Field names are those others rely on (docs/benchmarks.md). A value that a run cannot know, such as
the pad tokens of a server that is not ours, is None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from sim.slo import Slo

Outcome = Literal["completed", "rejected", "failed"]


@dataclass(frozen=True, slots=True)
class Record:
    """One request as its client saw it; times in seconds from the start of the run."""

    sent_s: float
    outcome: Outcome
    first_token_s: float | None = None
    last_token_s: float | None = None
    gap_max_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    detail: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite if none came."""
        return float("inf") if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending to the last token; infinite if none came."""
        return float("inf") if self.last_token_s is None else self.last_token_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for one token."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


class Spread(msgspec.Struct, frozen=True):
    """Mean and percentiles, in seconds; None without a sample."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How true the scheduler's own predictions were, as its last leader counted."""

    outputs: int
    """Ended requests of whose output quantiles had been predicted."""
    coverage: dict[str, float]
    """By quantile: the share of outputs that were no longer; it should be the quantile."""
    pinball_tokens: dict[str, float]
    """By quantile: the mean pinball loss."""
    evicted_share: float
    """Evictions over finished requests,"""
    evicted_target: float | None = None
    """and what admission by chance wanted at the end; None with other admissions."""
    start_error: float | None = None
    """Median of |predicted - actual| / actual of the latest starts and finishes, 1,024 together."""
    finish_error: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts are totals; `decisions` counts calls of the scheduler's core."""

    policy: str
    workers: int | None
    requests: int
    completed: int
    rejected: int
    failed: int
    duration_s: float
    throughput_rps: float
    output_tps: float
    goodput_rps: float
    good_share: float | None = None
    """Completed within every objective, of all requests; None without objectives."""
    slo: dict[str, float]
    ttft_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    max_tpot_s: Spread
    prompt_tokens: int = 0
    output_tokens: int = 0
    evictions: int | None = None
    evicted_requests: int | None = None
    kv_util_mean: float | None = None
    kv_peak_max: float | None = None
    stall_p99_s: float | None = None
    invalid_tokens: int | None = None
    pad_tokens: int | None = None
    slices_per_request: float | None = None
    batch_size_mean: float | None = None
    early_return_ratio: float | None = None
    completion_time_std_s: float | None = None
    busy_time_std_s: float | None = None
    scheduler_cpu_s: float | None = None
    decisions: int | None = None
    calibration: Calibration | None = None
    workload: str = ""
    errors: dict[str, int] = {}
    notes: dict[str, str] = {}


def spread(values: Sequence[float]) -> Spread:
    """Mean, median, 95th and 99th percentile (linear interpolation)."""
    if not values:
        return Spread(None, None, None, None)
    data = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = (float(value) for value in np.percentile(data, (50, 95, 99)))
    return Spread(float(data.mean()), p50, p95, p99)


def summarise(
    records: Sequence[Record],
    *,
    policy: str,
    workers: int | None,
    slo: Slo,
    workload: str = "",
    notes: dict[str, str] | None = None,
) -> Report:
    """The report of these records. Throughput counts from the first sending to the last token,
    so it includes the drain at the end; latencies are those of completed requests."""
    done = [record for record in records if record.outcome == "completed"]
    start = min((record.sent_s for record in records), default=0.0)
    end = max((r.last_token_s for r in done if r.last_token_s is not None), default=start)
    duration = max(end - start, 1e-9)
    good = sum(slo.met(r.ttft_s, r.tpot_s, r.gap_max_s, r.e2e_s) for r in done)
    errors: dict[str, int] = {}
    for record in records:
        if record.outcome != "completed":
            cause = record.detail or record.outcome
            errors[cause] = errors.get(cause, 0) + 1
    gaps = [record.gap_max_s for record in done]
    return Report(
        policy=policy,
        workers=workers,
        workload=workload,
        requests=len(records),
        completed=len(done),
        rejected=sum(record.outcome == "rejected" for record in records),
        failed=sum(record.outcome == "failed" for record in records),
        duration_s=duration,
        throughput_rps=len(done) / duration,
        output_tps=sum(record.output_tokens for record in records) / duration,
        goodput_rps=good / duration,
        good_share=good / len(records) if records and slo.as_dict() else None,
        slo=slo.as_dict(),
        ttft_s=spread([record.ttft_s for record in done]),
        tpot_s=spread([record.tpot_s for record in done if record.output_tokens > 1]),
        e2e_s=spread([record.e2e_s for record in done]),
        max_tpot_s=spread(gaps),
        stall_p99_s=spread(gaps).p99,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
        errors=errors,
        notes=notes or {},
    )
