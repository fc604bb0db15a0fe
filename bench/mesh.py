"""A whole mesh as separate processes on this machine, for benchmarks: started, watched, stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

START_S = 120.0
STOP_S = 60.0
LOGS = Path(".run/bench")


class MeshNotReady(Exception):
    """A process ended or the mesh did not get ready; the text names the log."""


@dataclass(slots=True)
class ProcessMesh:
    """Where the mesh answers and what runs it."""

    url: str
    metrics_urls: list[str]
    processes: dict[str, psutil.Popen] = field(default_factory=dict)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each process so far, user and system."""
        used = {}
        for name, process in self.processes.items():
            times = process.cpu_times()
            used[name] = times.user + times.system
        return used


@contextmanager
def process_mesh(bus: str, model: Path, policy: str, workers: int) -> Iterator[ProcessMesh]:
    """Gateway, scheduler, estimator and `workers` workers (one torch thread each) on `bus`.

    Raises MeshNotReady.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    ports = free_ports(workers + 2)
    gateway_port, scheduler_port, *worker_ports = ports
    mesh = ProcessMesh(
        url=f"http://127.0.0.1:{gateway_port}",
        metrics_urls=[f"http://127.0.0.1:{port}/metrics" for port in ports[1:]],
    )
    at = ["--bus", bus]
    commands = {
        "estimator": ["estimator", *at, "--database", ":memory:"],
        "scheduler": ["scheduler", *at, "--policy", policy, "--ops-port", str(scheduler_port)],
        "gateway": ["gateway", *at, "--port", str(gateway_port), "--model", str(model)],
    }
    commands["gateway"] += ["--open-requests-max", "8192"]
    for number, port in enumerate(worker_ports, 1):
        run = ["worker", *at, "--model", str(model), "--torch-threads", "1"]
        commands[f"worker-{number}"] = [*run, "--name", f"w{number}", "--ops-port", str(port)]
    try:
        for name, command in commands.items():
            mesh.processes[name] = spawn(name, command)
        _wait_ready(mesh, workers)
        yield mesh
    finally:
        _stop(mesh)


def spawn(name: str, command: list[str], logs: Path = LOGS) -> psutil.Popen:
    """A service of this name and command line, with a log of its own."""
    with (logs / f"{name}.log").open("wb") as log:
        return psutil.Popen(
            [sys.executable, "-m", "services", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def _wait_ready(mesh: ProcessMesh, workers: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for name, process in mesh.processes.items():
            if process.poll() is not None:
                raise MeshNotReady(f"{name} ended at its start; see {LOGS / name}.log")
        if _workers_ready(mesh) >= workers and answers(f"{mesh.url}/ready"):
            return
        time.sleep(0.2)
    raise MeshNotReady(f"not ready within {START_S:g} s; see {LOGS}")


def _workers_ready(mesh: ProcessMesh) -> int:
    readiness = [url.replace("/metrics", "/ready") for url in mesh.metrics_urls[1:]]
    return sum(answers(url) for url in readiness)


def answers(url: str) -> bool:
    """Whether the server there says that all is well."""
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _stop(mesh: ProcessMesh) -> None:
    """Gateway first, so that open requests can end; nobody survives."""
    for name in sorted(mesh.processes, key=lambda name: name != "gateway"):
        process = mesh.processes[name]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in mesh.processes.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
