"""What every service gets at its start to be seen by: a logger, a tracer and a metrics registry."""

from dataclasses import dataclass

import structlog
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from shared.config import ServiceSettings


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One service's eyes. In `tranche serve` all services share one registry."""

    service: str
    boot_id: str
    log: structlog.stdlib.BoundLogger
    tracer: trace.Tracer
    registry: CollectorRegistry


def start(
    settings: ServiceSettings, boot_id: str, registry: CollectorRegistry | None = None
) -> Telemetry:
    """Set up logs and traces for this process and return the service's handles."""
    return Telemetry(
        service=settings.service,
        boot_id=boot_id,
        log=structlog.get_logger(service=settings.service, boot_id=boot_id),
        tracer=trace.get_tracer(f"tranche.{settings.service}"),
        registry=registry or CollectorRegistry(),
    )
