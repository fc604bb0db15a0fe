"""Metrics: what each figure of a report means, in which unit, and which way is better.

One table for the terminal, the HTML report and the documents. A name is the path of the value in
the report's JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sim.report import Calibration, Report, Spread

Better = Literal["higher", "lower", ""]
SPREAD_PARTS = {"mean": "mean", "p50": "median", "p95": "95th percentile", "p99": "99th percentile"}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of a report. `better` is empty where neither more nor less is good in itself."""

    name: str
    label: str
    unit: str
    digits: int
    better: Better
    meaning: str

    def value(self, report: Report) -> float | None:
        """The figure in this report; None where the run could not know it."""
        field, _, part = self.name.partition(".")
        found = getattr(report, field)
        if part:
            found = getattr(found, part) if isinstance(found, Spread | Calibration) else None
        return None if found is None else float(found)

    def text(self, value: float | None) -> str:
        """The value for people, without its unit."""
        return "-" if value is None else f"{value:,.{self.digits}f}"


@dataclass(frozen=True, slots=True)
class Averaged:
    """The mean of one metric over seeds, and its extremes."""

    mean: float
    low: float
    high: float


def averaged(reports: Sequence[Report], metric: Metric) -> Averaged | None:
    """Over the reports that know the metric; None if none does."""
    known = [value for report in reports if (value := metric.value(report)) is not None]
    return Averaged(sum(known) / len(known), min(known), max(known)) if known else None


def metric_named(name: str) -> Metric:
    """The row of this name. Raises KeyError."""
    return _BY_NAME[name]


def _spread(name: str, label: str, meaning: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{name}.{part}", f"{label}, {words}", "s", 3, "lower", meaning if not at else "")
        for at, (part, words) in enumerate(SPREAD_PARTS.items())
    )


METRICS: tuple[Metric, ...] = (
    Metric("requests", "requests", "", 0, "", "Requests that were sent."),
    Metric("completed", "completed", "", 0, "higher", "Requests that got all their tokens."),
    Metric("rejected", "rejected", "", 0, "lower", "Refused at once, with a time to try again."),
    Metric("failed", "failed", "", 0, "lower", "Accepted, but ended by an error or a time limit."),
    Metric("duration_s", "duration", "s", 1, "lower", "From the first sending to the last token."),
    Metric(
        "throughput_rps",
        "throughput",
        "requests/s",
        2,
        "higher",
        "Completed requests divided by the duration, so the drain at the end counts.",
    ),
    Metric(
        "goodput_rps",
        "goodput",
        "requests/s",
        2,
        "higher",
        "Completed requests within every service-level objective, divided by the duration. "
        "Without an objective it equals the throughput.",
    ),
    Metric(
        "good_share",
        "share within objectives",
        "share",
        3,
        "higher",
        "Requests completed within every service-level objective, of all that were sent; refused "
        "and failed ones count as missed. Unlike goodput it does not depend on the drain.",
    ),
    Metric("output_tps", "output", "tokens/s", 0, "higher", "Output tokens over the duration."),
    Metric("prompt_tokens", "prompt tokens", "", 0, "", "Total of all requests."),
    Metric("output_tokens", "output tokens", "", 0, "", "Total that reached the clients."),
    *_spread(
        "ttft_s",
        "time to first token (TTFT)",
        "From sending to the first output token: how long one waits for the answer to begin.",
    ),
    *_spread(
        "tpot_s",
        "time per output token (TPOT)",
        "Mean time between tokens after the first, per request: how fast the answer is written.",
    ),
    *_spread(
        "max_tpot_s",
        "longest gap",
        "The longest time between two tokens of one request: how long an answer stands still.",
    ),
    *_spread("e2e_s", "end to end", "From sending to the last token."),
    Metric(
        "stall_p99_s",
        "stall, 99th percentile",
        "s",
        3,
        "lower",
        "99th percentile over requests of their longest gap.",
    ),
    Metric(
        "evictions",
        "evictions",
        "",
        0,
        "lower",
        "How often a running request lost its KV cache because memory ran out; its prompt and "
        "tokens are computed again later.",
    ),
    Metric(
        "evicted_requests", "evicted requests", "", 0, "lower", "Requests evicted at least once."
    ),
    Metric(
        "calibration.evicted_share",
        "evictions per finished request",
        "share",
        3,
        "lower",
        "As the scheduler counted. Admission by chance steers it to its target.",
    ),
    Metric(
        "calibration.finish_error",
        "error of predicted finishes, median",
        "share",
        3,
        "lower",
        "|predicted - actual| / actual, of the latest requests.",
    ),
    Metric(
        "kv_util_mean",
        "KV in use, mean",
        "share",
        3,
        "",
        "Share of the KV cache that held tokens, averaged over workers and time.",
    ),
    Metric(
        "kv_peak_max",
        "KV in use, peak",
        "share",
        3,
        "",
        "The largest share of any worker's KV cache at any time. It can never be above 1.",
    ),
    Metric(
        "batch_size_mean",
        "batch size, mean",
        "requests",
        1,
        "",
        "Requests that ran together in an iteration.",
    ),
    Metric(
        "slices_per_request",
        "slices per request",
        "",
        2,
        "lower",
        "How many leases or slices a request took until it ended.",
    ),
    Metric(
        "invalid_tokens",
        "invalid tokens",
        "",
        0,
        "lower",
        "Computed for requests of a closed batch that had already ended.",
    ),
    Metric(
        "pad_tokens",
        "pad tokens",
        "",
        0,
        "lower",
        "Computed to fill prompts of a closed batch up to its longest.",
    ),
    Metric(
        "early_return_ratio",
        "early returns",
        "share",
        3,
        "",
        "Share of closed batches that came back before their slice was used up.",
    ),
    Metric(
        "completion_time_std_s",
        "standard deviation of the workers' completion times",
        "s",
        2,
        "lower",
        "How far apart the workers finish their last work: imbalance.",
    ),
    Metric(
        "busy_time_std_s",
        "standard deviation of the workers' busy times",
        "s",
        2,
        "lower",
        "How unequally the work was divided.",
    ),
    Metric(
        "scheduler_cpu_s",
        "scheduler CPU",
        "s",
        2,
        "lower",
        "CPU time inside the scheduler's core, measured on the machine that ran this.",
    ),
    Metric("decisions", "decisions", "", 0, "lower", "Calls of the scheduler's core."),
)
_BY_NAME = {metric.name: metric for metric in METRICS}
