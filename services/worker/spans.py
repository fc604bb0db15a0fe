"""The worker's spans: each request's slice in its own trace, and one span per batch with links.

A slice's times come from the engine's monotonic measurements, laid onto the wall clock from the
moment when its order was received.
"""

from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.util.types import AttributeValue

from shared.messages import RunSlice, SliceDone, SliceOrder, SliceResult
from shared.telemetry.tracing import record_span
from shared.tokens import count


def record_slice(
    tracer: Tracer, worker: str, order: RunSlice, done: SliceDone, received_s: float
) -> None:
    """Record the spans of one ended batch. `received_s`: wall clock; `worker`: its name."""
    results = {(r.request_id, r.attempt): r for r in done.results}
    traces = []
    for share in order.orders:
        result = results.get((share.spec.request_id, share.attempt))
        if share.spec.trace and result is not None:
            traces.append(share.spec.trace)
            _record_request(tracer, worker, share, result, done, received_s)
    if traces:
        times = _times(done, received_s)
        record_span(
            tracer,
            "batch",
            start_s=times[1],
            end_s=times[3],
            links=traces,
            attributes={**_about(worker, done), "tranche.traced_requests": len(traces)},
        )


def _record_request(
    tracer: Tracer,
    worker: str,
    share: SliceOrder,
    result: SliceResult,
    done: SliceDone,
    received_s: float,
) -> None:
    received, started, prefilled, ended = _times(done, received_s)
    attributes: dict[str, AttributeValue] = {
        **_about(worker, done),
        "tranche.request_id": result.request_id,
        "tranche.attempt": result.attempt,
        "tranche.position": result.position,
        "tranche.tokens": count(result.tokens),
        "tranche.input_tokens": count(share.spec.prompt) + count(share.tokens),
    }
    if result.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = (result.finish_reason,)
    own = record_span(
        tracer,
        "slice",
        start_s=received,
        end_s=ended,
        parent=share.spec.trace,
        attributes=attributes,
        kind=SpanKind.CONSUMER,
        error=result.detail if result.finish_reason == "error" else "",
    )
    if not own:
        return
    parts = (
        ("worker queue", received, started),
        ("prefill", started, prefilled),
        ("decode", prefilled, ended),
    )
    for name, start_s, end_s in parts:
        record_span(tracer, name, start_s=start_s, end_s=end_s, parent=own)


def _times(done: SliceDone, received_s: float) -> tuple[float, float, float, float]:
    """Received, started, prefilled, ended."""
    started = received_s + done.timings.queue_s
    prefilled = started + done.timings.prefill_s
    return received_s, started, prefilled, prefilled + done.timings.decode_s


def _about(worker: str, done: SliceDone) -> dict[str, AttributeValue]:
    return {
        "tranche.worker": worker,
        "tranche.batch_id": done.batch_id,
        "tranche.batch_size": done.timings.batch_size,
        "tranche.iterations": done.timings.iterations,
        "messaging.batch.message_count": done.timings.batch_size,
    }
