"""What every service gets at its start to be seen by: a logger, a tracer and a metrics registry."""

import threading
from dataclasses import dataclass

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import CollectorRegistry

from shared.bus.identity import public_id
from shared.config import ServiceSettings
from shared.telemetry.logs import configure_logs, service_logger
from shared.telemetry.metrics import ProcessMetrics, metrics_for

SPAN_QUEUE_MAX = 8_192
"""Finished spans that wait for the collector; at about 1 kB each that is 8 MB. Beyond it the oldest
are dropped and the SDK warns: traces must never hold up serving."""
SPAN_BATCH = 512
EXPORT_DELAY_S = 1.0
EXPORT_TIMEOUT_S = 5.0
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One service's eyes. In `tranche serve` all services share one registry."""

    service: str
    boot_id: str
    log: structlog.stdlib.BoundLogger
    tracer: trace.Tracer
    registry: CollectorRegistry
    provider: TracerProvider | None = None
    """None: traces are off."""


def start(
    settings: ServiceSettings, boot_id: str, registry: CollectorRegistry | None = None
) -> Telemetry:
    """Set up logs and traces for this process and return the service's handles.

    May be called once per service in one process. Raises ValueError for a sample ratio
    outside 0 to 1.
    """
    configure_logs(settings.service, boot_id, settings.log_level, settings.log_format)
    if registry is None:
        registry = CollectorRegistry()
    metrics_for(registry, ProcessMetrics)
    provider = _provider(settings, boot_id) if settings.otlp_endpoint else None
    tracers: trace.TracerProvider = provider or trace.NoOpTracerProvider()
    return Telemetry(
        service=settings.service,
        boot_id=boot_id,
        log=service_logger(settings.service, boot_id),
        tracer=tracers.get_tracer(f"tranche.{settings.service}"),
        registry=registry,
        provider=provider,
    )


def stop(telemetry: Telemetry, timeout_s: float = STOP_S) -> None:
    """Send what spans are left, for at most `timeout_s`: a collector that is away must not hold up
    a shutdown. It blocks; call it after the loop or in a thread. Idempotent."""
    if telemetry.provider is None:
        return
    flushing = threading.Thread(target=telemetry.provider.shutdown, daemon=True)
    flushing.start()
    flushing.join(timeout_s)


def _provider(settings: ServiceSettings, boot_id: str) -> TracerProvider:
    """A tracer provider of this service's own: the process-wide one could bear one name only."""
    resource = Resource.create(
        {
            "service.name": f"tranche-{settings.service}",
            "service.namespace": "tranche",
            "service.instance.id": public_id(boot_id),
        }
    )
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)),
        resource=resource,
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=SPAN_QUEUE_MAX,
            max_export_batch_size=SPAN_BATCH,
            schedule_delay_millis=EXPORT_DELAY_S * 1_000,
        )
    )
    return provider
