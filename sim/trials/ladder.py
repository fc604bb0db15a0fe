"""The ladder: what each part of `tranche` is worth, by taking it out and by adding it.

Upwards, parts are put onto Past-Future's preset one after the other until the whole is there;
downwards, each one is taken out of the whole alone. A part that is worth nothing, or less, is shown
like the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from services.scheduler.core.presets import PRESETS
from sim.setup import Value
from sim.trials.cell import Cell, Figures
from sim.trials.four_workers import CASES, Case
from sim.trials.kept import Kept
from sim.trials.stats import Mean, mean_of, ratio_of

PLAIN = tuple(case for case in CASES if case.ttft_ms is None)
"""The cases in which nobody is refused: with limits, parts are measured on those who are left."""
OURS = "tranche"
EVERYTHING: Mapping[str, Value] = PRESETS[OURS].constants


@dataclass(frozen=True, slots=True)
class Rung:
    """A variant by the part that it has more, or less, than its neighbour."""

    name: str
    policy: str
    constants: Mapping[str, Value] = field(default_factory=dict)
    down: bool = False
    """Taken out of the whole; else put onto the rung before."""


NO_BACKFILL: Mapping[str, Value] = {"backfill_max": 0}
_PLAIN = f"{OURS}+order=fcfs"
UP = (
    Rung("past-future 5 %", "past-future"),
    Rung("+ admission", f"{_PLAIN}+offloading=sal-a+victim=largest-kv", NO_BACKFILL),
    Rung("+ victims", f"{_PLAIN}+offloading=sal-a", NO_BACKFILL),
    Rung("+ placement", _PLAIN, NO_BACKFILL),
    Rung("+ order", OURS, NO_BACKFILL),
    Rung("+ backfill = tranche", OURS),
)
DOWN = (
    Rung("- admission", f"{OURS}+admission=past-future", {"future_reserve": 0.03}, down=True),
    Rung("- order", _PLAIN, down=True),
    Rung("- victims", f"{OURS}+victim=last-admitted", down=True),
    Rung("- backfill", OURS, NO_BACKFILL, down=True),
    Rung("- placement", f"{OURS}+offloading=least-requests", down=True),
    Rung("- late binding", f"{OURS}+binding=early", down=True),
    Rung("- prefill estimate", OURS, {"bind_backlog_estimated": False}, down=True),
    Rung("- prefill cap", OURS, {"bind_backlog_tokens": 0}, down=True),
    Rung("- priced target", OURS, {"chance_priced": False}, down=True),
    Rung("- short slices", OURS, {"slice_tokens": 512}, down=True),
)
RUNGS = UP + DOWN
FIGURES: Mapping[str, str] = {
    "ttft_mean_s": "mean TTFT",
    "ttft_p99_s": "p99 TTFT",
    "gap_p99_s": "p99 gap",
    "e2e_mean_s": "mean e2e",
}


def cell_of(case: Case, rung: Rung, seed: int) -> Cell:
    """One run."""
    return Cell(
        workload=case.workload,
        load=case.load,
        policy=rung.policy,
        constants=rung.constants,
        requests=case.requests,
        burst=case.burst,
        seed=seed,
    )


def cells(seeds: int) -> list[Cell]:
    """Seed by seed."""
    return [
        cell_of(case, rung, seed)
        for seed in range(1, seeds + 1)
        for case in PLAIN
        for rung in RUNGS
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """A rung in a case, beside the whole."""

    case: Case
    rung: Rung
    figures: Sequence[Figures]
    whole: Sequence[Figures]

    def ratio(self, name: str) -> Mean:
        """To the whole `tranche`: above 1 it is worse without."""
        ours = [getattr(one, name) for one in self.figures]
        return ratio_of(ours, [getattr(one, name) for one in self.whole])

    def mean(self, name: str) -> Mean:
        return mean_of([getattr(one, name) for one in self.figures])


def rows(kept: Kept, seeds: int) -> list[Row]:
    """Those that have run, on the seeds that the whole has run on too."""
    whole, found = Rung(OURS, OURS), []
    for case in PLAIN:
        for rung in RUNGS:
            pairs = [
                (kept.of(cell_of(case, rung, seed)), kept.of(cell_of(case, whole, seed)))
                for seed in range(1, seeds + 1)
            ]
            both = [(one, all_) for one, all_ in pairs if one is not None and all_ is not None]
            if both:
                found.append(Row(case, rung, [one for one, _ in both], [all_ for _, all_ in both]))
    return found


def table(found: Sequence[Row]) -> Table:
    """For the terminal."""
    shown = Table(title="Ratios to the whole of tranche; above 1 is worse; ± over seeds")
    for name in ("case", "rung", "seeds", *FIGURES.values(), "goodput", "evictions"):
        shown.add_column(name)
    for row in found:
        ratios = [row.ratio(name).told(2) for name in FIGURES]
        more = (row.mean("good_share").told(), row.mean("evictions").told())
        shown.add_row(row.case.name, row.rung.name, str(len(row.figures)), *ratios, *more)
    return shown


def as_json(found: Sequence[Row]) -> dict[str, object]:
    """What is kept in bench/results, and what the picture and the document are made from."""
    return {
        "rungs": [
            {
                "case": row.case.name,
                "rung": row.rung.name,
                "down": row.rung.down,
                "seeds": len(row.figures),
                "good_share": row.mean("good_share").value,
                "evictions": row.mean("evictions").value,
                **{name: row.ratio(name).value for name in FIGURES},
                **{f"{name}_spread": row.ratio(name).spread for name in FIGURES},
            }
            for row in found
        ]
    }
