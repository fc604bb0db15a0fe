"""Past-Future, memory only: the artifact's table with our gates, and the statements around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.scheduler.core.settings import Constants
from sim.memory_only import CAPACITY_TOKENS, QUIRKS, Tally, simulate
from sim.past_future_source import FILE_SET, POLICIES, SETS, requests_of
from sim.past_future_table import (
    SEEDS,
    Cell,
    Task as TableTask,
    cell,
    run_task,
    tasks as table_tasks,
)
from sim.reproduction import past_future_text as text
from sim.reproduction.past_future_claims import claims
from sim.reproduction.section import Section
from sim.reproduction.similarity import LikenessTask, WindowLikeness, of_window

NAME = "past_future"
TITLE = "Past-Future: steps, memory and evictions"
WINDOWS = {"conversation": (1000, 200, 100), "code": (1000, 200)}
COLD_STARTS: dict[str, Constants] = {
    "W = 40, 20 stand-ins (the artifact's server)": replace(QUIRKS, history_window=40),
    "W = 1000, 500 stand-ins (the paper's, second hand)": QUIRKS,
    "W = 1000, 20 stand-ins until the 40th finish (preset past-future)": replace(
        QUIRKS, cold_start_share=0.02, cold_start_ends=40
    ),
}
"""With a reserve of 5 %; a stand-in is as long as the request's limit."""
COLD_SETS = ("Dist-1", "Dist-3", FILE_SET)
STEADY = 0.95
BLOCK_STEPS = 500
"""Memory in use is averaged over so many steps before it is compared."""


@dataclass(frozen=True, slots=True)
class TableRun:
    """One run of the table."""

    task: TableTask
    tally: Tally


@dataclass(frozen=True, slots=True)
class ColdTask:
    """How long an empty history holds the policy back."""

    lengths: str
    start: str


@dataclass(frozen=True, slots=True)
class ColdStart:
    """When memory in use first reaches 95 % of what it is in the second half of the run."""

    task: ColdTask
    steps: int
    finished: int
    steady_share: float


Task = TableTask | ColdTask | LikenessTask
Outcome = TableRun | ColdStart | WindowLikeness


def tasks(*, quick: bool) -> Sequence[Task]:
    """The table's runs, the longest first, then the two smaller questions."""
    runs = table_tasks(1 if quick else SEEDS)
    cold_sets: Sequence[str] = COLD_SETS
    if quick:
        runs, cold_sets = [task for task in runs if task.lengths == FILE_SET], (FILE_SET,)
    cold = [ColdTask(lengths, start) for lengths in cold_sets for start in COLD_STARTS]
    alike = [LikenessTask(trace, window) for trace, sizes in WINDOWS.items() for window in sizes]
    return [*runs, *cold, *alike]


def run(task: Task, progress: Callable[[int, int], None]) -> Outcome:
    """One of them."""
    match task:
        case TableTask():
            return TableRun(task, run_task(task, progress))
        case ColdTask():
            return cold_start(task, progress)
        case LikenessTask():
            return of_window(task)


def cold_start(task: ColdTask, progress: Callable[[int, int], None]) -> ColdStart:
    """Follow the memory in use from an empty history on."""
    held: dict[int, list[int]] = {}
    ended: dict[int, int] = {}

    def look(steps: int, finished: int, held_tokens: int) -> None:
        held.setdefault(steps // BLOCK_STEPS, []).append(held_tokens)
        ended[steps // BLOCK_STEPS] = finished

    constants = replace(COLD_STARTS[task.start], future_reserve=0.05, cold_start_tokens=0)
    source = requests_of(task.lengths, 0)
    simulate(source, "past-future", constants, progress=progress, look=look)
    blocks = sorted(held)
    means = {block: sum(held[block]) / len(held[block]) for block in blocks}
    second_half = [means[block] for block in blocks[len(blocks) // 2 : -1]]
    steady = sum(second_half) / len(second_half)
    reached = next(block for block in blocks if means[block] >= STEADY * steady)
    return ColdStart(task, reached * BLOCK_STEPS, ended[reached], steady / CAPACITY_TOKENS)


def section(results: Sequence[Outcome]) -> Section:
    """Tables and statements."""
    cells = cells_of([result for result in results if isinstance(result, TableRun)])
    alike = [result for result in results if isinstance(result, WindowLikeness)]
    cold = [
        (result.task.lengths, result.task.start, result.steps, result.finished, result.steady_share)
        for result in results
        if isinstance(result, ColdStart)
    ]
    return Section(
        name=NAME,
        title=TITLE,
        text=text.TEXT,
        tables=(text.main_table(cells), text.likeness_table(alike), text.cold_table(cold)),
        checks=claims(cells, alike),
    )


def cells_of(runs: Sequence[TableRun]) -> list[Cell]:
    """The table's cells, of the sets that were run."""
    found: dict[tuple[str, str], list[Tally]] = {}
    for done in runs:
        found.setdefault((done.task.lengths, done.task.policy), []).append(done.tally)
    return [
        cell(lengths, policy, found[lengths, policy], found[lengths, "oracle"])
        for lengths in SETS
        for policy in POLICIES
        if (lengths, policy) in found
    ]
