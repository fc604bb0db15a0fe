"""SCLS: the tables."""

from collections.abc import Sequence
from statistics import fmean

from sim.reproduction.scls_fit import Errors
from sim.reproduction.scls_results import Results
from sim.reproduction.scls_runs import (
    BUSY_RPS,
    CAPS,
    LADDER,
    OVERLOAD_RPS,
    PAGED,
    RATE_POLICIES,
    Figures,
)
from sim.reproduction.section import Table

COLUMNS = (
    "requests/s",
    "in arrivals' time",
    "mean response, s",
    "95 %, s",
    "invalid tokens",
    "pad tokens",
    "slices",
    "batch",
    "early returns",
    "STD ends, s",
    "STD busy, s",
)
NOTE_RPS = {"sls": 3.40, "so": 6.75, "pm": 8.23, "ab": 14.79, "lb": 15.23, "scls": 17.07}
"""Of our note's own sanity simulation (made-up A100-like costs, lognormal lengths, 20/s)."""
NOTE_SLICES = {16: 6.9, 32: 11.0, 64: 15.1, 128: 17.1, 256: 17.7, 512: 14.1, 1024: 6.8}


def tables(results: Results) -> tuple[Table, ...]:
    """All of them."""
    return (
        _ladder(results),
        _busy(results),
        _baselines(results),
        _slices(results),
        _workers(results),
        _caps(results),
        _rates(results),
        _intervals(results),
        _fits(results),
    )


def _ladder(results: Results) -> Table:
    return Table(
        title="Ablation, 60 requests/s offered, mean over the seeds (tokens per request)",
        columns=("policy", *COLUMNS, "note's requests/s"),
        rows=tuple(
            (policy.upper(), *_cells(results.of("ladder", policy)), f"{NOTE_RPS[policy]:.2f}")
            for policy in LADDER
        ),
        note="The last column is our note's sanity simulation at 20/s; the paper's values are "
        "unavailable.",
    )


def _cells(runs: Sequence[Figures]) -> tuple[str, ...]:
    values = (
        ([run.rps for run in runs], ".2f"),
        ([run.window_rps for run in runs], ".2f"),
        ([run.mean_s for run in runs], ".1f"),
        ([run.p95_s for run in runs], ".1f"),
        ([run.invalid for run in runs], ".0f"),
        ([run.pads for run in runs], ".0f"),
        ([run.slices for run in runs], ".2f"),
        ([run.batch for run in runs], ".1f"),
        ([run.early for run in runs], ".1%"),
        ([run.end_std_s for run in runs], ".1f"),
        ([run.busy_std_s for run in runs], ".1f"),
    )
    return tuple(format(fmean(each), form) for each, form in values)


def _busy(results: Results) -> Table:
    rows = [(_name(run), *_cells([run])) for run in results.of("busy")]
    return Table(
        title="The same at 20 requests/s, one seed",
        columns=("policy", *COLUMNS),
        rows=tuple(rows),
    )


def _name(run: Figures) -> str:
    name = run.task.policy.upper()
    return f"{name}, batch of {run.task.x:g}" if run.task.x else name


def _baselines(results: Results) -> Table:
    sizes = sorted({run.task.x for run in results.of("batch")})
    named = [(f"SLS, batch of {x:g}", results.of("batch", "sls", x)) for x in sizes]
    named.append(("SLS, batch of 12, fetched by idle workers", results.of("fetch")))
    named.append(("SCLS, split until no worker is idle (ours)", results.of("spread")))
    return Table(
        title="Other settings, 60 requests/s offered, seed 1",
        columns=("policy", *COLUMNS),
        rows=tuple((name, *_cells(runs)) for name, runs in named),
        note="The largest batches are the worst case, N x (1024 + 1024), in 90 % and in all of a "
        "worker's KV tokens.",
    )


