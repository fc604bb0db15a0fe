"""The scheduler's spans: wait in the request queue, wait in the pool, dispatch of a batch, and
marks where a request was refused, parked or ended; each with its reason and what was predicted."""

from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.util.types import AttributeValue

from shared.bus.api import Delivery
from shared.bus.topology import INBOX, ORDERS, SCHEDULER_QUEUE
from shared.messages import Park, Rejected, RunSlice, SliceOrder, Submit
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
                **_reasons(order),
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


def _reasons(order: SliceOrder) -> dict[str, AttributeValue]:
    """Why it waited and was placed there; what admission needed of what there was; what had been
    predicted for it. The figures are left out where nothing was."""
    why = order.why
    if why is None:
        return {}
    figures = {
        "tranche.needed_tokens": why.needed_tokens,
        "tranche.room_tokens": why.room_tokens,
        "tranche.predicted_start_s": why.start_s,
        "tranche.predicted_output_tokens": why.output_tokens,
    }
    return {
        "tranche.came": why.came,
        "tranche.waited_for": why.waited_for,
        "tranche.admitted_by": why.admitted_by,
        "tranche.overtaken": why.overtaken,
        "tranche.moved": why.moved,
        **{name: figure for name, figure in figures.items() if figure},
    }


def record_refused(tracer: Tracer, submit: Submit, answer: Rejected, now_s: float) -> None:
    """A mark in its trace: it was not taken in."""
    if not submit.spec.trace:
        return
    figures = {
        "tranche.predicted_start_s": answer.start_s,
        "tranche.predicted_finish_s": answer.finish_s,
        "tranche.retry_after_s": answer.retry_after_s,
    }
    record_span(
        tracer,
        "refused",
        start_s=now_s,
        end_s=now_s,
        parent=submit.spec.trace,
        attributes={
            "tranche.request_id": answer.request_id,
            "tranche.reason": answer.reason,
            **{name: figure for name, figure in figures.items() if figure},
        },
    )


def record_parked(tracer: Tracer, trace: str, park: Park, worker: str, now_s: float) -> None:
    """A mark in its trace: its worker was told to end its lease. `worker`: its name."""
    if not trace:
        return
    record_span(
        tracer,
        "parked",
        start_s=now_s,
        end_s=now_s,
        parent=trace,
        attributes={
            "tranche.request_id": park.request_id,
            "tranche.attempt": park.attempt,
            "tranche.reason": park.reason,
            "tranche.worker": worker,
        },
    )
