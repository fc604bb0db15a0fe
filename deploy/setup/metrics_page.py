"""docs/metrics.md, made from the metrics classes."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from services.estimator.metrics import EstimatorMetrics
from services.gateway.metrics import GatewayMetrics
from services.scheduler.metrics import SchedulerMetrics
from services.worker.metrics import WorkerMetrics
from shared.telemetry.metered_bus import BusMetrics

HEAD = """# Metrics

Made from the code by `make docs`. Histograms have Prometheus's usual suffixes. Beside these,
every service reports its process (`process_*`, `python_*`).
"""
CLASSES: dict[str, Callable[[CollectorRegistry], Any]] = {
    "Every service: its bus": BusMetrics,
    "Gateway": GatewayMetrics,
    "Scheduler": SchedulerMetrics,
    "Worker": WorkerMetrics,
    "Estimator": EstimatorMetrics,
}


def page() -> str:
    """The whole document."""
    return "\n".join([HEAD, *(_section(title, kind) for title, kind in CLASSES.items())])


def _section(title: str, kind: Callable[[CollectorRegistry], Any]) -> str:
    rows = []
    for collector in _collectors(kind):
        labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
        for family in collector.describe():
            meaning = " ".join(family.documentation.split())
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {labels} | {meaning} |")
    head = "| name | kind | labels | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", head, *sorted(rows), ""])


def _collectors(kind: Callable[[CollectorRegistry], Any]) -> list[Any]:
    """All that an instance registers."""
    found: list[Any] = []

    class Listening(CollectorRegistry):
        def register(self, collector: Any) -> None:
            found.append(collector)
            super().register(collector)

    kind(Listening())
    return found
