"""A real OTLP/HTTP collector for tests: it decodes protobuf and keeps the spans.

In a test:

    with OtlpReceiver() as receiver:
        ...                                     # otlp_endpoint=receiver.url
        spans = receiver.wait_for(lambda spans: len(spans) >= 2)

Beside a mesh of other processes or containers:

    python -m tests.telemetry.otlp_receiver --host 0.0.0.0 --port 4318

then `GET /spans` answers all spans so far as a JSON list, `DELETE /spans` forgets them.
"""

import argparse
import gzip
import json
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage, Status

SPANS_MAX = 200_000
"""About 400 MB at worst; beyond it the oldest are forgotten."""


@dataclass(frozen=True)
class ReceivedSpan:
    """One span; ids in hexadecimal, `parent_id` empty for a root, times in seconds."""

    service: str
    instance: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    error: str
    """The status message of a failed span; `error` if it has none; empty if it did not fail."""

    @property
    def ids(self) -> str:
        """Trace and span id as they stand in a traceparent; see `ids_of`."""
        return f"{self.trace_id}-{self.span_id}"


def ids_of(traceparent: str) -> str:
    """A traceparent without its version and flags, to find its span."""
    return traceparent[3:-3]


class OtlpReceiver:
    """Listens while it is entered. `url` is what `otlp_endpoint` wants."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._spans: deque[ReceivedSpan] = deque(maxlen=SPANS_MAX)
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer((host, port), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """http://host:port"""
        return f"http://{self._server.server_name}:{self._server.server_port}"

    def spans(self) -> list[ReceivedSpan]:
        """All spans so far, in order of arrival."""
        with self._changed:
            return list(self._spans)

    def wait_for(
        self, enough: Callable[[Sequence[ReceivedSpan]], bool], timeout_s: float = 10.0
    ) -> list[ReceivedSpan]:
        """The spans, once `enough` holds of them. It blocks: in a test with a loop use
        `asyncio.to_thread`. Raises TimeoutError with what had come."""
        with self._changed:
            if not self._changed.wait_for(lambda: enough(list(self._spans)), timeout_s):
                names = [f"{span.service}:{span.name}" for span in self._spans]
                raise TimeoutError(f"not enough spans after {timeout_s} s: {names}")
            return list(self._spans)

    def receive(self, body: bytes) -> None:
        """Take one export request. Raises DecodeError for bytes that are none."""
        spans = list(_decode(body))
        with self._changed:
            self._spans.extend(spans)
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget all spans."""
        with self._changed:
            self._spans.clear()

    def __enter__(self) -> "OtlpReceiver":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            match self.headers.get("content-encoding", ""):
                case "gzip":
                    body = gzip.decompress(body)
                case "deflate":
                    body = zlib.decompress(body)
            if self.path != "/v1/traces":
                self._answer(404, b"", "text/plain")
                return
            receiver.receive(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self._answer(200, answer, "application/x-protobuf")

        def do_GET(self) -> None:
            spans = json.dumps([asdict(span) for span in receiver.spans()]).encode()
            self._answer(200 if self.path == "/spans" else 404, spans, "application/json")

        def do_DELETE(self) -> None:
            receiver.clear()
            self._answer(200, b"[]", "application/json")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _decode(body: bytes) -> Sequence[ReceivedSpan]:
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    return [
        _span(span, _attributes(resource_spans.resource.attributes))
        for resource_spans in request.resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
    ]


def _span(span: SpanMessage, resource: dict[str, Any]) -> ReceivedSpan:
    failed = span.status.code == Status.STATUS_CODE_ERROR
    return ReceivedSpan(
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        name=span.name,
        kind=SpanMessage.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_s=span.start_time_unix_nano / 1e9,
        end_s=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        error=(span.status.message or "error") if failed else "",
    )


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(inner) for inner in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind)


def main() -> None:
    """Listen until interrupted."""
    parser = argparse.ArgumentParser(description="An OTLP/HTTP collector for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4318)
    arguments = parser.parse_args()
    with OtlpReceiver(arguments.host, arguments.port) as receiver:
        print(receiver.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
