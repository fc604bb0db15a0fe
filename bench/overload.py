"""`python -m bench.overload`: three times more than the mesh can do, and it does as much as before.

The real services over RabbitMQ with pretended workers. First the saturation rate is found: what is
completed when half as much again is offered. Then rounds of once and three times that rate take
turns. Asked: goodput at three times within 5 % of the best, resident memory of every process flat,
every refusal a 429 with Retry-After, and that true.

*Goodput*: requests completed with exactly their tokens, the first within `TTFT_S` and the others
at no less than half the workers' pace, per second. *The truth of Retry-After*: a refused client is
told when it may come again; the truth is when the next request of anybody was taken in. The error
is |told - truth| / truth, for the header in whole seconds. A fifth of the refused do come back when
they were told to; how many of those are taken in then is told too.
"""

import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Annotated, Any

import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.table import Table

from bench.arrivals import Arrivals
from bench.crowd import Crowd, Visit
from bench.small_mesh import DEMO_MODEL, Rss, Size, messages_left, rss_now
from bench.swarm.mesh import SwarmMesh, swarm_mesh
from bench.verdict import conclude

RESULTS = Path(__file__).parent / "results"
LOGS = Path(".run/overload")
TOKENS = (20, 60)
TTFT_S = 15.0
PACE_LEAST = 0.5
COME_BACK = 0.2
FIND_LOAD = 1.5
OVERLOAD = 3.0
SAMPLE_S = 2.0
DRAIN_S = 120.0
GOODPUT_LEAST = 0.95
GROWTH_MAX = 0.05
ERROR_MAX = 0.30


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One rate for a while, the settling left out."""

    name: str
    offered_rps: float
    seconds: float
    sent: int
    goodput_rps: float
    completed_rps: float
    refused: int
    come_back: int
    taken_back: int
    """Of those that came back when they were told to."""
    ttft_p50_s: float
    ttft_p99_s: float
    retry_error: float | None
    """Median of Retry-After, whole seconds; None: nobody was refused."""
    retry_ms_error: float | None
    """Median of retry-after-ms."""
    start_error: float | None
    """Median of the predicted start, relative."""
    finish_error: float | None
    rss_mb: dict[str, float]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    at: str
    machine: str
    settings: dict[str, Any]
    saturation_rps: float
    best_rps: float
    overload_rps: float
    goodput_share: float
    """At three times the rate, of the best."""
    retry_error: float
    growth: dict[str, float]
    """Of each stage's memory, from the first overload to the last."""
    outcomes: dict[str, int]
    unhelpful: int
    """Refusals that were no 429 with Retry-After."""
    left_in_queues: dict[str, int]
    generator_late_s: float
    phases: list[Phase]
    failures: list[str]


@dataclass(slots=True)
class Run:
    """While it goes on."""

    mesh: SwarmMesh
    size: Size
    rng: Random
    began: float = field(default_factory=time.monotonic)
    visits: list[Visit] = field(default_factory=list)
    """All that ended."""
    samples: list[Rss] = field(default_factory=list)
    sent: int = 0
    arrivals: Arrivals = field(init=False)

    def __post_init__(self) -> None:
        crowd = Crowd(self.mesh.urls[0], DEMO_MODEL.name, self._ended)
        self.arrivals = Arrivals(crowd, self.rng, self._visit)

    def phase(self, name: str, rate: float, settle_s: float, seconds: float) -> Phase:
        """Settle, then measure."""
        self.arrivals.run(rate, settle_s, SAMPLE_S, lambda: None)
        self.samples.clear()
        begun, end = self.arrivals.run(rate, seconds, SAMPLE_S, self._sample)
        return phase_of(name, rate, begun, end, self.visits, self.samples, self.size)

    def _visit(self) -> Visit:
        self.sent += 1
        return Visit(client=self.sent, tokens=self.rng.randint(*TOKENS))

    def _ended(self, visit: Visit) -> None:
        self.visits.append(visit)
        told = visit.retry_after_s
        if visit.outcome != "refused" or told is None or visit.again:
            return
        if self.rng.random() < COME_BACK:
            back = Visit(client=visit.client, tokens=visit.tokens, again=True)
            self.arrivals.later.append((time.monotonic() + told, back))

    def _sample(self) -> None:
        self.samples.append(rss_now(self.mesh, self.began))


