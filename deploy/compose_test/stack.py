"""The compose project under test: brought up, scaled, looked at and removed by `docker compose`."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "deploy/compose_test/compose.yml")
PROJECT = "tranche-test"
"""Its own containers, network and volumes: a mesh that already runs here is left alone."""
BUILD_LIMIT_S = 1800
COMMAND_LIMIT_S = 600
NEEDED = (
    "`make compose-test` needs a Docker engine that answers and Docker Compose 2.24 or newer as "
    "its plugin: https://docs.docker.com/engine/install/. DOCKER_HOST may point to the engine."
)


class NoEngine(Exception):
    """There is no engine or no Compose to test with."""


class CommandFailed(Exception):
    """`docker` ended with an error; the message holds the end of what it printed."""


class Stack:
    """One project. `port` is the gateway's on this machine."""

    def __init__(self) -> None:
        self.port = _free_port()
        self._environment = os.environ | {
            "TRANCHE_PORT": str(self.port),
            "TRANCHE_OTLP": "http://collector:4318",
            "TRANCHE_CPUS_WORKER": "0.5",
            "TRANCHE_MEMORY_WORKER": "1g",
            "COMPOSE_PROGRESS": "plain",
        }

    @property
    def url(self) -> str:
        """The gateway's address."""
        return f"http://127.0.0.1:{self.port}"

    def check_engine(self) -> None:
        """Raises NoEngine with what to do."""
        if shutil.which("docker") is None:
            raise NoEngine(NEEDED)
        try:
            _run(["docker", "version"], self._environment, 30)
            _run(["docker", "compose", "version"], self._environment, 30)
        except CommandFailed as error:
            raise NoEngine(f"{NEEDED}\n{error}") from error

    def compose(self, *arguments: str, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run `docker compose ARGUMENTS` and return what it printed. Raises CommandFailed."""
        files = [part for file in FILES for part in ("-f", str(ROOT / file))]
        command = ["docker", "compose", "-p", PROJECT, "--project-directory", str(ROOT)]
        return _run([*command, *files, *arguments], self._environment, limit_s)

    def build(self) -> float:
        """Build both images; seconds. One after the other, so that nothing is built twice."""
        start_s = time.monotonic()
        for service in ("gateway", "worker"):
            self.compose("build", service, limit_s=BUILD_LIMIT_S)
        self.compose("build", limit_s=BUILD_LIMIT_S)
        return time.monotonic() - start_s

    def up(self, workers: int) -> float:
        """Start what is missing and wait until all is healthy; seconds. Nothing is recreated."""
        start_s = time.monotonic()
        self.compose("up", "-d", "--wait", "--no-build", "--no-recreate", *_scale(workers))
        return time.monotonic() - start_s

    def down(self) -> float:
        """Remove containers, network and volumes; seconds."""
        start_s = time.monotonic()
        self.compose("down", "-v", "--remove-orphans")
        return time.monotonic() - start_s

    def containers(self) -> list[dict[str, Any]]:
        """Those of the project, as `docker compose ps --all` describes them."""
        lines = self.compose("ps", "--all", "--format", "json").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def collector_url(self) -> str:
        """Where the collected spans are read."""
        return "http://" + self.compose("port", "collector", "4318").strip()

    def image_megabytes(self) -> dict[str, float]:
        """Sizes of the images of the mesh, with what they share counted in each."""
        sizes = {}
        for name in ("tranche:services", "tranche:cpu"):
            command = ["docker", "image", "inspect", name, "--format", "{{.Size}}"]
            sizes[name] = round(int(_run(command, self._environment, 30)) / 1e6, 1)
        return sizes


def _scale(workers: int) -> tuple[str, str]:
    return "--scale", f"worker={workers}"


def _run(command: Sequence[str], environment: dict[str, str], limit_s: float) -> str:
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-4000:]
        raise CommandFailed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port
