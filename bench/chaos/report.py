"""A run's figures as one value, as a table, and as a file; several of them as one campaign."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import msgspec
from rich.table import Table

from bench.chaos.judge import Done, Finding, Recovery
from bench.chaos.schedule import Fault


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One seed."""

    seed: int
    seconds: float
    at: str
    machine: str
    settings: dict[str, Any]
    schedule: tuple[Fault, ...]
    done: list[Done]
    """Times are seconds after the storm's beginning."""
    outcomes: dict[str, int]
    refusals: dict[str, int]
    tokens: int
    """Compared with the undisturbed text."""
    ties: int
    """Of them where the reference itself was undecided."""
    token_s: float
    slice_s: float
    """A lease's tokens at that pace: part of the workers' bounds."""
    recoveries: tuple[Recovery, ...]
    findings: list[Finding]
    late: list[str]
    """Recoveries beyond their bounds."""
    logs: str


def late(recoveries: Sequence[Recovery]) -> list[str]:
    """Those beyond their bounds, of faults that came alone."""
    return [
        f"#{r.number} {r.kind} {r.role}: {r.pause_s:.2f} s, at most {r.bound_s:.2f} s"
        for r in recoveries
        if r.alone and r.bound_s and r.pause_s > r.bound_s
    ]


def struck(run: Run) -> int:
    """Faults that befell somebody."""
    return sum(bool(done.who) for done in run.done)


def recovery_table(runs: Sequence[Run]) -> Table:
    """A row for every kind of fault and role."""
    rows: dict[tuple[str, str], list[Recovery]] = defaultdict(list)
    for run in runs:
        for one in run.recoveries:
            rows[one.kind, one.role].append(one)
    table = Table(
        title="The longest time without a token, of a stream that was under way at the fault"
    )
    for name in ("fault", "on", "done", "alone", "p50 s", "max s", "bound s", "beyond"):
        table.add_column(name, justify="left" if name in ("fault", "on") else "right")
    for (kind, role), ones in sorted(rows.items()):
        alone = [one for one in ones if one.alone and one.streams]
        pauses = [one.pause_s for one in alone]
        bounds = [one.bound_s for one in ones]
        beyond = sum(0 < one.bound_s < one.pause_s for one in alone)
        table.add_row(
            kind,
            role,
            str(len(ones)),
            str(len(alone)),
            f"{median(pauses):.2f}" if pauses else "-",
            f"{max(pauses):.2f}" if pauses else "-",
            f"{max(bounds):.2f}" if max(bounds) else "-",
            str(beyond) if max(bounds) else "-",
        )
    return table


def total_table(runs: Sequence[Run]) -> Table:
    """What became of all streams."""
    outcomes: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for run in runs:
        outcomes.update(run.outcomes)
        refusals.update(run.refusals)
    table = Table(title="Streams, faults and findings", show_header=False)
    table.add_row("seeds", ", ".join(str(run.seed) for run in runs))
    table.add_row("faults that befell somebody", str(sum(map(struck, runs))))
    table.add_row("streams", f"{sum(outcomes.values()):,}")
    for outcome, count in sorted(outcomes.items()):
        table.add_row(f"  {outcome}", f"{count:,}")
    table.add_row("refused, and asked for again", str(sum(refusals.values())))
    table.add_row("tokens compared", f"{sum(run.tokens for run in runs):,}")
    table.add_row("near ties among them", str(sum(run.ties for run in runs)))
    table.add_row("findings", str(sum(len(run.findings) for run in runs)))
    table.add_row("recoveries beyond their bound", str(sum(len(run.late) for run in runs)))
    return table


def lines_of(run: Run) -> list[str]:
    """Everything that is wrong, with where to look."""
    found = [
        f"seed {run.seed}: stream {f.stream} ({f.answer_id or 'no id'}): {f.what}; after {f.near}"
        if f.stream >= 0
        else f"seed {run.seed}: {f.what}"
        for f in run.findings
    ]
    found += [f"seed {run.seed}: late: {text}" for text in run.late]
    return [*found, f"seed {run.seed}: logs and journals: {run.logs}"] if found else []
