"""The survey's pre-registered predictions beside what our simulator and core give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from sim.reproduction import survey_runs
from sim.reproduction.section import Section
from sim.reproduction.survey_claims import checks
from sim.reproduction.survey_load import CONV, DEC
from sim.reproduction.survey_predictions import predictions
from sim.reproduction.survey_results import Results
from sim.reproduction.survey_rows import (
    ADMISSIONS,
    BALANCERS,
    BURST,
    CAPPED,
    CAPS,
    CENTRAL_HRRN,
    FAMILY,
    FLEET,
    MEMORY_BOUND,
    NEARLY_FULL,
    ORDERS,
    PARAMETERS,
    SYSTEMS,
    Row,
)
from sim.reproduction.survey_runs import Figures, Task
from sim.reproduction.survey_tables import TEXT, picture, tables
from sim.setup import Value

NAME = "survey"
TITLE = "The survey's predictions: admission, order, balance"
COARSE: Mapping[str, Value] = {"slice_tokens": 64}
"""Leases of four blocks where memory is not the question: fewer events, the same latencies."""
QUICK_SHARE = 8


def tasks(*, quick: bool) -> Sequence[Task]:
    """Every study; the long runs first."""
    made = [*_admissions(), *_fleets(), *_orders(), *_systems()]
    if not quick:
        return sorted(made, key=lambda task: -task.requests)
    return [replace(task, requests=task.requests // QUICK_SHARE) for task in made if task.seed == 1]


def run(task: Task, progress: Callable[[int, int], None]) -> Figures:
    """One of them."""
    return survey_runs.run(task, progress)


def section(results: Sequence[Figures]) -> Section:
    """Tables, statements and the picture."""
    found = Results(results)
    return Section(
        name=NAME,
        title=TITLE,
        text=TEXT,
        tables=(predictions(found), *tables(found)),
        checks=checks(found),
        pictures=(picture(found),),
    )


def _each(study: str, rows: Mapping[str, Row], seeds: int, like: Task, **more: Value) -> list[Task]:
    return [
        replace(
            like,
            study=study,
            label=label,
            policy=policy,
            constants={**constants, **more},
            seed=seed,
        )
        for seed in range(1, seeds + 1)
        for label, (policy, constants) in rows.items()
    ]


def _admissions() -> Iterator[Task]:
    """One worker, saturated and nearly so."""
    for trace, seeds in ((CONV, 1), (DEC, 2)):
        full = Task(trace=trace, load=2.0, workers=1, requests=2_400, saturated=True)
        yield from _each(f"saturated {trace}", ADMISSIONS, seeds, full)
    nearly = {label: ADMISSIONS[label] for label in NEARLY_FULL}
    yield from _each("dec at 0.94", nearly, 1, Task(trace=DEC, load=0.94, workers=1))


def _orders() -> Iterator[Task]:
    """One worker."""
    yield from _each("orders", ORDERS, 3, Task(load=0.96, workers=1, requests=2_500), **COARSE)


def _fleets() -> Iterator[Task]:
    """Four workers, and eight."""
    yield from _each("balance", BALANCERS, 3, Task(), **COARSE)
    yield from _each("eight workers", FLEET, 1, Task(workers=8, requests=3_500), **COARSE)
    yield from _each("burst", BURST, 2, Task(load=0.8, burst=4.0), **COARSE)
    for cap in CAPS:
        limit: dict[str, Value] = {**COARSE, "bind_backlog_tokens": cap}
        rows = {label: BALANCERS[label] for label in CAPPED if label in BALANCERS}
        yield from _each(f"cap {cap}", rows, 1, Task(), **limit)
        aged = {CENTRAL_HRRN: BURST[CENTRAL_HRRN]}
        yield from _each(f"cap {cap}", aged, 1, Task(load=0.8, burst=4.0), **limit)
    bound = Task(trace=DEC, load=1.1, requests=4_500)
    yield from _each("memory-bound", MEMORY_BOUND, 1, bound, **COARSE)


def _systems() -> Iterator[Task]:
    """Whole presets with equal limits: conversations on four workers, long outputs on one."""
    for load, seeds in ((0.7, 1), (0.92, 2), (1.05, 2)):
        yield from _each(f"{CONV} at {load:g}", SYSTEMS, seeds, Task(load=load))
    overload = Task(trace=DEC, load=1.05, workers=1, requests=2_000)
    yield from _each(f"{DEC} at 1.05", SYSTEMS, 2, overload)
    family = {**FAMILY, **PARAMETERS}
    yield from _each(f"family {CONV}", family, 1, Task(load=1.05))
    yield from _each(f"family {DEC}", family, 1, overload)
