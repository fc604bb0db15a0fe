"""What `tranche` is worth, in figures: the part of docs/policies.md that results are made into.

From the JSON files that `python -m sim.trials` and `sim.remembered` wrote into bench/results; what
has not been run is not told.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from services.scheduler.core.presets import PRESETS
from sim.remembered import LIMITS, Remembered, missed, summary
from sim.reproduction.svg_chart import bar_chart
from sim.trials.everywhere import WITHIN
from sim.trials.four_workers import CASES, Case

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FOUR_WORKERS, LADDER, EVERYWHERE, EVERYBODY = (
    RESULTS / f"trials-{name}.json"
    for name in ("four-workers", "ladder", "everywhere", "everybody")
)
FAIRNESS = RESULTS / "fairness-2026-11-28.json"
REMEMBERED = RESULTS / "remembered-2026-11-27.json"
FORETOLD = RESULTS / "foretold-2026-11-28.json"
RATIO_MOST = 5.0
PICTURE = "policies-ladder.svg"
SHOWN = ("conversations", "bursts", "decode-heavy")
HEAD = """## What `tranche` is worth

In simulation, with true lengths hidden: four A100 with a 13B model (`opt-13b-a100-swift`, 66,144 KV
tokens each), one scheduler, the same worker's loop for every preset; loads are shares of the fluid
bound. `python -m sim.trials` makes all of this again, in pieces if it is stopped; results are in
`bench/results/trials-*.json`.
"""

REMARK = """Sets of thousands of output tokens run short of memory from 0.92 on: there the target
share of evictions decides between first tokens and stalls, and `tranche` stays nearer to no stalls.
Who reserves the worst case of everybody (`tgi`, `trtllm-no-evict`, `conservative`) has none, and
on Dist-1 to 3 lets the others wait for 20 s to 15 min on average.
Azure code comes in bursts far above what the workers can do: whoever lets the large wait without
bound has the lower mean."""


def section() -> str:
    """All of it; empty if nothing has been run."""
    parts = (_four_workers(), _ladder(), _everywhere(), _tenants(), _remembered(), _predicted())
    there = [part for part in parts if part]
    return "\n".join((HEAD, *there)) if there else ""


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


TENANTS = """### Tenants

The order serves the tenant that was given least; a flood gets what the others leave; and no tenant
is ever ahead of another that waits by more than U = (two of the largest prompts + n leases) / its
weight, in tokens at the prices of `fair`, n being the most requests that it had running at one time
(`lead_prompts`; a lease for each place on each worker: the slices that are out). What both were
given since both wait differs by U of the one and U of the other at most. Whose tenant is further
ahead rests at the end of its slice, on its worker, with its KV, or is parked if who was given least
finds no memory. The proof is in `services/scheduler/core/leads.py`; `tests/core/test_leads.py`
checks the bound after each call of the core, and so does the run below. It holds while all that
wait are of one priority and on time; priorities and deadlines come first.

