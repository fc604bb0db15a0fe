"""Traces: finished spans with explicit times, and W3C traceparents as the only thing passed on.

A request crosses four processes and waits most of its life, so no service keeps a live span for
what another one does. A service notes the times and records the span when it is over. Parents,
links and message headers are traceparent strings; an empty one means: not sampled.
"""

from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from shared.bus.identity import public_id

TRACEPARENT = "traceparent"
_NANOSECONDS = 1_000_000_000
_propagator = TraceContextTextMapPropagator()


def record_span(
    tracer: Tracer,
    name: str,
    *,
    start_s: float,
    end_s: float,
    parent: str = "",
    links: Sequence[str] = (),
    attributes: Mapping[str, AttributeValue] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    error: str = "",
) -> str:
    """Record a finished span; return its own traceparent, or "" where nothing was recorded.

    `start_s`, `end_s`: wall-clock seconds (`time.time()`). `parent`, `links`: traceparents; empty
    and malformed links are left out. `error`: why the work failed; it sets the span's status.

    Only a SERVER span may begin a trace: any other one without a parent and without a link belongs
    to requests that are not sampled, and is left out.
    """
    known_links = [Link(context) for link in links if (context := _span_context(link)).is_valid]
    if kind is not SpanKind.SERVER and not known_links and not _span_context(parent).is_valid:
        return ""
    span = open_span(
        tracer,
        name,
        start_s=start_s,
        parent=parent,
        links=known_links,
        attributes=attributes,
        kind=kind,
    )
    if not span.is_recording():
        return ""
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(end_time=_nanoseconds(max(start_s, end_s)))
    return traceparent_of(span)


def open_span(
    tracer: Tracer,
    name: str,
    *,
    start_s: float,
    parent: str = "",
    links: Sequence[Link] = (),
    attributes: Mapping[str, AttributeValue] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Span:
    """A span that the caller ends (`close_span`): for the request's root, whose traceparent
    travels with the request before it is over."""
    return tracer.start_span(
        name,
        context=context_of(parent),
        kind=kind,
        attributes={name: _shown(value) for name, value in (attributes or {}).items()},
        links=links,
        start_time=_nanoseconds(start_s),
    )


def close_span(span: Span, *, end_s: float, error: str = "") -> None:
    """End a span of `open_span` at `end_s` wall-clock seconds; a second call does nothing."""
    if not span.is_recording():
        return
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(end_time=_nanoseconds(end_s))


def traceparent_of(span: Span) -> str:
    """The span's W3C traceparent; "" if it is not sampled."""
    context = span.get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def headers_for(traceparent: str) -> dict[str, str]:
    """Message headers that carry the trace on; {} if there is none."""
    return {TRACEPARENT: traceparent} if traceparent else {}


def trace_id_of(traceparent: str) -> str:
    """The 32 hexadecimal digits of the trace; "" if the traceparent is empty or malformed."""
    context = _span_context(traceparent)
    return f"{context.trace_id:032x}" if context.is_valid else ""


def context_of(traceparent: str) -> Context:
    """An OpenTelemetry context with this parent; a context without a span if there is none.

    It never looks at the ambient context: parents are always explicit here.
    """
    return _propagator.extract(headers_for(traceparent), context=Context())


def _shown(value: AttributeValue) -> AttributeValue:
    return public_id(value) if isinstance(value, str) else value


def _span_context(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(context_of(traceparent)).get_span_context()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)
