"""A mesh for the swarm: a private RabbitMQ and every service as a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil  # type: ignore[import-untyped]

from bench.mesh import MeshNotReady, answers, free_ports, spawn
from shared.profiles import load_profile
from tests.rabbitmq import BOOT_TIMEOUT_S, Management

START_S = 180.0
"""Hundreds of workers on few cores."""
STOP_S = 30.0
CONTEXT_TOKENS = 100
"""A stream's usual context, by which the speed is set."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a mesh."""

    workers: int
    """Pretended ones, in all."""
    processes: int
    gateways: int
    policy: str
    slice_tokens: int
    profile: str
    rate: float
    """Tokens per second and stream that workers make at `streams_per_worker`."""
    streams_per_worker: float
    model: Path
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stage to further arguments of its processes."""

    @property
    def speed(self) -> float:
        """How many times faster than its profile a worker has to be: a small part."""
        rows = max(1, round(self.streams_per_worker))
        profile = load_profile(self.profile)
        return self.rate * profile.decode_steps_s(rows, rows * CONTEXT_TOKENS, 1)


@dataclass(slots=True)
class SwarmMesh:
    """Where the mesh answers, and what runs it."""

    urls: list[str]
    management: Management
    stages: dict[str, list[psutil.Process]] = field(default_factory=dict)
    """Stage to its processes."""

    def alive(self) -> bool:
        """Nobody has ended."""
        processes = (p for stage in self.stages.values() for p in stage)
        return all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@contextmanager
def swarm_mesh(plan: Plan, logs: Path) -> Iterator[SwarmMesh]:
    """Started, and stopped at the end. Raises MeshNotReady."""
    started: list[psutil.Popen] = []
    with TemporaryDirectory() as folder:
        try:
            management = _broker(Path(folder), logs, started)
            mesh = SwarmMesh([], management)
            mesh.stages["broker"] = _beam(started[0])
            _services(plan, mesh, logs, started)
            yield mesh
        finally:
            _stop(started)


def _broker(folder: Path, logs: Path, started: list[psutil.Popen]) -> Management:
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "tests.rabbitmq", "run", "--ready-file", str(ready)]
    with (logs / "broker.log").open("wb") as log:
        broker = psutil.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    started.append(broker)
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while not ready.exists():
        if broker.poll() is not None or time.monotonic() > deadline:
            raise MeshNotReady(f"RabbitMQ did not start; see {logs / 'broker.log'}")
        time.sleep(0.1)
    amqp_url, http_url = json.loads(ready.read_text())
    return Management(amqp_url, http_url)


def _beam(keeper: psutil.Popen) -> list[psutil.Process]:
    """The broker itself: RabbitMQ's shell scripts start one Erlang machine."""
    return [p for p in keeper.children(recursive=True) if p.name().startswith("beam")]


_LIMITS = ("--open-requests-max", "16384", "--connections-max", "16640")


def _services(plan: Plan, mesh: SwarmMesh, logs: Path, started: list[psutil.Popen]) -> None:
    ports = free_ports(plan.gateways + plan.processes)
    model = ["--model", str(plan.model)]
    commands = {
        "estimator": [["estimator", "--database", ":memory:"]],
        "scheduler": [
            ["scheduler", "--policy", plan.policy, "--slice-tokens", str(plan.slice_tokens)]
        ],
        "gateway": [
            ["gateway", *model, "--port", str(port), *_LIMITS] for port in ports[: plan.gateways]
        ],
        "worker": [
            _worker(plan, number, port) for number, port in enumerate(ports[plan.gateways :])
        ],
    }
    bus = ["--bus", mesh.management.vhost_url("/")]
    for stage, ones in commands.items():
        for number, command in enumerate(ones):
            process = spawn(f"{stage}-{number}", [*command, *bus, *plan.more.get(stage, ())], logs)
            started.append(process)
            mesh.stages.setdefault(stage, []).append(process)
    mesh.urls = [f"http://127.0.0.1:{port}" for port in ports[: plan.gateways]]
    _wait_ready(plan, mesh, ports[plan.gateways :])


def _worker(plan: Plan, number: int, port: int) -> list[str]:
    share, more = divmod(plan.workers, plan.processes)
    options = {
        "engine": "simulated",
        "model": plan.model,
        "profile": plan.profile,
        "simulated-speed": f"{plan.speed:.6f}",
        "pretend-workers": share + (number < more),
        "name": f"swarm{number}",
        "ops-port": port,
    }
    return [
        "worker",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def _wait_ready(plan: Plan, mesh: SwarmMesh, worker_ports: list[int]) -> None:
    """Until every worker has joined: the gateways ask the scheduler's beats."""
    urls = [f"http://127.0.0.1:{port}" for port in worker_ports] + mesh.urls
    deadline = time.monotonic() + START_S
    while not all(answers(f"{url}/ready") for url in urls):
        if not mesh.alive() or time.monotonic() > deadline:
            raise MeshNotReady("the mesh did not get ready; see the logs")
        time.sleep(0.3)


def counters(urls: list[str]) -> dict[str, float]:
    """The gateways' own counts, summed over labels and gateways."""
    found: dict[str, float] = {}
    for url in urls:
        for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
            name, _, value = line.rpartition(" ")
            if line.startswith("tranche_gateway_token_runs_total"):
                verdict = name.partition('verdict="')[2].rstrip('"}')
                found[f"runs {verdict}"] = found.get(f"runs {verdict}", 0.0) + float(value)
            elif line.startswith(("tranche_gateway_token_batches_total", "tranche_gateway_errors")):
                short = name.removeprefix("tranche_gateway_")
                found[short] = found.get(short, 0.0) + float(value)
    return found


def _stop(started: list[psutil.Popen]) -> None:
    """The last ones first, the broker at the end; nobody survives."""
    services = started[1:]
    for process in services:
        process.terminate()
    _, left = psutil.wait_procs(services, timeout=STOP_S)
    for process in left:
        process.kill()
    for process in started[:1]:
        process.terminate()
        psutil.wait_procs([process], timeout=STOP_S)