def _slices(results: Results) -> Table:
    rows = [
        (
            f"{run.task.x:g}",
            f"{run.task.rate:g}",
            *_cells([run]),
            f"{NOTE_SLICES[int(run.task.x)]:.1f}" if run.task.rate == BUSY_RPS else "",
        )
        for rate in (OVERLOAD_RPS, BUSY_RPS)
        for run in results.series("slice", "scls", rate)
    ]
    return Table(
        title="SCLS over slice length, 5,000 requests",
        columns=("slice", "offered/s", *COLUMNS, "note's requests/s"),
        rows=tuple(rows),
    )


def _workers(results: Results) -> Table:
    runs = results.series("workers", "scls")
    return Table(
        title="SCLS over workers, 60 requests/s offered",
        columns=("workers", *COLUMNS),
        rows=tuple((f"{run.task.workers}", *_cells([run])) for run in runs),
    )


def _caps(results: Results) -> Table:
    rows = []
    for rate in (OVERLOAD_RPS, BUSY_RPS):
        runs = [run for run in results.of("cap", "ils") if run.task.rate == rate]
        runs += [results.at_rate("cap", policy, 0, rate) for policy in (*PAGED, "scls")]
        rows += [_cap_row(run) for run in runs]
    return Table(
        title="SCLS against ILS over its cap, and against paged engines",
        columns=(
            "policy",
            "offered/s",
            "requests/s",
            "mean response, s",
            "95 %, s",
            "mean TTFT, s",
            "running or batch",
            "evictions",
        ),
        rows=tuple(rows),
        note=f"Caps tried: {', '.join(map(str, CAPS))} requests per worker. vllm runs at most 256, "
        "sarathi 128, past-future 256. 5,000 requests; replies of SCLS at ends of slices.",
    )


def _cap_row(run: Figures) -> tuple[str, ...]:
    name = f"ils, cap {run.task.x:g}" if run.task.policy == "ils" else run.task.policy
    values = (run.rps, run.mean_s, run.p95_s, run.ttft_s, run.batch)
    return (
        name,
        f"{run.task.rate:g}",
        *(f"{value:.2f}" for value in values[:1]),
        *(f"{value:.1f}" for value in values[1:]),
        str(run.evictions),
    )


def _rates(results: Results) -> Table:
    sweeps = {policy: results.series("rate", policy) for policy in RATE_POLICIES}
    rows = []
    for place, run in enumerate(sweeps["sls"]):
        each = [sweep[place] for sweep in sweeps.values()]
        cells = [f"{r.rps:.2f} / {r.mean_s:.1f} / {r.p95_s:.1f}" for r in each]
        rows.append((f"{run.task.rate:g}", *cells))
    return Table(
        title="Load: requests/s / mean response / 95 %, in seconds",
        columns=("offered/s", *RATE_POLICIES),
        rows=tuple(rows),
        note="2,000 requests; ils with a cap of 12.",
    )


def _intervals(results: Results) -> Table:
    rows = []
    for run in results.of("interval"):
        chosen = run.task.constants
        share, floor = chosen["interval_share"], chosen["interval_floor_s"]
        rows.append((f"{share:g}", f"{floor:g}", *_cells([run])))
    return Table(
        title="SCLS over its interval, max(share x least load, floor); 5,000 requests at 60/s",
        columns=("share", "floor, s", *COLUMNS),
        rows=tuple(rows),
    )


def _fits(results: Results) -> Table:
    rows = []
    for fit in results.fits:
        others = [e for e in (fit.online, fit.online_settled) if e is not None]
        rows += [(fit.task.kind, *_error_cells(errors)) for errors in (*fit.errors, *others)]
    return Table(
        title="Errors of the serving-time model on cells it has not seen",
        columns=("measured by", "of", "cells", "mean", "95 %", "worst", "RMSE, s"),
        rows=tuple(rows),
        note="A cell is a pair (batch size, longest input); five folds. Estimates at dispatch are "
        "those of the running fit; settled: without the first 32 batches, before which it "
        "knows nothing of the model.",
    )


def _error_cells(errors: Errors) -> tuple[str, ...]:
    shares = (errors.mean, errors.p95, errors.worst)
    return (
        errors.part,
        str(errors.cells),
        *(f"{share:.1%}" for share in shares),
        f"{errors.rmse_s:.3g}",
    )
