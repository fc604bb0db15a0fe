"""`python -m bench.soak --minutes 60`: does a mesh stay as it is under steady, uncivil load?

At 80 % of what the mesh can do, 1,000 different clients come, one visit at a time each. Most read
their stream to the end; some hang up while they wait or in mid-stream, with or without a word; some
read slowly; some connect and say nothing. Watched: the resident memory of every process (between a
sixth of the run, minute 10 of 60, and its end no more than 5 % apart), requests that never end, and
what is left in the queues and in the gateway when everybody has gone.
"""

import signal
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.table import Table

from bench.arrivals import Arrivals
from bench.crowd import Crowd, Visit
from bench.small_mesh import DEMO_MODEL, Rss, Size, gateway_gauge, messages_left, rss_now
from bench.swarm.mesh import SwarmMesh, swarm_mesh
from bench.verdict import conclude

RESULTS = Path(__file__).parent / "results"
LOGS = Path(".run/soak")
CLIENTS = 1_000
TOKENS_MEAN = 40
SLOW_TOKENS = 800
"""About 170 kB of events: more than the buffers between gateway and client take."""
SLOW_BPS = 600
BEHIND_CHARACTERS = 512
"""Of the gateway's setting, so that slow readers are paused within so few tokens."""
SHARES = {
    "plain": 0.80,
    "leaves waiting": 0.06,
    "leaves midway": 0.10,
    "slow": 0.01,
    "silent": 0.03,
}
"""Of the visits."""
SAMPLE_S = 5.0
DRAIN_S = 400.0
"""A slow reader alone takes 280 s for what was on its way when the arrivals ended."""
STUCK_S = 900.0
"""No visit takes so long by itself."""
WINDOW_SHARE = 1 / 12
"""Memory at a moment is the mean over 5 of 60 minutes."""
FIRST_SHARE = 1 / 6
GROWTH_MAX = 0.05


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of one stage, in MB."""

    first: float
    last: float
    most: float

    @property
    def growth(self) -> float:
        """Of the last window over the first."""
        return self.last / self.first - 1 if self.first else 0.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    at: str
    machine: str
    settings: dict[str, Any]
    minutes: float
    visits: dict[str, int]
    """By what became of them."""
    clients: int
    """Different ones that came."""
    slow_paused: float
    """Times that a stream was paused for a slow reader."""
    memory: dict[str, Memory]
    growth: dict[str, float]
    oldest_s: float
    stuck: int
    """Visits that were still open when the drain ended, or older than any can be."""
    open_at_end: float
    """Requests that the gateway still had."""
    left_in_queues: dict[str, int]
    generator_late_s: float
    failures: list[str]
    samples: list[Rss]


@dataclass(slots=True)
class Soak:
    """The run while it goes on."""

    mesh: SwarmMesh
    load: float
    size: Size
    rng: Random
    began: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)
    came: set[int] = field(default_factory=set)
    samples: list[Rss] = field(default_factory=list)
    oldest_s: float = 0.0
    _idle: deque[int] = field(default_factory=deque)
    _silent: deque[tuple[float, socket.socket]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        numbers = list(range(CLIENTS))
        self.rng.shuffle(numbers)
        self._idle.extend(numbers)

    @property
    def tokens_each(self) -> float:
        """Mean of a visit that is not silent, those that leave counted by what they get."""
        whole = SHARES["plain"] * TOKENS_MEAN + SHARES["slow"] * SLOW_TOKENS
        return whole + SHARES["leaves midway"] * TOKENS_MEAN / 2

    @property
    def rate(self) -> float:
        """Visits a second."""
        return self.load * self.size.tokens_per_s / self.tokens_each

    def visit(self) -> Visit:
        """The next one: by the client that is away longest."""
        client = self._idle.popleft() if self._idle else self.rng.randrange(CLIENTS)
        self.came.add(client)
        kind = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        tokens = self.rng.randint(TOKENS_MEAN // 2, TOKENS_MEAN * 3 // 2)
        visit = Visit(client=client, tokens=tokens)
        if kind == "leaves waiting":
            visit.leave_after_s = self.rng.uniform(0.0, 0.5)
        elif kind == "leaves midway":
            visit.leave_at_token = self.rng.randint(1, tokens)
        elif kind == "slow":
            visit.tokens, visit.read_bps = SLOW_TOKENS, SLOW_BPS
        elif kind == "silent":
            self._connect_only()
        return visit

    def ended(self, visit: Visit) -> None:
        """It is over."""
        self.outcomes[visit.outcome] += 1
        self._idle.append(visit.client)

    def sample(self, crowd: Crowd) -> None:
        """Memory, ages, and connections that said nothing for long enough."""
        self.samples.append(rss_now(self.mesh, self.began))
        self.oldest_s = max(self.oldest_s, crowd.oldest_s)
        now = time.monotonic()
        while self._silent and self._silent[0][0] <= now:
            self._silent.popleft()[1].close()

    def _connect_only(self) -> None:
        """A connection that sends the beginning of a request, and then nothing, for a while."""
        parts = urlsplit(self.mesh.urls[0])
        try:
            line = socket.create_connection((parts.hostname, parts.port), timeout=10)
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: crowd\r\n")
        except OSError:
            return
        self._silent.append((time.monotonic() + self.rng.uniform(1, 30), line))


def memory_of(samples: list[Rss], seconds: float) -> dict[str, Memory]:
    """The first window begins after `FIRST_SHARE` of the run, the last one ends with it."""
    window = WINDOW_SHARE * seconds
    first_at, last_at = FIRST_SHARE * seconds, seconds - window

    def mean(stage: str, begin: float, end: float) -> float:
        values = [s.mb[stage] for s in samples if begin <= s.at_s <= end]
        return sum(values) / len(values) if values else 0.0

    return {
        stage: Memory(
            first=mean(stage, first_at, first_at + window),
            last=mean(stage, last_at, seconds),
            most=max(s.mb[stage] for s in samples),
        )
        for stage in samples[0].mb
    }


def failures_of(result: Result) -> list[str]:
    """What is not as it should be; the broker's memory is told and not judged: it grows until its
    write-ahead log is full, and falls again (deploy/rabbitmq/tranche.conf)."""
    found = [
        f"{stage} grew by {grown:.1%}"
        for stage, grown in result.growth.items()
        if stage != "broker" and abs(grown) > GROWTH_MAX
    ]
    wrong = {kind: result.visits.get(kind, 0) for kind in ("short", "wrong", "cut", "error")}
    found += [f"{count} visits {kind}" for kind, count in wrong.items() if count]
    if result.stuck:
        found.append(f"{result.stuck} requests stuck")
    if result.open_at_end:
        found.append(f"{result.open_at_end:g} requests left in the gateway")
    found += [f"{count} messages left in {name}" for name, count in result.left_in_queues.items()]
    return found


def soak(size: Size, minutes: float, load: float, seed: int, console: Console) -> Result:
    """The whole run. Raises MeshNotReady."""
    LOGS.mkdir(parents=True, exist_ok=True)
    behind = ("--reader-behind-characters", str(BEHIND_CHARACTERS))
    with swarm_mesh(size.plan({"gateway": behind}), LOGS) as mesh:
        run = Soak(mesh, load, size, Random(seed))
        crowd = Crowd(mesh.urls[0], DEMO_MODEL.name, run.ended)
        arrivals = Arrivals(crowd, run.rng, run.visit)
        console.print(f"ready: {run.rate:.2f} visits/s for {minutes:g} minutes")
        run.began = time.monotonic()
        arrivals.run(run.rate, 60 * minutes, SAMPLE_S, lambda: run.sample(crowd))
        measured = list(run.samples)
        left = arrivals.drain(DRAIN_S, SAMPLE_S, lambda: run.sample(crowd))
        queues = messages_left(mesh)
        memory = memory_of(measured, 60 * minutes)
        result = Result(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=f"{psutil.cpu_count()} cores",
            settings={"load": load, "rate": run.rate, "seed": seed, "shares": SHARES},
            minutes=minutes,
            visits=dict(run.outcomes),
            clients=len(run.came),
            slow_paused=gateway_gauge(mesh, "tranche_gateway_paused_readers_total"),
            memory=memory,
            growth={stage: one.growth for stage, one in memory.items()},
            oldest_s=run.oldest_s,
            stuck=left + (run.oldest_s > STUCK_S),
            open_at_end=gateway_gauge(mesh, "tranche_gateway_open_requests"),
            left_in_queues=queues,
            generator_late_s=arrivals.behind_s_max,
            failures=[],
            samples=measured[:: max(1, len(measured) // 120)],
        )
    return msgspec.structs.replace(result, failures=failures_of(result))


def table(result: Result) -> Table:
    """For the terminal."""
    shown = Table(title=f"Soak: {result.minutes:g} minutes")
    for name in ("resident memory, MB", "first", "last", "growth", "most"):
        shown.add_column(name, justify="left" if name.startswith("resident") else "right")
    for stage, one in result.memory.items():
        shown.add_row(
            stage, f"{one.first:.1f}", f"{one.last:.1f}", f"{one.growth:+.1%}", f"{one.most:.1f}"
        )
    return shown


def main(
    minutes: Annotated[
        float, typer.Option(help="How long; memory is judged from a sixth on.")
    ] = 60,
    load: Annotated[float, typer.Option(help="Share of what the mesh can do.")] = 0.8,
    workers: Annotated[int, typer.Option(help="Pretended workers.")] = 4,
    rate: Annotated[float, typer.Option(help="Tokens per second and stream.")] = 8.0,
    policy: str = "past-future",
    seed: int = 0,
    results: Path = RESULTS,
) -> None:
    """Exit code 1 if anything grew, was stuck, lost or left over."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console()
    size = Size(workers=workers, rate=rate, policy=policy)
    result = soak(size, minutes, load, seed, console)
    said = (
        f"visits {result.visits} by {result.clients} clients; oldest {result.oldest_s:.0f} s; "
        f"paused for slow readers {result.slow_paused:g} times; generator late by "
        f"{result.generator_late_s:.2f} s at most"
    )
    conclude("soak", result, results, console, table(result), said)


if __name__ == "__main__":
    typer.run(main)
