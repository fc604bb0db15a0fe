"""The worker's spans: each request's slice in its own trace, and one span per batch with links.

A closed slice's times come from the engine's monotonic measurements, laid onto the wall clock from
the moment when its order was received. A leased request has one span for as long as it is here,
whatever the number of its leases; its times are those of the reports.
"""

from dataclasses import dataclass

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


@dataclass(slots=True)
class _Placement:
    """A traced leased request; times are wall clock."""

    order: SliceOrder
    batch_id: str
    received_s: float
    first_s: float = 0.0


class LeaseSpans:
    """Spans of leased requests, from order to end."""

    def __init__(self, tracer: Tracer, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker
        self._open: dict[str, _Placement] = {}

    def began(self, order: RunSlice, now_s: float) -> None:
        """The worker took these in."""
        for share in order.orders:
            if share.spec.trace:
                placement = _Placement(share, order.batch_id, now_s)
                self._open[share.spec.request_id] = placement

    def forget(self, request_id: str) -> None:
        """It was cancelled: no end will be told."""
        self._open.pop(request_id, None)

    def refused(self, batch_id: str) -> None:
        """None of this order ran."""
        self._open = {
            name: placement
            for name, placement in self._open.items()
            if placement.batch_id != batch_id
        }

    def told(self, done: SliceDone, now_s: float) -> None:
        """Reports of an iteration: first tokens, and ends, which are recorded."""
        for result in done.results:
            placement = self._open.get(result.request_id)
            if placement is None or placement.order.attempt != result.attempt:
                continue
            placement.first_s = placement.first_s or now_s
            if not result.resident:
                del self._open[result.request_id]
                self._record(placement, result, now_s)

    def _record(self, placement: _Placement, result: SliceResult, now_s: float) -> None:
        order = placement.order
        begin = count(order.tokens)
        attributes: dict[str, AttributeValue] = {
            "tranche.worker": self._worker,
            "tranche.batch_id": placement.batch_id,
            "tranche.request_id": result.request_id,
            "tranche.attempt": result.attempt,
            "tranche.position": begin,
            "tranche.tokens": result.position + count(result.tokens) - begin,
            "tranche.input_tokens": count(order.spec.prompt) + begin,
        }
        if result.finish_reason:
            attributes["gen_ai.response.finish_reasons"] = (result.finish_reason,)
        own = record_span(
            self._tracer,
            "slice",
            start_s=placement.received_s,
            end_s=now_s,
            parent=order.spec.trace,
            attributes=attributes,
            kind=SpanKind.CONSUMER,
            error=result.detail if result.evicted else "",
        )
        if own:
            times = (placement.received_s, placement.first_s, now_s)
            for name, start_s, end_s in zip(("prefill", "decode"), times, times[1:], strict=False):
                record_span(self._tracer, name, start_s=start_s, end_s=end_s, parent=own)


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
