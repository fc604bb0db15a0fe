"""A small mesh for runs under load: the real services and RabbitMQ, pretended workers.

Its capacity is known beforehand: each worker runs so many streams at once, each at so many tokens a
second. So the load can be a share of it, and everything stays light enough for a busy machine.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench.swarm.mesh import Plan, SwarmMesh

DEMO_MODEL = Path(__file__).parents[1] / "deploy" / "demo_model"
QUEUES = "/api/queues?columns=name,messages_ready,messages_unacknowledged"
QUEUES_S = 30.0
"""The management interface's figures are up to 5 s old."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large."""

    workers: int = 4
    running: int = 6
    """Streams of a worker at once."""
    rate: float = 8.0
    """Tokens per second of each stream when all run."""
    wait_max_s: float = 12.0
    """Longer waits are refused."""
    policy: str = "past-future"
    slice_tokens: int = 16
    constants: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole mesh."""
        return self.workers * self.running * self.rate

    def plan(self, more: Mapping[str, tuple[str, ...]] | None = None) -> Plan:
        """For `swarm_mesh`."""
        told = {
            "running_max": str(self.running),
            "wait_max_s": f"{self.wait_max_s:g}",
            "ample_slice_tokens": str(self.slice_tokens),
            **self.constants,
        }
        return Plan(
            workers=self.workers,
            processes=1,
            gateways=1,
            policy=self.policy,
            slice_tokens=self.slice_tokens,
            profile="llama-2-13b-a100",
            rate=self.rate,
            streams_per_worker=self.running,
            model=DEMO_MODEL,
            more={
                "scheduler": tuple(word for pair in told.items() for word in _set(*pair)),
                **(more or {}),
            },
        )


def _set(name: str, value: str) -> tuple[str, str]:
    return "--set", f"{name}={value}"


class Rss(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory at one moment, in MB, by stage."""

    at_s: float
    mb: dict[str, float]


def rss_now(mesh: SwarmMesh, began: float) -> Rss:
    """All processes of each stage together."""
    return Rss(
        at_s=time.monotonic() - began,
        mb={
            stage: sum(process.memory_info().rss for process in processes) / 1e6
            for stage, processes in mesh.stages.items()
        },
    )


def messages_left(mesh: SwarmMesh) -> dict[str, int]:
    """Queues that are not empty after a while for them to become so. Beats come and go: a queue
    counts only if it is never seen empty, and the one message that somebody has in hand is no
    rest: the broker takes its figures in the rhythm of the beats."""
    left: dict[str, int] = {}
    deadline = time.monotonic() + QUEUES_S
    while time.monotonic() < deadline:
        listed = mesh.management.call("GET", QUEUES)
        assert isinstance(listed, list)
        now = {str(q["name"]): _waiting(q) for q in listed}
        now.pop("tranche.epoch", None)  # one message, the epoch, is its content
        left = (
            {name: min(count, left.get(name, count)) for name, count in now.items() if count > 0}
            if not left
            else {name: min(n, now.get(name, 0)) for name, n in left.items()}
        )
        left = {name: count for name, count in left.items() if count > 0}
        if not left:
            return {}
        time.sleep(2.0)
    return left


def _waiting(queue: dict[str, Any]) -> int:
    in_hand = int(queue.get("messages_unacknowledged", 0))
    return int(queue.get("messages_ready", 0)) + max(0, in_hand - 1)


def gateway_gauge(mesh: SwarmMesh, name: str) -> float:
    """A gauge without labels, summed over gateways."""
    found = 0.0
    for url in mesh.urls:
        for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
            if line.startswith(f"{name} "):
                found += float(line.rpartition(" ")[2])
    return found
