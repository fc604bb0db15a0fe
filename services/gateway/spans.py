"""The root span of a generating request, with OpenTelemetry's GenAI attributes."""

from opentelemetry.trace import Span, SpanKind, Tracer
from opentelemetry.util.types import AttributeValue
from starlette.requests import Request

from services.gateway.calls import Call, Endpoint
from services.gateway.requests import ChatRequest, CompletionRequest
from shared.telemetry.tracing import close_span, open_span

OPERATIONS: dict[Endpoint, str] = {"completions": "text_completion", "chat": "chat"}
NANOSECONDS = 1_000_000_000
PATHS: dict[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}


def open_root(
    tracer: Tracer,
    request: Request,
    endpoint: Endpoint,
    body: CompletionRequest | ChatRequest,
    start_s: float,
) -> Span:
    """The span of the whole request; the client's own trace goes on in it."""
    attributes: dict[str, AttributeValue] = {
        "http.request.method": "POST",
        "http.route": PATHS[endpoint],
        "url.path": PATHS[endpoint],
        "gen_ai.operation.name": OPERATIONS[endpoint],
        "gen_ai.provider.name": "tranche",
        "gen_ai.request.model": body.model,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.choice.count": body.n,
        "gen_ai.request.stream": body.stream,
        "gen_ai.request.frequency_penalty": body.frequency_penalty,
        "gen_ai.request.presence_penalty": body.presence_penalty,
    }
    if body.top_k > 0:
        attributes["gen_ai.request.top_k"] = body.top_k
    if body.seed is not None:
        attributes["gen_ai.request.seed"] = body.seed
    return open_span(
        tracer,
        f"POST {PATHS[endpoint]}",
        start_s=start_s,
        parent=request.headers.get("traceparent", ""),
        attributes=attributes,
        kind=SpanKind.SERVER,
    )


def close_root(span: Span, call: Call, status: int, start_s: float, end_s: float) -> None:
    """The answer is over; `start_s` and `end_s` are wall-clock seconds. What was predicted stands
    beside what came: `time_to_first_chunk` and the span's own end."""
    if not span.is_recording():
        return
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("gen_ai.response.id", call.answer_id)
    span.set_attribute("gen_ai.response.model", call.model)
    span.set_attribute("tranche.request_id", call.call_id)
    span.set_attribute("tranche.tenant", call.tenant)
    if call.choices:
        span.set_attribute("gen_ai.request.max_tokens", call.choices[0].spec.max_tokens)
        span.set_attribute("gen_ai.usage.input_tokens", call.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", call.output_tokens)
        reasons = [choice.transcript.finish_reason or "cancelled" for choice in call.choices]
        span.set_attribute("gen_ai.response.finish_reasons", reasons)
    if call.promise is not None:
        start_s, finish_s = (at - call.received_at for at in call.promise)
        span.set_attribute("tranche.predicted_start_s", start_s)
        span.set_attribute("tranche.predicted_finish_s", finish_s)
    firsts = [c.first_token_at for c in call.choices if c.first_token_at is not None]
    if firsts:
        first_s = min(firsts) - call.received_at
        span.set_attribute("gen_ai.response.time_to_first_chunk", first_s)
        span.add_event("first token", timestamp=int((start_s + first_s) * NANOSECONDS))
    error = call.error
    if error is not None:
        span.set_attribute("error.type", error.code)
    failed = error.message if error is not None else f"HTTP {status}" if status >= 500 else ""
    close_span(span, end_s=end_s, error=failed)
