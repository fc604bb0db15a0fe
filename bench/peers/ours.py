"""Starts our own whole system on one core: over a private RabbitMQ, or in one process."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.peers.processes import ServerFailed, Tree, free_port

READY_S = 180.0
POLL_S = 0.1
QUIET = ["--log-level", "warning"]


@dataclass(frozen=True, slots=True)
class OursOptions:
    """What ours is told; empty: its own defaults."""

    engine: str = ""
    policy: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    """TRANCHE_<SERVICE>_<NAME> for all our processes."""

    def environment(self) -> dict[str, str]:
        """Float32, one thread and 1 GiB of KV (as vLLM gets) for the worker, unless told
        otherwise."""
        defaults = {
            "TRANCHE_WORKER_DTYPE": "float32",
            "TRANCHE_WORKER_TORCH_THREADS": "1",
            "TRANCHE_WORKER_KV_TOKENS": "65536",
        }
        return defaults | dict(self.env)


def start_mesh(tree: Tree, model: Path, options: OursOptions) -> int:
    """RabbitMQ and the four services, each a process; returns the gateway's port when all are
    ready. Raises ServerFailed."""
    bus = _start_broker(tree)
    at = ["--bus", bus, *QUIET]
    port, scheduler_ops, worker_ops = free_port(), free_port(), free_port()
    policy = ["--policy", options.policy] if options.policy else []
    engine = ["--engine", options.engine] if options.engine else []
    commands = {
        "estimator": ["estimator", *at, "--database", ":memory:"],
        "scheduler": ["scheduler", *at, *policy, "--ops-port", str(scheduler_ops)],
        "gateway": ["gateway", *at, "--port", str(port), "--model", str(model)],
        "worker": ["worker", *at, *engine, "--model", str(model), "--ops-port", str(worker_ops)],
    }
    for name, command in commands.items():
        tree.spawn(name, [sys.executable, "-m", "services", *command], options.environment())
    _wait_ready(tree, [f"http://127.0.0.1:{worker_ops}/ready", f"http://127.0.0.1:{port}/ready"])
    return port


def start_embedded(tree: Tree, model: Path, options: OursOptions) -> int:
    """`tranche serve` with its bus in memory; returns its port when it is ready. Raises
    ServerFailed."""
    port = free_port()
    command = [sys.executable, "-m", "services", "serve", "--model", str(model), *QUIET]
    command += ["--port", str(port)]
    command += ["--policy", options.policy] if options.policy else []
    command += ["--engine", options.engine] if options.engine else []
    env = {"TRANCHE_ESTIMATOR_DATABASE": ":memory:"} | options.environment()
    tree.spawn("serve", command, env)
    _wait_ready(tree, [f"http://127.0.0.1:{port}/ready"])
    return port


def _start_broker(tree: Tree) -> str:
    ready = (tree.folder / "broker.json").resolve()
    ready.parent.mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.rabbitmq", "run", "--ready-file", str(ready)]
    tree.spawn("broker", command)
    deadline = time.monotonic() + READY_S
    while not ready.exists():
        _pause(tree, deadline)
    amqp_url, _ = json.loads(ready.read_text())
    return f"{amqp_url}/%2F"


def _wait_ready(tree: Tree, urls: list[str]) -> None:
    deadline = time.monotonic() + READY_S
    for url in urls:
        while not _answers(url):
            _pause(tree, deadline)


def _pause(tree: Tree, deadline: float) -> None:
    tree.check()
    if time.monotonic() > deadline:
        raise ServerFailed(f"not ready within {READY_S:g} s; see {tree.folder}")
    time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
