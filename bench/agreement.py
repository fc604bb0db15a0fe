"""`python -m bench.agreement`: does the live mesh do what the simulator says of it?

The same seeded workload twice: through gateway, scheduler, estimator and workers as processes on
RabbitMQ, the workers with the engine `simulated`; and through `sim.run` in virtual time. Both have
the same cost profile, stretched in time so that the processor time of the services does not count
beside it, the same constants, and cold histories; iterations are without noise. True lengths are
hidden in both: a live output ends by itself where the worker's table says so. Asked: throughput
within 3 %, means of time to first token and of the whole within 10 %.
"""

import asyncio
import csv
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import msgspec
import psutil  # type: ignore[import-untyped]
import typer
from rich.console import Console
from rich.table import Table

from bench.client import stream_request
from bench.small_mesh import DEMO_MODEL
from bench.stretched import stretched
from bench.swarm.mesh import Plan, SwarmMesh, swarm_mesh
from bench.verdict import conclude
from services.scheduler.settings import AMPLE_SLICE_TOKENS, SchedulerSettings
from shared.profiles import CostProfile, load_profile
from sim.items import Item, Workload
from sim.report import Record, Report, summarise
from sim.reproduction.survey_load import (
    CAPS,
    CONV,
    DEC,
    LENGTH_MAX,
    PROFILE,
    SOURCES,
    fluid_bound,
)
from sim.run import Keep, run
from sim.setup import Setup
from sim.slo import Slo
from sim.workload import make_workload

RESULTS = Path(__file__).parent / "results"
LOGS = Path(".run/agreement")
SLICE_TOKENS = 64
REQUEST_TIMEOUT_S = 900.0
PROMPT_IDS = 1_000
"""Ids of prompts are drawn from so many; nobody shares anything."""
LIMITS = {
    "throughput, requests/s": 0.03,
    "throughput, tokens/s": 0.03,
    "TTFT, mean, s": 0.10,
    "end to end, mean, s": 0.10,
}
"""Asked; other figures are told only."""


@dataclass(frozen=True, slots=True)
class Case:
    """What both run."""

    policy: str
    trace: str
    load: float
    """Of the fluid bound of all workers."""
    requests: int
    workers: int
    stretch: float
    """How many times slower than the profile."""
    seed: int
    kv_tokens: int = 0
    """Of each worker; 0: the profile's. With little of it memory binds soon."""
    clients: int | None = None
    """Closed loop of so many, at no load in particular."""

    @property
    def profile(self) -> CostProfile:
        profile = stretched(load_profile(PROFILE), self.stretch)
        kv_tokens = self.kv_tokens or profile.kv_tokens
        return msgspec.structs.replace(profile, kv_tokens=kv_tokens)

    @property
    def workload(self) -> Workload:
        if self.clients:
            return self._workload(1.0, self.clients)
        bound = fluid_bound(self._workload(1.0, None).items, self.profile)
        return self._workload(self.load * self.workers * bound.rps, None)

    def _workload(self, rate: float, clients: int | None) -> Workload:
        longest = self.profile.kv_tokens - CAPS[self.trace]
        return make_workload(
            SOURCES[self.trace],
            limit=self.requests,
            max_prompt_tokens=min(longest, LENGTH_MAX[self.trace] or longest),
            max_output_tokens=LENGTH_MAX[self.trace],
            shuffle=True,
            rate=None if clients else rate,
            clients=clients,
            seed=self.seed,
        )

    @property
    def set(self) -> dict[str, str]:
        """Of the scheduler: with a chosen length of slices its default would be another."""
        return {"ample_slice_tokens": str(AMPLE_SLICE_TOKENS)}

    @property
    def setup(self) -> Setup:
        """For the simulator."""
        live = SchedulerSettings(policy=self.policy, slice_tokens=SLICE_TOKENS, set=self.set)
        return Setup(
            policy=self.policy,
            workload=self.workload,
            profile=self.profile,
            workers=self.workers,
            constants=dataclasses.asdict(live.constants()),
            seed=self.seed,
            max_tokens=CAPS[self.trace],
            noise_cv=0.0,
            told=True,
        )


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of both."""

    name: str
    live: float
    simulated: float
    error: float
    """Simulated over live, less 1."""
    limit: float | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A run and its simulation."""

    case: dict[str, Any]
    machine: str
    figures: list[Figure]
    live: Report
    simulated: Report
    cpu_share: dict[str, float]
    """Cores that each stage used while the load ran; `client`: this process."""
    behind_s_max: float
    """How late a request was sent at worst."""
    failures: list[str]


