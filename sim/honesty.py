"""`python -m sim.honesty`: are predictions and refusals true? The real core, in virtual time.

Four questions, each on steady (Poisson) and bursty (cv 4) arrivals of the Azure conversations:

- *Predictions*: every accepted request is told when it will begin and end; how far is that off?
- *Retry-After of a full queue*: how long is it really until a request is taken in again?
- *Retry-After of a deadline*: the wait that was foretold, against the wait of the same request, had
  it alone been let in (all who were told one, each in a copy of the world).
- *Deadlines*: how many of the accepted meet theirs; and of the refused, how many would have met
  theirs, had nobody been refused for a deadline (the same workload again). Also at the margin: of
  some of the refused that are let in, the others still refused.

True lengths are hidden from the scheduler, as always.
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.scheduler.core.presets import USUAL_POLICY, preset_named
from shared.profiles import load_profile
from sim.clients import Call
from sim.items import Item, Workload
from sim.mesh import SimMesh
from sim.reproduction.survey_load import CAPS, CONV, PROFILE, SOURCES, bound_of
from sim.run import run_out
from sim.setup import Setup, Value
from sim.what_if import first_tokens
from sim.workload import make_workload

WORKERS = 4
BURST = 4.0
WARM_UP = 500
"""Requests at the beginning that do not count: nothing is known yet of lengths and rates."""
PREDICTED_LOADS = {"steady": (0.8, 0.92, 1.05), "bursts": (0.8, 0.92)}
REFUSED_LOADS = {"steady": 1.5, "bursts": 1.2}
PROBES_EVERY_S = 0.1
"""Requests of one token in and out that find out when a door opens; in a pause between bursts
nobody else would."""
WAIT_MAX_S = 10.0
PROBE = "probe"
TTFT_MS = (1_000, 2_000, 5_000, 10_000)
DEADLINE_MS = (5_000, 10_000, 20_000, 40_000, 80_000)
LET_IN_SHARE = 0.1
"""Of the refused, in the run at the margin: few enough not to change the load."""
PATIENCE_S = 600.0
WAITED_S = 0.5
"""Waits below this are left out of relative errors of waits."""
LIMITS = {"steady": 0.25, "bursts": 0.40}
MEET_LEAST, WOULD_MEET_MOST = 0.95, 0.20


@dataclass(frozen=True, slots=True)
class Figure:
    """One answer: a mean over the seeds, and its extremes."""

    question: str
    arrivals: str
    load: float
    value: float
    low: float
    high: float
    count: int
    """What it is made from, all seeds together."""
    limit: str = ""
    held: bool = True


@dataclass(frozen=True, slots=True)
class World:
    """What all runs of one seed share."""

    arrivals: str
    load: float
    requests: int
    seed: int
    policy: str

    def workload(self) -> Workload:
        rate = self.load * WORKERS * bound_of(CONV, 3_000, self.seed).rps
        return make_workload(
            SOURCES[CONV],
            limit=self.requests,
            shuffle=True,
            rate=rate,
            burst=BURST if self.arrivals == "bursts" else None,
            seed=self.seed,
        )

    def mesh(self, workload: Workload, constants: Mapping[str, Value] | None = None) -> SimMesh:
        """That has not begun."""
        setup = Setup(
            policy=self.policy,
            workload=workload,
            profile=load_profile(PROFILE),
            workers=WORKERS,
            constants=constants or {},
            seed=self.seed,
            max_tokens=CAPS[CONV],
            told=True,
        )
        return SimMesh(setup)

    def calls(self, workload: Workload, constants: Mapping[str, Value] | None = None) -> list[Call]:
        """A run, in the order of sending."""
        mesh = self.mesh(workload, constants)
        mesh.start()
        run_out(mesh)
        gc.collect()
        return list(mesh.clients.calls)


# ------------------------------------------------------------------------------------ predictions


def prediction_errors(world: World) -> dict[str, list[float]]:
    """Relative errors of start and finish, of every request, nobody refused."""
    calls = world.calls(world.workload())[WARM_UP:]
    told = [call for call in calls if call.promise is not None and call.outcome == "completed"]
    return {
        "predicted start": [_error(_promise(call)[0], _ttft(call)) for call in told],
        f"predicted start, waits above {WAITED_S:g} s": [
            _error(_promise(call)[0], _ttft(call)) for call in told if _ttft(call) > WAITED_S
        ],
        "predicted finish": [_error(_promise(call)[1], _e2e(call)) for call in told],
    }


# ------------------------------------------------------------------------------------ full queues


def door_errors(world: World) -> dict[str, list[float]]:
    """Of everybody refused for a full queue: told, against the time until the next one that was
    taken in had come. Refusals after the last acceptance have no truth and do not count."""
    calls = world.calls(with_probes(world.workload()), {"wait_max_s": WAIT_MAX_S})
    errors, next_at = [], None
    for call in reversed(calls):
        probe = call.item.service_class == PROBE
        if call.outcome != "rejected":
            next_at = call.sent_at
        elif next_at is not None and call.retry_after_s is not None and not probe:
            errors.append(_error(call.retry_after_s, next_at - call.sent_at))
    warm = sum(call.outcome == "rejected" for call in _first_asking(calls, WARM_UP))
    return {"Retry-After, full queue": errors[: len(errors) - warm]}


def with_probes(workload: Workload) -> Workload:
    """The same requests, and the probes between them."""
    last_s = workload.items[-1].arrival_s or 0.0
    probes = [
        Item(number * PROBES_EVERY_S, 1, 1, service_class=PROBE)
        for number in range(int(last_s / PROBES_EVERY_S))
    ]
    items = sorted([*workload.items, *probes], key=lambda item: item.arrival_s or 0.0)
    return replace(workload, items=tuple(items))


def _first_asking(calls: Sequence[Call], count: int) -> list[Call]:
    return [call for call in calls if call.item.service_class != PROBE][:count]


# -------------------------------------------------------------------------------------- deadlines


def with_deadlines(workload: Workload, seed: int) -> Workload:
    """Half of the requests want their first token, half their end within some time."""
    rng = Random(f"deadlines {seed}")

    def wishing(item: Item) -> Item:
        if rng.random() < 0.5:
            return replace(item, ttft_deadline_ms=rng.choice(TTFT_MS))
        return replace(item, deadline_ms=rng.choice(DEADLINE_MS))

    return replace(workload, items=tuple(wishing(item) for item in workload.items))


def deadline_shares(world: World) -> dict[str, list[float]]:
    """1 or 0 for each request that counts; errors for Retry-After."""
    wishing = with_deadlines(world.workload(), world.seed)
    judged = world.calls(wishing)
    free = world.calls(_without(wishing, lambda number: True))
    refused = [call.number for call in judged[WARM_UP:] if call.outcome == "rejected"]
    chosen = set(Random(f"let in {world.seed}").sample(refused, _few(len(refused))))
    margin = world.calls(_without(wishing, lambda number: number in chosen))
    accepted = [call for call in judged[WARM_UP:] if call.outcome == "completed"]
    items = wishing.items
    retries = retry_errors(world, wishing, judged)
    return {
        "accepted that meet their deadline": [
            float(_meets(call, items[call.number])) for call in accepted
        ],
        "refused that would have met it": [
            float(_meets(free[number], items[number])) for number in refused
        ],
        "refused that would have met it, at the margin": [
            float(_meets(margin[number], items[number])) for number in sorted(chosen)
        ],
        "Retry-After, deadline": [error for error, waited_s in retries if waited_s > WAITED_S],
        "told for a deadline, short waits too": [error for error, _ in retries],
    }


def retry_errors(
    world: World, wishing: Workload, judged: Sequence[Call]
) -> list[tuple[float, float]]:
    """Of everybody refused for a deadline who was told when to come again: the error, and how long
    it would have waited for its first token, had it named no deadline."""
    told = {
        call.number: call.retry_after_s
        for call in judged[WARM_UP:]
        if call.retry_after_s is not None
    }
    waited = first_tokens(world.mesh(wishing), told, _patient, PATIENCE_S)
    return [(_error(told[number], waited[number]), waited[number]) for number in told]


def _few(refused: int) -> int:
    return max(1, round(LET_IN_SHARE * refused)) if refused else 0


def _without(workload: Workload, lifted: Callable[[int], bool]) -> Workload:
    """The same requests; those with these numbers name no deadline."""
    items = tuple(
        _patient(item) if lifted(number) else item for number, item in enumerate(workload.items)
    )
    return replace(workload, items=items)


def _patient(item: Item) -> Item:
    return replace(item, ttft_deadline_ms=None, deadline_ms=None)


def _meets(call: Call, item: Item) -> bool:
    if item.ttft_deadline_ms is not None:
        return _ttft(call) * 1000 <= item.ttft_deadline_ms
    assert item.deadline_ms is not None
    return _e2e(call) * 1000 <= item.deadline_ms


# --------------------------------------------------------------------------------------- figures


def _promise(call: Call) -> tuple[float, float]:
    assert call.promise is not None
    return call.promise


def _ttft(call: Call) -> float:
    return float("inf") if call.first_at is None else call.first_at - call.sent_at


def _e2e(call: Call) -> float:
    done = call.outcome == "completed" and call.last_at is not None
    return (call.last_at or 0.0) - call.sent_at if done else float("inf")


def _error(told_s: float, actual_s: float) -> float:
    """Relative to what came."""
    return abs(told_s - actual_s) / max(actual_s, 1e-6)


def figure(
    question: str, world: World, values: Sequence[Sequence[float]], limit: str, fair: float
) -> Figure:
    """Over the seeds: the median of errors, the mean of shares."""
    share = not (question.startswith(("predicted", "Retry", "told")))
    each = [(fmean if share else median)(one) for one in values if one]
    value = fmean(each) if each else float("nan")
    held = (
        not limit or not each or (value >= fair if limit.startswith("at least") else value <= fair)
    )
    return Figure(
        question,
        world.arrivals,
        world.load,
        value,
        min(each, default=value),
        max(each, default=value),
        sum(map(len, values)),
        limit,
        held,
    )


def limit_of(question: str, arrivals: str) -> tuple[str, float]:
    """What is asked of a figure, in words and as a number; empty: it is told only."""
    most = LIMITS[arrivals]
    if question == "accepted that meet their deadline":
        return f"at least {MEET_LEAST:.0%}", MEET_LEAST
    if question == "refused that would have met it":
        return f"at most {WOULD_MEET_MOST:.0%}", WOULD_MEET_MOST
    if question.startswith("Retry-After") or question == "predicted finish":
        return f"at most {most:.0%}", most
    return "", 0.0


def measure(policy: str, requests: int, seeds: int, kinds: Sequence[str]) -> list[Figure]:
    """Everything, on these kinds of arrivals."""
    figures: list[Figure] = []
    for arrivals in kinds:
        for load in PREDICTED_LOADS[arrivals]:
            worlds = [World(arrivals, load, requests, seed, policy) for seed in range(seeds)]
            figures += _answers(worlds, prediction_errors)
        load = REFUSED_LOADS[arrivals]
        worlds = [World(arrivals, load, requests, seed, policy) for seed in range(seeds)]
        figures += _answers(worlds, door_errors)
        figures += _answers(worlds, deadline_shares)
    return figures


def _answers(
    worlds: Sequence[World], ask: Callable[[World], dict[str, list[float]]]
) -> list[Figure]:
    answers = [ask(world) for world in worlds]
    found = []
    for question in answers[0]:
        limit, fair = limit_of(question, worlds[0].arrivals)
        values = [answer[question] for answer in answers]
        found.append(figure(question, worlds[0], values, limit, fair))
    return found


def table(figures: Sequence[Figure]) -> Table:
    """For the terminal."""
    shown = Table(title="Honesty of predictions and refusals")
    for name in ("question", "arrivals", "load", "value", "over seeds", "of", "asked", "held"):
        shown.add_column(name)
    for one in figures:
        shown.add_row(
            one.question,
            one.arrivals,
            f"{one.load:g}",
            f"{one.value:.1%}" if one.count else "-",
            f"{one.low:.1%} to {one.high:.1%}" if one.count else "-",
            f"{one.count:,}",
            one.limit,
            ("yes" if one.held else "NO") if one.limit else "",
        )
    return shown


def main(
    policy: str = USUAL_POLICY,
    requests: Annotated[int, typer.Option(help="Of each run.")] = 3_000,
    seeds: int = 3,
    arrivals: Annotated[str, typer.Option(help="steady or bursts; else both.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Exit code 1 if a limit is not held."""
    preset_named(policy)
    if arrivals and arrivals not in PREDICTED_LOADS:
        raise typer.BadParameter(f"{arrivals!r} is not one of {', '.join(PREDICTED_LOADS)}")
    kinds = [arrivals] if arrivals else list(PREDICTED_LOADS)
    figures = measure(policy, requests, seeds, kinds)
    Console(width=150).print(table(figures))
    if json_file is not None:
        settings = {"policy": policy, "requests": requests, "seeds": seeds, "workers": WORKERS}
        result = {"settings": settings, "figures": [asdict(one) for one in figures]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if not all(one.held for one in figures):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
