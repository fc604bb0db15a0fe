"""Logs: one JSON object per line (or coloured text for people), also for the libraries' own logs.

structlog hands its events to the standard library's loggers, so that the libraries' records and
ours meet in one handler with one formatter. Several services may start in one process: the handler
is installed once, and each service's logger `tranche.<service>` has its own level. No event
carries prompt text; the libraries are never let below INFO, since their debug records hold message
bodies.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from shared.config import LogFormat, LogLevel
from shared.telemetry.secrets import mask
from shared.telemetry.tracing import trace_id_of

LEVELS: Mapping[LogLevel, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
OWN_PACKAGES = ("shared", "services", "sim", "bench")
NOISY_LIBRARIES = ("uvicorn", "uvicorn.access", "uvicorn.error", "aio_pika", "aiormq")
COMPANIONS: Mapping[str, tuple[str, ...]] = {"transformers": ("huggingface_hub",)}
"""Libraries that come in with another and bring a handler of their own too."""


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now; knows the services that log here."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.services: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr
        super().emit(record)

    def name_library(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """Say who speaks, where it is no service's own logger, and whose process it is: `tranche`
        if it is several services'."""
        if "service" in event:
            return event
        event.setdefault("logger", event["_record"].name)
        if len(self.services) == 1:
            ((service, boot_id),) = self.services.items()
            event.setdefault("service", service)
            event.setdefault("boot_id", boot_id)
        event.setdefault("service", "tranche")
        return event


def configure_logs(service: str, boot_id: str, level: LogLevel, log_format: LogFormat) -> None:
    """Route this process's logs to stderr; later calls add services and set the format anew."""
    root = logging.getLogger()
    handler = next((h for h in root.handlers if isinstance(h, LineHandler)), None)
    if handler is None:
        handler = LineHandler()
        root.addHandler(handler)
        root.setLevel(logging.WARNING)
    handler.services[service] = boot_id
    handler.setFormatter(_formatter(handler, log_format))
    for own in (f"tranche.{service}", *OWN_PACKAGES):
        logging.getLogger(own).setLevel(LEVELS[level])
    if LEVELS[level] <= logging.DEBUG:
        root.setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    for library in NOISY_LIBRARIES:
        adopt_logger(library)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_SHARED, _wrap],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def adopt_logger(library: str) -> None:
    """Take a library's own handlers away, and its companions', so that their records come to ours,
    once. transformers and its hub client install handlers at import: call this afterwards."""
    for name in (library, *COMPANIONS.get(library, ())):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def service_logger(service: str, boot_id: str) -> structlog.stdlib.BoundLogger:
    """The service's logger, with `service` and `boot_id` bound."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(f"tranche.{service}")
    return logger.bind(service=service, boot_id=boot_id)


def name_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Turn a bound `trace` (a traceparent) into `trace_id`; leave it out if it is empty."""
    if "trace" in event:
        trace_id = trace_id_of(str(event.pop("trace")))
        if trace_id:
            event["trace_id"] = trace_id
    return event


def hide_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Mask passwords, keys and authorization headers in every value, tracebacks included."""
    masked = mask(event)
    assert isinstance(masked, MutableMapping)
    return masked


_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    name_trace,
)
_wrap = structlog.stdlib.ProcessorFormatter.wrap_for_formatter


def _formatter(handler: LineHandler, log_format: LogFormat) -> structlog.stdlib.ProcessorFormatter:
    renderer: Processor
    if log_format == "console":
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            handler.name_library,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            hide_secrets,
            renderer,
        ],
    )


def reset_logs() -> None:
    """Undo `configure_logs` (for tests, and for programs that embed a service)."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, LineHandler)]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def bind_request(
    log: structlog.stdlib.BoundLogger, request_id: str, trace: str = "", **more: Any
) -> structlog.stdlib.BoundLogger:
    """The logger of one request; `trace` is its traceparent."""
    return log.bind(request_id=request_id, trace=trace, **more)
