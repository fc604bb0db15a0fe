"""The spans of a slice: in each request's own trace, and one per batch with links to them."""

import pytest
from msgspec.structs import replace as changed
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from services.worker.spans import LeaseSpans, record_slice
from shared.messages import SliceDone, SliceResult, SliceTimings, WorkerMemory
from shared.tokens import pack
from tests.worker.orders import make_batch, make_order, make_spec

TRACES = {name: f"00-{digit * 32}-{digit * 16}-01" for name, digit in (("a", "1"), ("b", "2"))}


def test_spans_of_a_batch() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    orders = [
        make_order(make_spec("a", trace=TRACES["a"]), 4, output=[1, 2], attempt=3),
        make_order(make_spec("b", trace=TRACES["b"]), 4),
        make_order(make_spec("untraced"), 4),
    ]
    done = SliceDone(
        epoch=1,
        worker="worker-1",
        batch_id="b1",
        form="closed",
        results=(
            SliceResult(request_id="a", attempt=3, position=2, tokens=pack([5, 6])),
            SliceResult(
                request_id="b", attempt=1, position=0, finish_reason="error", detail="broken"
            ),
            SliceResult(request_id="untraced", attempt=1, position=0),
        ),
        timings=SliceTimings(queue_s=1.0, prefill_s=2.0, decode_s=4.0, iterations=2, batch_size=3),
        memory=WorkerMemory(kv_tokens_capacity=1),
    )
    record_slice(provider.get_tracer("test"), "w", make_batch(*orders), done, received_s=100.0)
    spans = exporter.get_finished_spans()
    assert sorted(span.name for span in spans) == sorted(
        ["slice", "worker queue", "prefill", "decode"] * 2 + ["batch"]
    )
    first = next(s for s in spans if s.name == "slice" and trace_of(s) == "1" * 32)
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == "1" * 16
    assert times(first) == (100.0, 107.0)
    attributes = first.attributes or {}
    assert attributes["tranche.worker"] == "w"
    assert attributes["tranche.batch_size"] == 3
    assert attributes["tranche.tokens"] == 2
    assert attributes["tranche.attempt"] == 3
    assert attributes["tranche.position"] == 2
    assert attributes["tranche.input_tokens"] == 5
    parts = [s for s in spans if s.parent and s.parent.span_id == first.context.span_id]
    assert {s.name: times(s) for s in parts} == {
        "worker queue": (100.0, 101.0),
        "prefill": (101.0, 103.0),
        "decode": (103.0, 107.0),
    }
    second = next(s for s in spans if s.name == "slice" and trace_of(s) == "2" * 32)
    assert second.status.status_code is StatusCode.ERROR
    batch = next(s for s in spans if s.name == "batch")
    assert sorted(f"{link.context.trace_id:032x}" for link in batch.links) == ["1" * 32, "2" * 32]
    assert times(batch) == (101.0, 107.0)
    provider.shutdown()


def test_a_leased_request_has_one_span_for_all_its_leases() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = LeaseSpans(provider.get_tracer("test"), "w")
    orders = [
        make_order(make_spec("a", trace=TRACES["a"]), 4, output=[1, 2]),
        make_order(make_spec("b", trace=TRACES["b"]), 4),
        make_order(make_spec("untraced"), 4),
    ]
    spans.began(make_batch(*orders, form="leased"), 100.0)
    done = SliceDone(
        epoch=1,
        worker="worker-1",
        batch_id="",
        form="leased",
        results=(
            SliceResult(request_id="a", attempt=1, position=2, tokens=pack([5, 6]), resident=True),
            SliceResult(request_id="untraced", attempt=1, position=0, finish_reason="stop"),
        ),
        timings=SliceTimings(),
        memory=WorkerMemory(kv_tokens_capacity=1),
    )
    spans.told(done, 101.0)
    assert exporter.get_finished_spans() == ()
    end = SliceResult(
        request_id="a", attempt=1, position=4, tokens=pack([7]), evicted=True, detail="broken"
    )
    spans.forget("b")
    spans.told(changed(done, results=(end, changed(end, request_id="b"))), 103.0)
    found = exporter.get_finished_spans()
    assert {span.name: times(span) for span in found} == {
        "slice": (100.0, 103.0),
        "prefill": (100.0, 101.0),
        "decode": (101.0, 103.0),
    }
    (own,) = [span for span in found if span.name == "slice"]
    assert own.status.status_code is StatusCode.ERROR
    attributes = own.attributes or {}
    assert (attributes["tranche.position"], attributes["tranche.tokens"]) == (2, 3)
    assert attributes["tranche.input_tokens"] == 5
    provider.shutdown()


def trace_of(span: ReadableSpan) -> str:
    """The trace's id."""
    return f"{span.context.trace_id:032x}"


def times(span: ReadableSpan) -> tuple[float, float]:
    """Start and end in seconds."""
    assert span.start_time is not None
    assert span.end_time is not None
    return pytest.approx(span.start_time / 1e9), pytest.approx(span.end_time / 1e9)