# ------------------------------------------------------------------------------------------ live


def live(case: Case, logs: Path) -> tuple[list[Record], dict[str, float], float]:
    """Records, cores used by stage, and how late the client was."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder / DEMO_MODEL.name, case.profile.kv_tokens)
        profile = folder / "profile.json"
        profile.write_bytes(msgspec.json.encode(case.profile))
        lengths = folder / "lengths.csv"
        _write_lengths(case.workload.items, lengths)
        with swarm_mesh(_plan(case, model, profile, lengths), logs) as mesh:
            before, began = _cpu_s(mesh), time.monotonic()
            clients = Clients(mesh.urls[0], model.name, case)
            asyncio.run(clients.run())
            seconds, after = time.monotonic() - began, _cpu_s(mesh)
    share = {stage: (after[stage] - before[stage]) / seconds for stage in before}
    return clients.records, share, clients.behind_s_max


def _model(folder: Path, context_tokens: int) -> Path:
    """The demo model's tokenizer and configuration, for a context as long as a worker's memory."""
    shutil.copytree(DEMO_MODEL, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"max_position_embeddings": context_tokens}))
    return folder


def _write_lengths(items: Sequence[Item], file: Path) -> None:
    """Row i is the length of the request with seed i."""
    with file.open("w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(["output_tokens"])
        rows.writerows([item.output_tokens] for item in items)


def _plan(case: Case, model: Path, profile: Path, lengths: Path) -> Plan:
    worker = {
        "pretend-workers": "0",
        "simulated-speed": "1",
        "simulated-noise": "0",
        "simulated-lengths": str(lengths),
        "batch-size-max": "0",
    }
    return Plan(
        workers=case.workers,
        processes=case.workers,
        gateways=1,
        policy=case.policy,
        slice_tokens=SLICE_TOKENS,
        profile=str(profile),
        rate=1.0,
        streams_per_worker=1.0,
        model=model,
        more={
            "worker": tuple(word for key, value in worker.items() for word in (f"--{key}", value)),
            "scheduler": tuple(
                word for pair in case.set.items() for word in ("--set", "=".join(pair))
            ),
        },
    )


def _cpu_s(mesh: SwarmMesh) -> dict[str, float]:
    used = {}
    for stage, processes in {**mesh.stages, "client": [psutil.Process()]}.items():
        times = [process.cpu_times() for process in processes]
        used[stage] = sum(one.user + one.system for one in times)
    return used


class Clients:
    """All clients of a run."""

    def __init__(self, url: str, model: str, case: Case) -> None:
        self.records: list[Record] = []
        self.behind_s_max = 0.0
        self._url, self._model = url, model
        self._workload, self._cap = case.workload, CAPS[case.trace]
        self._clients = case.clients
        self._began = 0.0

    async def run(self) -> None:
        """Until everybody has their answer."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=30.0)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=timeout) as client:
            self._began = time.monotonic()
            numbered = iter(enumerate(self._workload.items))
            async with asyncio.TaskGroup() as group:
                if self._clients is None:
                    for number, item in numbered:
                        await self._until(item.arrival_s or 0.0)
                        group.create_task(self._send(client, number, item))
                for _ in range(self._clients or 0):
                    group.create_task(self._one_after_the_other(client, numbered))

    async def _until(self, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - (time.monotonic() - self._began)))
        self.behind_s_max = max(self.behind_s_max, time.monotonic() - self._began - due_s)

    async def _one_after_the_other(self, client: httpx.AsyncClient, numbered: Any) -> None:
        for number, item in numbered:
            await self._send(client, number, item)

    async def _send(self, client: httpx.AsyncClient, number: int, item: Item) -> None:
        body = {
            "model": self._model,
            "prompt": [3 + (number + place) % PROMPT_IDS for place in range(item.prompt_tokens)],
            "max_tokens": self._cap,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        self.records.append(await stream_request(client, "/v1/completions", body, self._began))


# --------------------------------------------------------------------------------------- compared


def compared(live: Report, simulated: Report) -> list[Figure]:
    """Figures of both; those that are asked for first."""
    values = {
        "throughput, requests/s": (live.throughput_rps, simulated.throughput_rps),
        "throughput, tokens/s": (live.output_tps, simulated.output_tps),
        "TTFT, mean, s": (live.ttft_s.mean, simulated.ttft_s.mean),
        "end to end, mean, s": (live.e2e_s.mean, simulated.e2e_s.mean),
        "TTFT, p50, s": (live.ttft_s.p50, simulated.ttft_s.p50),
        "TTFT, p99, s": (live.ttft_s.p99, simulated.ttft_s.p99),
        "end to end, p99, s": (live.e2e_s.p99, simulated.e2e_s.p99),
        "TPOT, mean, s": (live.tpot_s.mean, simulated.tpot_s.mean),
    }
    figures = []
    for name, (real, ours) in values.items():
        if real is None or ours is None:
            continue
        error = ours / real - 1 if real else 0.0
        figures.append(
            Figure(name=name, live=real, simulated=ours, error=error, limit=LIMITS.get(name))
        )
    return figures


def failures_of(figures: Sequence[Figure], live: Report, simulated: Report) -> list[str]:
    """What does not agree."""
    found = [
        f"{one.name}: {one.simulated:.4g} simulated, {one.live:.4g} live, {one.error:+.1%}"
        for one in figures
        if one.limit is not None and abs(one.error) > one.limit
    ]
    for name, report in (("live", live), ("simulated", simulated)):
        if report.completed != report.requests:
            found.append(f"{name}: {report.requests - report.completed} not completed")
    if live.output_tokens != simulated.output_tokens:
        found.append(f"tokens: {live.output_tokens} live, {simulated.output_tokens} simulated")
    return found


def measure(case: Case, logs: Path) -> Result:
    """The simulation first: it is quick, and what cannot be simulated need not run."""
    simulated = run(case.setup, keep=Keep(spans=False)).report
    records, cpu_share, behind_s_max = live(case, logs)
    report = summarise(records, policy=case.policy, workers=case.workers, slo=Slo())
    figures = compared(report, simulated)
    cores = len(psutil.Process().cpu_affinity())
    return Result(
        case=dataclasses.asdict(case),
        machine=f"{cores} of {psutil.cpu_count()} cores",
        figures=figures,
        live=report,
        simulated=simulated,
        cpu_share=cpu_share,
        behind_s_max=behind_s_max,
        failures=failures_of(figures, report, simulated),
    )


def _table(result: Result) -> Table:
    table = Table(title="The live mesh and the simulator")
    for name in ("measure", "live", "simulated", "error", "allowed"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for one in result.figures:
        limit = "" if one.limit is None else f"{one.limit:.0%}"
        table.add_row(
            one.name, f"{one.live:.4g}", f"{one.simulated:.4g}", f"{one.error:+.1%}", limit
        )
    return table


def main(
    policy: str = "tranche",
    trace: Annotated[str, typer.Option(help=f"{CONV} or {DEC}.")] = CONV,
    load: Annotated[float, typer.Option(help="Of what the workers can do at most.")] = 0.85,
    requests: int = 800,
    workers: int = 4,
    stretch: Annotated[float, typer.Option(help="Times slower than the profile.")] = 4.0,
    clients: Annotated[int, typer.Option(help="A closed loop of so many; 0: open.")] = 0,
    seed: int = 1,
    kv_tokens: Annotated[int, typer.Option(help="Of each worker; 0: the profile's.")] = 0,
    results: Path = RESULTS,
) -> None:
    """Exit code 1 if they do not agree."""
    console = Console()
    LOGS.mkdir(parents=True, exist_ok=True)
    case = Case(policy, trace, load, requests, workers, stretch, seed, kv_tokens, clients or None)
    result = measure(case, LOGS)
    used = ", ".join(f"{stage} {share:.2f}" for stage, share in result.cpu_share.items())
    said = f"cores used: {used} ({result.machine}); client {result.behind_s_max:.3f} s late at most"
    conclude(f"agreement-{policy}", result, results, console, _table(result), said)


if __name__ == "__main__":
    typer.run(main)
