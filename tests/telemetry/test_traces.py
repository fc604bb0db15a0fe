"""Spans reach a real OTLP receiver with the right ids, times, links and service names."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
from opentelemetry.semconv._incubating.attributes import messaging_attributes
from opentelemetry.trace import SpanKind

from shared.config import ServiceSettings, settings_config
from shared.telemetry import attributes, tracing
from shared.telemetry.logs import reset_logs
from shared.telemetry.setup import Telemetry, start, stop
from tests.telemetry.otlp_receiver import OtlpReceiver, ids_of

T0 = 1_790_000_000.25

Starter = Callable[..., Telemetry]


class OneSettings(ServiceSettings):
    service: ClassVar[str] = "one"
    model_config = settings_config("one")


class TwoSettings(ServiceSettings):
    service: ClassVar[str] = "two"
    model_config = settings_config("two")


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture
def started(receiver: OtlpReceiver) -> Iterator[Starter]:
    running: list[Telemetry] = []

    def begin(kind: type[ServiceSettings] = OneSettings, **overrides: object) -> Telemetry:
        settings = {"otlp_endpoint": receiver.url, **overrides}
        telemetry = start(kind(**settings), f"{kind.service}-1")  # type: ignore[arg-type]
        running.append(telemetry)
        return telemetry

    yield begin
    for telemetry in running:
        stop(telemetry)
    reset_logs()


def test_a_trace_crosses_services_of_one_process(receiver: OtlpReceiver, started: Starter) -> None:
    one, two = started(OneSettings), started(TwoSettings)
    root = tracing.record_span(
        one.tracer, "request", start_s=T0, end_s=T0 + 2, kind=SpanKind.SERVER
    )
    other = tracing.record_span(one.tracer, "request", start_s=T0, end_s=T0, kind=SpanKind.SERVER)
    carried = tracing.headers_for(root)["traceparent"]
    child = tracing.record_span(
        two.tracer,
        "slice",
        start_s=T0 + 0.5,
        end_s=T0 + 1,
        parent=carried,
        links=[root, other, "", "rubbish"],
        attributes={"worker": "w", "tokens": 8},
        error="out of memory",
    )
    stop(one)
    stop(two)
    spans = {span.ids: span for span in receiver.wait_for(lambda spans: len(spans) == 3)}
    root, other, child = ids_of(root), ids_of(other), ids_of(child)
    assert set(spans) == {root, other, child}
    assert spans[root].parent_id == ""
    assert spans[root].kind == "SERVER"
    assert spans[root].error == ""
    assert (spans[root].start_s, spans[root].end_s) == pytest.approx((T0, T0 + 2), abs=1e-6)
    assert spans[child].trace_id == spans[root].trace_id != spans[other].trace_id
    assert spans[child].parent_id == spans[root].span_id
    assert spans[child].links == tuple((spans[t].trace_id, spans[t].span_id) for t in (root, other))
    assert spans[child].attributes == {"worker": "w", "tokens": 8}
    assert spans[child].error == "out of memory"
    assert (spans[root].service, spans[child].service) == ("tranche-one", "tranche-two")
    assert (spans[root].instance, spans[child].instance) == ("one-1", "two-1")


def test_a_root_that_stays_open_and_a_clients_parent(
    receiver: OtlpReceiver, started: Starter
) -> None:
    telemetry = started()
    client = f"00-{'a' * 32}-{'b' * 16}-01"
    span = tracing.open_span(
        telemetry.tracer, "request", start_s=T0, parent=client, kind=SpanKind.SERVER
    )
    carried = tracing.traceparent_of(span)
    assert tracing.trace_id_of(carried) == "a" * 32
    tracing.record_span(telemetry.tracer, "wait", start_s=T0, end_s=T0 + 1, parent=carried)
    tracing.close_span(span, end_s=T0 + 3)
    tracing.close_span(span, end_s=T0 + 9)
    stop(telemetry)
    spans = {span.name: span for span in receiver.wait_for(lambda spans: len(spans) == 2)}
    assert spans["request"].parent_id == "b" * 16
    assert spans["request"].end_s == pytest.approx(T0 + 3, abs=1e-6)
    assert spans["wait"].parent_id == spans["request"].span_id


def test_an_end_before_the_start_is_no_negative_time(
    receiver: OtlpReceiver, started: Starter
) -> None:
    telemetry = started()
    tracing.record_span(
        telemetry.tracer, "odd clocks", start_s=T0, end_s=T0 - 5, kind=SpanKind.SERVER
    )
    stop(telemetry)
    (span,) = receiver.wait_for(lambda spans: len(spans) == 1)
    assert span.end_s == span.start_s


@pytest.mark.parametrize("parent", ["", "rubbish", f"00-{'a' * 32}-{'b' * 16}-00"])
def test_nothing_of_a_request_that_is_not_sampled(
    receiver: OtlpReceiver, started: Starter, parent: str
) -> None:
    """A client's `not sampled` holds everywhere; a service in the middle begins no trace."""
    telemetry = started(trace_sample_ratio=1.0)
    assert (
        tracing.record_span(
            telemetry.tracer, "slice", start_s=T0, end_s=T0, parent=parent, links=["", "nonsense"]
        )
        == ""
    )
    marker = tracing.record_span(
        telemetry.tracer, "marker", start_s=T0, end_s=T0, kind=SpanKind.SERVER
    )
    stop(telemetry)
    assert [s.ids for s in receiver.wait_for(lambda spans: len(spans) > 0)] == [ids_of(marker)]


