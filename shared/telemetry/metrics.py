"""Metrics: one instance of each metrics class per registry, and the buckets that all share."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

T = TypeVar("T")

MESSAGE_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""One message's publish, wait or handling: a broker on the same machine needs about 1 ms."""
LATENCY_SECONDS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
"""What a client or a slice waits: first token, whole answer, queue and pool waits."""
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
"""Time per output token, and one iteration."""
TOKEN_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
"""Prompt and output lengths, tokens of a slice."""
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1_024)
"""Requests of a batch."""

_instances: WeakKeyDictionary[CollectorRegistry, dict[type[Any], Any]] = WeakKeyDictionary()
_lock = threading.Lock()


def metrics_for(registry: CollectorRegistry, kind: Callable[[CollectorRegistry], T]) -> T:
    """The registry's one `kind(registry)`: several workers of `tranche serve` share a registry,
    and Prometheus refuses to register a name twice."""
    with _lock:
        instances = _instances.setdefault(registry, {})
        key = cast("type[Any]", kind)
        if key not in instances:
            instances[key] = kind(registry)
        return cast("T", instances[key])


class ProcessMetrics:
    """The process itself: CPU, memory, open files, garbage collection, Python version."""

    def __init__(self, registry: CollectorRegistry) -> None:
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
