"""The scheduler's spans: wait in the request queue, wait in the pool, dispatch of a batch."""

from opentelemetry.trace import SpanKind, Tracer

from shared.bus.api import Delivery
from shared.bus.topology import INBOX, ORDERS, SCHEDULER_QUEUE
from shared.messages import RunSlice, Submit
from shared.telemetry.attributes import messaging_attributes
from shared.telemetry.tracing import headers_for, record_span


def record_request_queue(tracer: Tracer, submit: Submit, delivery: Delivery) -> None:
    """From the gateway's publish to the scheduler's receipt."""
    if not submit.spec.trace:
        return
    record_span(
        tracer,
        "request queue",
        start_s=min(delivery.sent_at, delivery.received_at),
        end_s=delivery.received_at,
        parent=submit.spec.trace,
        kind=SpanKind.CONSUMER,
        attributes={
            **messaging_attributes(
                "receive",
                queue=SCHEDULER_QUEUE.name,
                exchange=INBOX,
                routing_key=delivery.routing_key,
                message_id=submit.spec.request_id,
            ),
            "tranche.request_id": submit.spec.request_id,
        },
    )


def record_dispatch(
    tracer: Tracer, run: RunSlice, worker: str, decided_s: float, now_s: float
) -> dict[str, str]:
    """Each order's wait in the pool, in its request's trace; and one producer span for the batch
    that links to all of them. Returns the headers that carry the batch's trace on.

    `worker`: its name; `decided_s`, `now_s`: wall clock, before and after the core decided.
    """
    traces = []
    for order in run.orders:
        if not order.spec.trace:
            continue
        traces.append(order.spec.trace)
        record_span(
            tracer,
            "pool wait",
            start_s=decided_s - order.pool_wait_s,
            end_s=decided_s,
            parent=order.spec.trace,
            attributes={
                "tranche.request_id": order.spec.request_id,
                "tranche.attempt": order.attempt,
                "tranche.lease_tokens": order.lease_tokens,
                "tranche.batch_id": run.batch_id,
                "tranche.worker": worker,
            },
        )
    if not traces:
        return {}
    own = record_span(
        tracer,
        "dispatch batch",
        start_s=decided_s,
        end_s=now_s,
        links=traces,
        kind=SpanKind.PRODUCER,
        attributes={
            **messaging_attributes(
                "send",
                exchange=ORDERS,
                routing_key=f"worker.{run.worker}",
                message_id=run.batch_id,
                batch_size=len(run.orders),
            ),
            "tranche.worker": worker,
            "tranche.expected_s": run.expected_s,
        },
    )
    return headers_for(own)
