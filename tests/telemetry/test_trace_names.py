"""One request's trace through the real mesh: every wait and every slice is there, and fits."""

import json
import urllib.request
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.semconv._incubating.attributes import (
    gen_ai_attributes,
    http_attributes,
    messaging_attributes,
    url_attributes,
)
from opentelemetry.semconv.attributes import error_attributes

from tests.e2e.live_mesh import live_mesh
from tests.telemetry.otlp_receiver import OtlpReceiver, ReceivedSpan

TOKENS, SLICE_TOKENS = 20, 8
CLIENT_TRACE, CLIENT_SPAN = "5" * 32, "6" * 16
SLACK_S = 0.25
"""Between one clock's wall time and what another service measured on its monotonic one."""

Spans = list[ReceivedSpan]


@pytest.fixture(scope="module")
def trace() -> Iterator[Spans]:
    """All spans of one completion of 20 tokens in slices of 8."""
    with OtlpReceiver() as receiver:
        with live_mesh(
            policy="scls", otlp_endpoint=receiver.url, slice_tokens=SLICE_TOKENS, workers=2
        ) as mesh:
            body = {
                "model": mesh.mesh.workers[0].served_name(),
                "prompt": "ROMEO:\n",
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "temperature": 0,
            }
            request = urllib.request.Request(
                f"{mesh.url}/v1/completions",
                json.dumps(body).encode(),
                {
                    "content-type": "application/json",
                    "traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01",
                },
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == TOKENS

            def is_whole(spans: Sequence[ReceivedSpan]) -> bool:
                names = [span.name for span in spans]
                return "POST /v1/completions" in names and names.count("batch") >= 3

            receiver.wait_for(is_whole, timeout_s=20)
        yield receiver.spans()  # the mesh has ended, so its last spans are sent


def named(trace: Spans, name: str) -> Spans:
    found = [span for span in trace if span.name == name]
    return sorted(found, key=lambda span: span.start_s)


def test_the_root_goes_on_with_the_clients_trace(trace: Spans) -> None:
    (root,) = named(trace, "POST /v1/completions")
    assert (root.trace_id, root.parent_id) == (CLIENT_TRACE, CLIENT_SPAN)
    assert (root.service, root.kind, root.error) == ("tranche-gateway", "SERVER", "")
    assert root.attributes["gen_ai.usage.output_tokens"] == TOKENS
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]


def test_every_wait_and_every_slice_is_a_child_in_its_time(trace: Spans) -> None:
    (root,) = named(trace, "POST /v1/completions")
    children = [span for span in trace if span.parent_id == root.span_id]
    assert {(span.service, span.name) for span in children} >= {
        ("tranche-scheduler", "request queue"),
        ("tranche-scheduler", "pool wait"),
        ("tranche-worker", "slice"),
        ("tranche-gateway", "token return"),
    }
    for span in children:
        assert span.trace_id == CLIENT_TRACE
        assert root.start_s - SLACK_S <= span.start_s <= span.end_s
        if span.name != "slice":  # the slice's last words come after the client's last token
            assert span.end_s <= root.end_s + SLACK_S


def test_slices_make_up_the_output_and_name_their_workers(trace: Spans) -> None:
    slices = named(trace, "slice")
    assert len(slices) == len(named(trace, "pool wait")) == 3
    assert [span.attributes["tranche.position"] for span in slices] == [0, 8, 16]
    assert [span.attributes["tranche.tokens"] for span in slices] == [8, 8, 4]
    assert {span.attributes["tranche.worker"] for span in slices} <= {"worker-1", "worker-2"}
    for span in slices:
        parts = [part for part in trace if part.parent_id == span.span_id]
        assert sorted(part.name for part in parts) == ["decode", "prefill", "worker queue"]
        assert sum(part.end_s - part.start_s for part in parts) == pytest.approx(
            span.end_s - span.start_s, abs=1e-3
        )


def test_a_batch_links_to_every_requests_trace(trace: Spans) -> None:
    (root,) = named(trace, "POST /v1/completions")
    for name, service in (("batch", "tranche-worker"), ("dispatch batch", "tranche-scheduler")):
        batches = named(trace, name)
        assert len(batches) == 3
        for span in batches:
            assert span.service == service
            assert (CLIENT_TRACE, root.span_id) in span.links
            assert span.trace_id != CLIENT_TRACE


def test_attributes_are_opentelemetrys_or_ours(trace: Spans) -> None:
    modules = (
        gen_ai_attributes,
        http_attributes,
        messaging_attributes,
        url_attributes,
        error_attributes,
    )
    known = {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    used = {name for span in trace for name in span.attributes}
    assert any(name.startswith("messaging.") for name in used)
    assert {name for name in used if not name.startswith("tranche.")} <= known


def test_no_text_stands_in_any_span(trace: Spans) -> None:
    assert "ROMEO" not in repr(trace)
