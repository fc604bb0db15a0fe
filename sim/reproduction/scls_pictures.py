"""SCLS: pictures of the ablation and of the sweeps."""

from collections.abc import Sequence

from sim.reproduction.scls_results import Results, end_std, rps
from sim.reproduction.scls_runs import BUSY_RPS, LADDER, OVERLOAD_RPS, RATE_POLICIES, Figures
from sim.reproduction.svg_chart import Line, bar_chart, line_chart


def pictures(results: Results) -> tuple[tuple[str, str], ...]:
    """(caption, SVG) pairs."""
    ladder = bar_chart(
        "Ablation: throughput, and spread of the workers' ends",
        "requests/s; s",
        [policy.upper() for policy in LADDER],
        (
            ("throughput, requests/s", [results.mean(policy, rps) for policy in LADDER]),
            ("STD of completion times, s", [results.mean(policy, end_std) for policy in LADDER]),
        ),
    )
    slices = line_chart(
        "SCLS over slice length",
        "slice length, tokens (log scale)",
        "throughput, requests/s",
        [
            _line(f"{rate:g} requests/s offered", results.series("slice", "scls", rate))
            for rate in (OVERLOAD_RPS, BUSY_RPS)
        ],
    )
    caps = line_chart(
        "ILS over its parallelism cap, 60 requests/s offered",
        "requests in parallel per worker (log scale)",
        "throughput, requests/s",
        _caps(results),
    )
    rates = line_chart(
        "Throughput against load",
        "offered, requests/s (log scale)",
        "throughput, requests/s",
        [_line(policy.upper(), results.series("rate", policy)) for policy in RATE_POLICIES],
    )
    return (
        ("Throughput and spread of completion times, mean over the seeds.", ladder),
        ("Short slices compute prefixes again and again; long ones make invalid tokens.", slices),
        ("SCLS is ahead of ILS only where the cap binds.", caps),
        ("2,000 requests; ILS with a cap of 12.", rates),
    )


def _line(name: str, runs: Sequence[Figures]) -> Line:
    return Line(name, [(run.task.x, run.rps) for run in runs])


def _caps(results: Results) -> list[Line]:
    ils = results.series("cap", "ils", OVERLOAD_RPS)
    ends = (ils[0].task.x, ils[-1].task.x)
    flat = {
        "SCLS": results.at_rate("cap", "scls", 0, OVERLOAD_RPS).rps,
        "vLLM (256)": results.at_rate("cap", "vllm", 0, OVERLOAD_RPS).rps,
    }
    lines = [Line(name, [(x, value) for x in ends]) for name, value in flat.items()]
    return [_line("ILS", ils), *lines]