Ten tenants, one of which sends ten times as much (`python -m sim.fairness`): the others' p99 time
to first token with and without the flood, means over the seeds and the range of their ratios; and
the largest lead over its bound at any step. 1.10 is owed.
"""


def _tenants() -> str:
    result = _read(FAIRNESS)
    if result is None:
        return ""
    columns = ("load", "seeds", "p99 without, s", "p99 with, s", "ratio", "lead / U", "gap / 2 U")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in result:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        times = f"{row['alone_p99_s']:.2f} | {row['flooded_p99_s']:.2f}"
        shares = f"{row['lead']:.2f} | {row['gap']:.2f}"
        lines.append(f"| {row['load']:g} | {row['seeds']} | {times} | {ratio} | {shares} |")
    return TENANTS + "\n" + "\n".join(lines) + "\n"


def _four_workers() -> str:
    result = _read(FOUR_WORKERS)
    if result is None:
        return ""
    lines = [
        "### Against Past-Future",
        "",
        "Means over the seeds; in brackets the ratio to the first row of each case. Good: first "
        "token within 2 s and 150 ms a token, of all that came. Refusing early: as above "
        "saturation, but every request names a limit of 2 s (`x-tranche-ttft-ms`), and under any "
        "policy whoever would miss it is refused at once; times are of those who were served.",
        "",
        "Cases, by set and load (`sim/trials/sets.py`; `conv` is the Azure conversations shuffled, "
        "so that load is even, and `azure-conv` below keeps the trace's own order and arrivals): "
        + "; ".join(_told(case) for case in CASES)
        + ". Rows: `central FCFS + Past-Future 3 %` is one queue in order of arrival with a "
        "reserve of 3 %; `base, prefill estimated` is that, with each worker's prefill estimated.",
        "",
        "| case | policy | seeds | mean TTFT, s | p99 TTFT, s | mean e2e | served | good "
        "| p99 gap, s | evicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['policy']} | {row['seeds']} "
        f"| {row['ttft_mean_s']:.2f} ({row['ttft_mean_s_ratio']:.2f}) "
        f"| {row['ttft_p99_s']:.2f} ({row['ttft_p99_s_ratio']:.2f}) "
        f"| ({row['e2e_mean_s_ratio']:.3f}) "
        f"| {row['completed']:.3f} | {row['good_share']:.3f} "
        f"| {row['gap_p99_s']:.2f} | {row['evictions']:.2%} |"
        for row in result["rows"]
    ]
    lines += ["", "What it is asked for:", ""]
    lines += [f"- {owed['limit']}" for owed in result["owed"]]
    return "\n".join(lines) + "\n"


def _told(case: Case) -> str:
    arrivals = "" if case.burst is None else f", gaps with a cv of {case.burst:g}"
    return f"{case.name}: `{case.workload}` at {case.load:g}, {case.requests:,} requests{arrivals}"


def _ladder() -> str:
    result = _read(LADDER)
    if result is None:
        return ""
    cases = list(dict.fromkeys(row["case"] for row in result["rungs"]))
    lines = [
        "### What each part is worth",
        "",
        f"![mean time to first token without each part]({PICTURE})",
        "",
        "Mean and p99 time to first token, then p99 gap between tokens, as ratios to the whole "
        "`tranche`; above 1 is worse without, below 1 the part costs something there. `+` rows "
        "are put onto Past-Future one after the other, `-` rows are each taken out alone.",
        "",
        "| rung | " + " | ".join(cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for rung in dict.fromkeys(row["rung"] for row in result["rungs"]):
        cells = {row["case"]: row for row in result["rungs"] if row["rung"] == rung}
        told = [_ratios(cells[case]) if case in cells else "" for case in cases]
        lines.append(f"| {rung} | " + " | ".join(told) + " |")
    seeds = {row["seeds"] for row in result["rungs"]}
    lines += ["", f"Seeds: {_span(seeds)}."]
    return "\n".join(lines) + "\n"


def _ratios(row: Mapping[str, Any]) -> str:
    return " / ".join(f"{row[name]:.2f}" for name in ("ttft_mean_s", "ttft_p99_s", "gap_p99_s"))


def _span(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def picture() -> str:
    """Mean time to first token of the rungs in which one part is missing."""
    result = _read(LADDER)
    if result is None:
        return ""
    rows = [row for row in result["rungs"] if row["down"]]
    names = list(dict.fromkeys(row["rung"] for row in rows))
    series = []
    for case in SHOWN:
        of = {row["rung"]: row["ttft_mean_s"] for row in rows if row["case"] == case}
        if all(name in of for name in names):
            series.append((case, [of[name] for name in names]))
    return bar_chart(
        "Mean time to first token with one part taken out, over that of the whole tranche",
        "ratio; above 1: worse without",
        [name.removeprefix("- ") for name in names],
        series,
    )


def _everywhere() -> str:
    result = _read(EVERYWHERE)
    if result is None:
        return ""
    figures = ("output_tps", "good_share", "ttft_mean_s", "ttft_p99_s", "e2e_mean_s", "gap_p99_s")
    lines = [
        "### On every trace and length set",
        "",
        "`=`: `tranche` is the best, or within 3 % of the best preset that completed as much, or "
        "the difference is below what can be felt (`sim/trials/everywhere.py`). Else its figure; "
        "then whose was best, and that one's figure. The best may be another preset in each "
        f"column. Behind in {result['behind']} of {result['cells']} figures.",
        "",
        "| workload | load | presets | seeds | throughput | goodput | mean TTFT | p99 TTFT "
        "| mean e2e | p99 stall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for place in result["places"]:
        told = [_beside(place[name]) for name in figures]
        lines.append(
            f"| {place['workload']} | {place['load']:g} | {place['presets']} | {place['seeds']} | "
            + " | ".join(told)
            + " |"
        )
    lines += ["", *result.get("why", ()), "", REMARK, "", _everybody()]
    return "\n".join(lines).rstrip() + "\n"


def _everybody() -> str:
    """What closed batches change, which run no token of a newcomer before a batch has ended."""
    result = _read(EVERYBODY)
    if result is None:
        return ""
    most = max(place["presets"] for place in result["places"])
    seeds = _span({place["seeds"] for place in result["places"]})
    closed = [name for name, preset in PRESETS.items() if preset.form == "closed"]
    told = [line for line in result["why"] if line.startswith(tuple(f"- `{n}`" for n in closed))]
    lines = [
        f"Beside all others, closed batches included ({most - 1} presets, {seeds} seeds of each, "
        f"`bench/results/{EVERYBODY.name}`), it is behind in {result['behind']} of "
        f"{result['cells']} figures. Where closed batches are the best:" + " nowhere." * (not told),
        "",
        *told,
    ]
    return "\n".join(lines) + "\n"


def _beside(cell: Mapping[str, Any]) -> str:
    if cell["behind"] <= WITHIN:
        return f"= {cell['tranche']:.3g}"
    return f"{cell['tranche']:.3g}; {cell['of']} {cell['best']:.3g}"


def _remembered() -> str:
    if not REMEMBERED.exists():
        return ""
    runs = [Remembered(**run) for run in json.loads(REMEMBERED.read_text(encoding="utf-8"))]
    lines = [
        "### Memory alone",
        "",
        "No time and no prefill (`python -m sim.remembered`): one target of 3 % for all sets. "
        "Steps are over those of an oracle that never evicts; ± is the standard deviation over the "
        "seeds. Beside it Past-Future with a reserve of 3 %; the ratio of evictions is to a "
        "Past-Future whose reserve lets it take as many steps as `tranche`. Standstills: the 99th "
        "percentile of each request's longest, over that of Past-Future with 3 %.",
        "",
        "| lengths | seeds | steps | evicted | Past-Future evicts | evicted at equal steps, ratio "
        "| standstills, ratio | price of credits, points of steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    told = {lengths: summary(runs, lengths) for lengths in LIMITS}
    lines += [_remembered_row(lengths, of) for lengths, of in told.items() if of]
    words = [f"- {word}" for word in missed(runs)] or ["- nothing"]
    lines += ["", "What it is asked for there and does not hold:", "", *words]
    return "\n".join(lines) + "\n"


def _remembered_row(lengths: str, of: Mapping[str, float]) -> str:
    cells = (
        lengths,
        f"{of['seeds']:.0f}",
        f"{of['steps']:.3f} ± {of['steps, spread']:.3f}",
        f"{of['evicted']:.2f} ± {of['evicted, spread']:.2f} %",
        f"{of['base evicted']:.2f} %",
        _over(of["evictions at equal steps"]),
        _over(of["stall ratio"]),
        f"{100 * of['price of credits']:+.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _predicted() -> str:
    if not FORETOLD.exists():
        return ""
    runs = json.loads(FORETOLD.read_text(encoding="utf-8"))
    lines = [
        "### What predictions are worth",
        "",
        "Memory alone, runs of 6,000 requests (`python -m sim.foretold`): evictions over those of "
        "Past-Future with a reserve of 3 %, at as many steps as it takes. Correlation: of what was "
        "predicted with the true outputs.",
        "",
        "| lengths | predicted by | correlation | seeds | evictions, ratio | least to most |",
        "|---|---|---|---|---|---|",
    ]
    for lengths, told in sorted({(run["lengths"], run["told"]) for run in runs}):
        of = [run for run in runs if (run["lengths"], run["told"]) == (lengths, told)]
        ratios = [run["ratio"] for run in of]
        by = {"0": "nobody", "real": "a real predictor"}.get(told, "the truth and noise")
        cells = (lengths, by, f"{fmean(run['correlation'] for run in of):.2f}", str(len(of)))
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {' | '.join(cells)} | {fmean(ratios):.2f} | {span} |")
    return "\n".join(lines) + "\n"


def _over(ratio: float) -> str:
    """Where Past-Future has next to none, a ratio says nothing."""
    return f"{ratio:.2f}" if ratio < RATIO_MOST else "it has none"