def test_the_ratio_decides_about_roots(receiver: OtlpReceiver, started: Starter) -> None:
    telemetry = started(trace_sample_ratio=0.25)
    kept = [
        tracing.record_span(telemetry.tracer, "request", start_s=T0, end_s=T0, kind=SpanKind.SERVER)
        for _ in range(400)
    ]
    sampled = [traceparent for traceparent in kept if traceparent]
    assert 40 < len(sampled) < 180  # 100 expected; beyond 7 standard deviations on both sides
    stop(telemetry)
    received = receiver.wait_for(lambda spans: len(spans) >= len(sampled))
    assert {span.ids for span in received} == {ids_of(s) for s in sampled}


def test_off_without_an_endpoint() -> None:
    telemetry = start(OneSettings(), "one-1")
    assert telemetry.provider is None
    assert (
        tracing.record_span(
            telemetry.tracer,
            "request",
            start_s=T0,
            end_s=T0,
            parent=f"00-{'a' * 32}-{'b' * 16}-01",
            kind=SpanKind.SERVER,
        )
        == ""
    )
    assert tracing.headers_for("") == {}
    stop(telemetry)
    reset_logs()


def test_a_collector_that_hangs_does_not_hold_up_the_end(started: Starter) -> None:
    released = threading.Event()

    class Hanging(OtlpReceiver):
        def receive(self, body: bytes) -> None:
            released.wait(20)

    with Hanging() as hanging:
        telemetry = started(otlp_endpoint=hanging.url)
        tracing.record_span(telemetry.tracer, "request", start_s=T0, end_s=T0, kind=SpanKind.SERVER)
        began = time.monotonic()
        stop(telemetry, timeout_s=0.2)
        assert time.monotonic() - began < 2
        released.set()


def test_the_receivers_list_over_http(receiver: OtlpReceiver, started: Starter) -> None:
    telemetry = started()
    tracing.record_span(telemetry.tracer, "request", start_s=T0, end_s=T0, kind=SpanKind.SERVER)
    stop(telemetry)
    receiver.wait_for(lambda spans: len(spans) == 1)
    with urllib.request.urlopen(f"{receiver.url}/spans") as answer:
        (span,) = json.load(answer)
    assert (span["name"], span["service"]) == ("request", "tranche-one")


def test_attribute_names_are_opentelemetrys() -> None:
    known = {
        value
        for name, value in vars(messaging_attributes).items()
        if name.isupper() and isinstance(value, str)
    }
    ours = attributes.messaging_attributes(
        "process",
        queue="q",
        exchange="e",
        routing_key="k",
        message_id="m",
        batch_size=2,
        body_bytes=3,
    )
    assert len(ours) == 8
    assert set(ours) <= known
    assert ours["messaging.destination.name"] == "e:k:q"
    operations = {value.value for value in messaging_attributes.MessagingOperationTypeValues}
    assert {"send", "receive", "process", "settle"} <= operations


def test_unknown_attributes_are_left_out() -> None:
    assert attributes.messaging_attributes("send", exchange="e") == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": "e",
    }