def phase_of(
    name: str,
    rate: float,
    begun: float,
    end: float,
    visits: Sequence[Visit],
    samples: Sequence[Rss],
    size: Size,
) -> Phase:
    """The figures of what ended, and of what was refused, between two moments."""
    ended = [v for v in visits if begun <= (v.ended_at or 0.0) < end]
    complete = [v for v in ended if v.outcome == "complete"]
    refused = [v for v in ended if v.outcome == "refused"]
    back = [v for v in ended if v.again]
    firsts = sorted(v.first_at - v.sent_at for v in complete if v.first_at is not None)
    truths = truths_of(refused, visits)
    seconds = end - begun
    return Phase(
        name=name,
        offered_rps=rate,
        seconds=seconds,
        sent=sum(begun <= v.sent_at < end for v in visits),
        goodput_rps=sum(good(v, size) for v in complete) / seconds,
        completed_rps=len(complete) / seconds,
        refused=len(refused),
        come_back=len(back),
        taken_back=sum(v.outcome != "refused" for v in back),
        ttft_p50_s=firsts[len(firsts) // 2] if firsts else 0.0,
        ttft_p99_s=firsts[int(0.99 * len(firsts))] if firsts else 0.0,
        retry_error=_middle([_error(v.retry_after_s, true_s) for v, true_s in truths]),
        retry_ms_error=_middle([_error(_seconds(v.retry_after_ms), s) for v, s in truths]),
        start_error=_middle(
            [
                _error(_seconds(v.predicted_start_ms), v.first_at - v.sent_at)
                for v in complete
                if v.first_at is not None
            ]
        ),
        finish_error=_middle(
            [
                _error(_seconds(v.predicted_finish_ms), v.last_at - v.sent_at)
                for v in complete
                if v.last_at is not None
            ]
        ),
        rss_mb={stage: fmean(s.mb[stage] for s in samples) for stage in samples[0].mb},
    )


def good(visit: Visit, size: Size) -> bool:
    """In time, its first token and the others."""
    if visit.first_at is None or visit.last_at is None:
        return False
    in_time = visit.first_at - visit.sent_at <= TTFT_S
    longest_s = (visit.tokens - 1) / (size.rate * PACE_LEAST)
    return in_time and visit.last_at - visit.first_at <= longest_s


def truths_of(refused: Sequence[Visit], visits: Sequence[Visit]) -> list[tuple[Visit, float]]:
    """Each refused one with the time until the next one was taken in; those after the last are
    left out, since nobody knows."""
    taken = sorted(v.sent_at for v in visits if v.status == 200)
    found, at = [], 0
    for visit in sorted(refused, key=lambda v: v.sent_at):
        while at < len(taken) and taken[at] <= visit.sent_at:
            at += 1
        if at < len(taken):
            found.append((visit, taken[at] - visit.sent_at))
    return found


def result_of(
    run: Run, given: dict[str, Any], saturation: float, phases: list[Phase], left: dict[str, int]
) -> Result:
    """All phases together."""
    ones = [p for p in phases if p.name == "once"]
    threes = [p for p in phases if p.name == "thrice"]
    best = max(fmean(p.goodput_rps for p in ones), phases[0].goodput_rps)
    overload = fmean(p.goodput_rps for p in threes)
    refused = [v for v in run.visits if v.outcome == "refused"]
    truths = truths_of(refused, run.visits)
    outcomes = Counter[str](visit.outcome for visit in run.visits)
    first, last = threes[0].rss_mb, threes[-1].rss_mb
    result = Result(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{psutil.cpu_count()} cores",
        settings=given,
        saturation_rps=saturation,
        best_rps=best,
        overload_rps=overload,
        goodput_share=overload / best if best else 0.0,
        retry_error=_middle([_error(v.retry_after_s, s) for v, s in truths]) or 0.0,
        growth={stage: last[stage] / first[stage] - 1 for stage in first},
        outcomes=dict(outcomes),
        unhelpful=sum(v.retry_after_s is None for v in refused) + outcomes["error"],
        left_in_queues=left,
        generator_late_s=run.arrivals.behind_s_max,
        phases=phases,
        failures=[],
    )
    return msgspec.structs.replace(result, failures=failures_of(result))


def failures_of(result: Result) -> list[str]:
    """What is not as it should be. The broker's memory is told and not judged: it comes and goes
    with its own garbage collection."""
    found = []
    if result.goodput_share < GOODPUT_LEAST:
        found.append(f"goodput at {OVERLOAD:g}x is {result.goodput_share:.1%} of the best")
    if not any(phase.refused for phase in result.phases):
        found.append("nobody was refused: this was no overload")
    elif result.retry_error > ERROR_MAX:
        found.append(f"Retry-After is off by {result.retry_error:.0%} (median)")
    if result.unhelpful:
        found.append(f"{result.unhelpful} refusals without a time to come again")
    lost = {kind: result.outcomes.get(kind, 0) for kind in ("short", "wrong", "cut", "open")}
    found += [f"{count} visits {kind}" for kind, count in lost.items() if count]
    found += [
        f"{stage} grew by {grown:.1%}"
        for stage, grown in result.growth.items()
        if grown > GROWTH_MAX and stage != "broker"
    ]
    found += [f"{count} messages left in {name}" for name, count in result.left_in_queues.items()]
    return found


def overload(size: Size, seconds: float, rounds: int, seed: int, console: Console) -> Result:
    """The whole run. Raises MeshNotReady."""
    LOGS.mkdir(parents=True, exist_ok=True)
    settle_s = size.wait_max_s + 8
    nominal = size.tokens_per_s / fmean(TOKENS)
    with swarm_mesh(size.plan(), LOGS) as mesh:
        run = Run(mesh, size, Random(seed))
        phases = [run.phase("found", FIND_LOAD * nominal, settle_s, seconds)]
        saturation = phases[0].completed_rps
        console.print(f"saturation: {saturation:.2f} requests/s")
        for _ in range(rounds):
            for name, factor in (("once", 1.0), ("thrice", OVERLOAD)):
                phases.append(run.phase(name, factor * saturation, settle_s, seconds))
                console.print(f"{name}: {phases[-1].goodput_rps:.2f} good requests/s")
        run.arrivals.drain(DRAIN_S, SAMPLE_S, lambda: None)
        left = messages_left(mesh)
        given = {"seconds": seconds, "rounds": rounds, "seed": seed, "policy": size.policy}
        given |= {"workers": size.workers, "running": size.running, "rate": size.rate}
        given |= {"wait_max_s": size.wait_max_s, "ttft_s": TTFT_S, "settle_s": settle_s}
        return result_of(run, given, saturation, phases, left)


def table(result: Result) -> Table:
    """For the terminal."""
    shown = Table(title="Overload")
    names = ("phase", "offered/s", "good/s", "refused", "TTFT p50, p99", "Retry-After off by")
    for name in (*names, "finish off by", "came back, taken in"):
        shown.add_column(name)
    for one in result.phases:
        shown.add_row(
            one.name,
            f"{one.offered_rps:.2f}",
            f"{one.goodput_rps:.2f}",
            f"{one.refused}",
            f"{one.ttft_p50_s:.2f}, {one.ttft_p99_s:.2f}",
            _percent(one.retry_error),
            _percent(one.finish_error),
            f"{one.come_back}, {one.taken_back}",
        )
    return shown


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000


def _error(told_s: float | None, true_s: float) -> float | None:
    return None if told_s is None else abs(told_s - true_s) / max(true_s, 1e-3)


def _middle(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return median(known) if known else None


def main(
    seconds: Annotated[float, typer.Option(help="Of each phase, after settling.")] = 60.0,
    rounds: Annotated[
        int, typer.Option(min=2, help="Of once and three times the rate; memory is compared.")
    ] = 4,
    workers: Annotated[int, typer.Option(help="Pretended workers.")] = 4,
    rate: Annotated[float, typer.Option(help="Tokens per second and stream.")] = 8.0,
    policy: str = "past-future",
    seed: int = 0,
    results: Path = RESULTS,
) -> None:
    """Exit code 1 if anything is not as asked."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(width=120)
    result = overload(
        Size(workers=workers, rate=rate, policy=policy), seconds, rounds, seed, console
    )
    said = (
        f"goodput at {OVERLOAD:g}x: {result.goodput_share:.1%} of the best; Retry-After off by "
        f"{result.retry_error:.0%} (median); memory {result.growth}; {result.outcomes}; "
        f"generator late by {result.generator_late_s:.2f} s at most"
    )
    conclude("overload", result, results, console, table(result), said)


if __name__ == "__main__":
    typer.run(main)
