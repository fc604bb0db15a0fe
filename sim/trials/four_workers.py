"""Four workers: `tranche` against one queue in order of arrival with Past-Future, 13B on A100.

The survey note's set-up: Azure conversations steadily and in bursts, and a decode-heavy set below
and above saturation; and once more above it, where every request names a limit to its first token
and who would miss it is refused, under any policy. Loads are shares of the fluid bound; each seed
has its own sample and arrivals, the same for every policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from sim.setup import Value
from sim.trials.cell import Cell, Figures
from sim.trials.kept import Kept
from sim.trials.stats import mean_of, ratio_of


@dataclass(frozen=True, slots=True)
class Case:
    """One workload at one load."""

    name: str
    workload: str
    load: float
    requests: int
    burst: float | None = None
    ttft_ms: int | None = None


CASES = (
    Case("conversations", "conv", 0.92, 3_000),
    Case("bursts", "conv", 0.80, 3_000, burst=4.0),
    # Outputs are so long that memory fills only after a few thousand requests.
    Case("decode-heavy", "dec", 0.94, 6_000),
    Case("above saturation", "dec", 1.08, 6_000),
    Case("refusing early", "dec", 1.08, 6_000, ttft_ms=2_000),  # as SLO has it
)


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy with its constants, by the name that the table shows."""

    name: str
    policy: str
    constants: Mapping[str, Value] = field(default_factory=dict)


BASE = Contender("central FCFS + Past-Future 3 %", "past-future", {"future_reserve": 0.03})
PREFILL_ESTIMATED: Mapping[str, Value] = {"future_reserve": 0.03, "bind_backlog_estimated": True}
CONTENDERS = (
    BASE,
    Contender("past-future (5 %)", "past-future"),
    Contender("base, prefill estimated", "past-future", PREFILL_ESTIMATED),
    Contender("tranche", "tranche"),
)
MORE = tuple(
    Contender(name, name)
    for name in ("aggressive", "vllm", "sarathi", "sal+larry", "vllm+offloading=round-robin")
)
"""With `--all`: the strongest of the others, and a round robin."""


@dataclass(frozen=True, slots=True)
class Owed:
    """A limit that a figure of `tranche` has to hold."""

    case: str
    figure: str
    """Of `Figures`."""
    most: float
    least: bool = False
    """It is a least value instead."""
    relative: bool = True
    """To BASE."""


OWED = (
    Owed("conversations", "ttft_mean_s", 0.90),
    Owed("conversations", "ttft_p99_s", 1.12),
    Owed("conversations", "good_share", 0.99, least=True, relative=False),
    Owed("bursts", "ttft_mean_s", 0.75),
    Owed("bursts", "ttft_p99_s", 1.12),
    Owed("bursts", "good_share", 0.84, least=True, relative=False),
    Owed("decode-heavy", "ttft_mean_s", 0.90),
    Owed("decode-heavy", "ttft_p99_s", 0.60),
    Owed("above saturation", "gap_p99_s", 0.35, relative=False),
    Owed("above saturation", "ttft_mean_s", 1.03),
)


def cell_of(case: Case, one: Contender, seed: int, changes: Mapping[str, Value]) -> Cell:
    """One of them."""
    constants = {**one.constants, **(changes if one.policy.startswith("tranche") else {})}
    return Cell(
        workload=case.workload,
        load=case.load,
        policy=one.policy,
        constants=constants,
        requests=case.requests,
        burst=case.burst,
        seed=seed,
        ttft_ms=case.ttft_ms,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A contender in a case, over the seeds that are there."""

    case: Case
    one: Contender
    figures: Sequence[Figures]
    base: Sequence[Figures]

    def mean(self, name: str) -> str:
        return mean_of([getattr(f, name) for f in self.figures]).told()

    def ratio(self, name: str) -> str:
        ours = [getattr(f, name) for f in self.figures]
        return ratio_of(ours, [getattr(f, name) for f in self.base]).told(2)


def rows(
    kept: Kept, seeds: int, contenders: Sequence[Contender], changes: Mapping[str, Value]
) -> list[Row]:
    """Those of which something is kept, with BASE's figures of the same seeds."""
    found = []
    for case in CASES:
        for one in contenders:
            pairs = [
                (kept.of(cell_of(case, one, s, changes)), kept.of(cell_of(case, BASE, s, changes)))
                for s in range(1, seeds + 1)
            ]
            both = [(ours, base) for ours, base in pairs if ours is not None and base is not None]
            if both:
                found.append(Row(case, one, [o for o, _ in both], [b for _, b in both]))
    return found


def table(found: Sequence[Row]) -> Table:
    """For the terminal: means, and ratios to BASE."""
    shown = Table(title=f"Four workers; ratios to {BASE.name}; ± standard deviation over seeds")
    for name in ("case", "policy", "seeds", "mean TTFT s", "ratio", "p99 TTFT s", "ratio"):
        shown.add_column(name)
    for name in ("good", "p99 gap s", "evictions", "e2e ratio"):
        shown.add_column(name)
    for row in found:
        shown.add_row(
            row.case.name,
            row.one.name,
            str(len(row.figures)),
            row.mean("ttft_mean_s"),
            row.ratio("ttft_mean_s"),
            row.mean("ttft_p99_s"),
            row.ratio("ttft_p99_s"),
            row.mean("good_share"),
            row.mean("gap_p99_s"),
            row.mean("evictions"),
            row.ratio("e2e_mean_s"),
        )
    return shown


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a limit holds, on the means."""

    owed: Owed
    value: float
    held: bool

    def told(self) -> str:
        what = f"{self.owed.case}: {self.owed.figure}" + (" ratio" if self.owed.relative else "")
        limit = f"{'at least' if self.owed.least else 'at most'} {self.owed.most:g}"
        return f"{what} {self.value:.3f}, {limit}: {'held' if self.held else 'NOT held'}"


def verdicts(found: Sequence[Row]) -> list[Verdict]:
    """Of `tranche`."""
    ours = {row.case.name: row for row in found if row.one.policy == "tranche"}
    judged = []
    for owed in OWED:
        row = ours.get(owed.case)
        if row is None:
            continue
        values = [getattr(f, owed.figure) for f in row.figures]
        base = [getattr(f, owed.figure) for f in row.base]
        value = (ratio_of(values, base) if owed.relative else mean_of(values)).value
        judged.append(
            Verdict(owed, value, value >= owed.most if owed.least else value <= owed.most)
        )
    return judged


def as_json(found: Sequence[Row], judged: Sequence[Verdict]) -> dict[str, object]:
    """What is kept in bench/results."""
    return {
        "rows": [
            {
                "case": row.case.name,
                "policy": row.one.name,
                "seeds": len(row.figures),
                **{name: mean_of([getattr(f, name) for f in row.figures]).value for name in NAMES},
                **{
                    f"{name}_ratio": ratio_of(
                        [getattr(f, name) for f in row.figures],
                        [getattr(f, name) for f in row.base],
                    ).value
                    for name in ("ttft_mean_s", "ttft_p99_s", "e2e_mean_s")
                },
            }
            for row in found
        ],
        "owed": [{"limit": v.told(), "held": v.held} for v in judged],
    }


NAMES = tuple(Figures.__struct_fields__)
