"""What is watched while the swarm runs: CPU and memory of every process, and the queues."""

import time
from collections.abc import Sequence

import msgspec
import psutil  # type: ignore[import-untyped]

from bench.swarm.load import Counts
from bench.swarm.mesh import SwarmMesh

QUEUE_DIGITS = 3
"""`tranche.worker.<boot>` counts as `tranche.worker`."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at everything."""

    at_s: float
    """Monotonic."""
    cpu_s: dict[str, list[float]]
    """Stage to CPU seconds of each of its processes so far."""
    rss_mb: dict[str, float]
    """Stage to resident memory, summed."""
    queues: dict[str, int]
    """Messages in the queues of one base name: ready, and delivered but not acknowledged."""
    counts: Counts


def look(mesh: SwarmMesh, counts: Counts) -> Sample:
    """A sample now."""
    return Sample(
        at_s=time.monotonic(),
        cpu_s={stage: [_cpu_s(p) for p in ones] for stage, ones in mesh.stages.items()},
        rss_mb={
            stage: sum(p.memory_info().rss for p in ones) / 1e6
            for stage, ones in mesh.stages.items()
        },
        queues=_queues(mesh),
        counts=counts,
    )


def slope_per_minute(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through (seconds, value), by least squares."""
    if len(points) < 2:
        return 0.0
    mean_t = sum(t for t, _ in points) / len(points)
    mean_v = sum(v for _, v in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return 60 * sum((t - mean_t) * (v - mean_v) for t, v in points) / spread if spread else 0.0


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _queues(mesh: SwarmMesh) -> dict[str, int]:
    """By the management interface, whose figures are up to 5 s old."""
    listed = mesh.management.call("GET", "/api/queues?columns=name,messages")
    assert isinstance(listed, list)
    lengths: dict[str, int] = {}
    for queue in listed:
        name = ".".join(str(queue["name"]).split(".")[:2])
        lengths[name] = lengths.get(name, 0) + int(queue.get("messages", 0))
    return lengths
