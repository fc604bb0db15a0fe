"""Goodput under an SLA: closed loop, hidden lengths, equal limits; what the artifact's differed."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sim.reproduction import goodput_runs, goodput_text as text
from sim.reproduction.goodput_chart import small_multiples
from sim.reproduction.goodput_claims import Grid, claims
from sim.reproduction.goodput_runs import PAST_FUTURE, SETS, SOURCE_CONSERVATIVE, Result, Task
from sim.reproduction.section import Section
from sim.setup import Value

NAME = "goodput"
TITLE = "Past-Future: goodput under an SLA"
CLIENTS = (10, 20, 30, 40, 60, 80, 100)
"""The source's, for 7B and 13B."""
LARGEST = CLIENTS[-1]
COUNTED = {"Dist-1": (40, 100), "Dist-2": (25, 60), "Dist-3": (40, 150), "ShareGPT-o1": (60, 160)}
"""Requests of the warm-up, as many as run at once or more (at most twice the clients), and those
that count: more where lengths vary more."""
Constants = dict[str, Value]

CHARGED: Constants = {"conservative_output_tokens": 12_000, "conservative_overcommit": 0.95}
"""The source's server: 12,000 output tokens for everybody, of 95 % of memory."""
POLICIES: dict[str, tuple[str, Constants]] = {
    PAST_FUTURE: ("past-future", {}),
    "aggressive 99 %": ("aggressive", {"aggressive_watermark": 0.99}),
    "aggressive 95 %": ("aggressive", {"aggressive_watermark": 0.95}),
    "aggressive 90 %": ("aggressive", {"aggressive_watermark": 0.90}),
    "conservative 100 %": ("conservative", {"conservative_overcommit": 1.0}),
    "conservative 125 %": ("conservative", {"conservative_overcommit": 1.25}),
    "conservative 150 %": ("conservative", {"conservative_overcommit": 1.5}),
    SOURCE_CONSERVATIVE: ("conservative", CHARGED),
}
ABORTED = (PAST_FUTURE, "aggressive 99 %", "aggressive 95 %", "aggressive 90 %")
"""Run again with the server ending whoever waits 1.49 s for a token."""
ONE_AT_A_TIME: Constants = {"bind_backlog_tokens": 1}
"""Nobody is admitted while somebody's prefill is not over: the source's one a round."""
IN_ONE_GO: Constants = {"bind_backlog_tokens": 18_000, "iteration_tokens": 18_000}
"""Prompts of up to 18,000 tokens in one iteration, which everybody waits for."""
WRITTEN_99: Constants = {"aggressive_full_at": 0.95, "aggressive_watermark": 1.0}
"""How the source's server writes 99 %."""
HANDICAPS: dict[str, tuple[str, Constants, bool]] = {
    "true lengths, 5 % reserve": ("oracle", {"oracle_reserve": 0.05}, False),
    "Past-Future, all of the source's": (
        "oracle",
        {"oracle_reserve": 0.05, **ONE_AT_A_TIME},
        True,
    ),
    "Past-Future, one admission at a time": ("past-future", ONE_AT_A_TIME, False),
    "conservative, all of the source's": ("conservative", {**CHARGED, **ONE_AT_A_TIME}, True),
    "aggressive, as the source writes 99 %": ("aggressive", WRITTEN_99, False),
    "aggressive, prefill in one go": (
        "aggressive",
        {"aggressive_watermark": 0.99, **IN_ONE_GO},
        False,
    ),
    "aggressive, all of the source's": ("aggressive", {**WRITTEN_99, **IN_ONE_GO}, False),
}
"""Preset, constants, whether a gap of 1.49 s ends a request."""
HANDICAP_SETS = ("Dist-1", "ShareGPT-o1")
LARGER = (PAST_FUTURE, "aggressive 90 %", SOURCE_CONSERVATIVE)
LARGER_MODEL = ("llama-2-13b-a100", 64_000)
"""Profile and KV tokens of the source's 13B server."""


def tasks(*, quick: bool) -> Sequence[Task]:
    """The smaller questions, whose runs are long, and the grid."""
    if quick:
        return _grid(("Dist-3",), (10, 40), quick=True)
    return [
        *_larger(),
        *_aborted(),
        *_handicapped(),
        *_grid(tuple(SETS), CLIENTS[::-1], quick=False),
        *_bound(),
    ]


def task_of(
    lengths: str, clients: int, policy: str, preset: str, constants: Constants, group: str
) -> Task:
    """A run as long as the set's runs are."""
    warm, counted = COUNTED[lengths]
    return Task(
        lengths=lengths,
        clients=clients,
        policy=policy,
        preset=preset,
        constants=constants,
        warm=min(warm, 2 * clients),
        counted=counted,
        group=group,
    )


def run(task: Task, progress: Callable[[int, int], None]) -> Result:
    """One of them."""
    return goodput_runs.run(task, progress)


def _grid(lengths: Sequence[str], clients: Sequence[int], *, quick: bool) -> list[Task]:
    chosen = (PAST_FUTURE, "aggressive 99 %", SOURCE_CONSERVATIVE) if quick else tuple(POLICIES)
    return [
        task_of(name, number, policy, *POLICIES[policy], "grid")
        for number in clients
        for name in lengths
        for policy in chosen
    ]


def _aborted() -> list[Task]:
    return [
        replace(task_of(name, LARGEST, policy, *POLICIES[policy], "aborted"), gap_abort=True)
        for name in SETS
        for policy in ABORTED
    ]


def _handicapped() -> list[Task]:
    return [
        replace(task_of(name, LARGEST, label, preset, constants, "handicap"), gap_abort=aborts)
        for name in HANDICAP_SETS
        for label, (preset, constants, aborts) in HANDICAPS.items()
    ]


def _bound() -> list[Task]:
    """The most that any admission could do: true lengths, no reserve."""
    return [task_of(name, LARGEST, "true lengths", "oracle", {}, "bound") for name in SETS]


def _larger() -> list[Task]:
    profile, kv_tokens = LARGER_MODEL
    made = []
    for name in SETS:
        for policy in LARGER:
            task = task_of(name, LARGEST, policy, *POLICIES[policy], "13B")
            half = (task.warm // 2, task.counted // 2)
            made.append(
                replace(task, profile=profile, kv_tokens=kv_tokens, warm=half[0], counted=half[1])
            )
    return made


def section(results: Sequence[Result]) -> Section:
    """Tables, statements and the picture."""
    groups = {
        group: [result for result in results if result.task.group == group]
        for group in ("grid", "aborted", "handicap", "13B", "bound")
    }
    grid = Grid(groups["grid"])
    tables = [text.goodput_table(grid, name) for name in grid.sets]
    tables.append(text.tokens_table(grid))
    if groups["aborted"]:
        tables.append(text.aborted_table(grid, groups["aborted"]))
        tables.append(text.handicap_table(grid, groups["aborted"], groups["handicap"]))
        tables.append(text.larger_table(groups["13B"]))
    return Section(
        name=NAME,
        title=TITLE,
        text=text.TEXT,
        tables=tuple(tables),
        checks=claims(
            grid,
            larger=groups["13B"],
            handicapped=groups["handicap"],
            bound=groups["bound"],
            aborted=groups["aborted"],
        ),
        pictures=((text.CAPTION, small_multiples(grid)),),
    )
