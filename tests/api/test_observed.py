"""What a gateway tells about itself: metrics, spans, logs, and what it orders from the mesh."""

import asyncio
import dataclasses
import json

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.gateway.settings import GatewaySettings
from shared.messages import Cancel, Sampling, Submit
from shared.telemetry.setup import Telemetry, start
from shared.tokens import unpack
from tests.api.conftest import Stage, staged

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
ALIAS = {"model_name": "demo_model", "engine": "0"}


async def ended(stage: Stage, count: float) -> None:
    """Waits until so many choices are accounted for: that happens after the last byte is out."""
    async with asyncio.timeout(10):
        while (
            sum(
                stage.metric("tranche_gateway_finished_requests_total", reason=reason)
                for reason in ("stop", "length", "cancelled")
            )
            < count
        ):
            await asyncio.sleep(0.01)


async def test_metrics_under_both_names(stage: Stage) -> None:
    usage = (await stage.complete(n=2, max_tokens=8, ignore_eos=True)).json()["usage"]
    await stage.complete(stream=True, max_tokens=4, ignore_eos=True)
    await ended(stage, 3)
    both = [
        ("tranche_gateway_output_tokens_total", {"tenant": "default"}, 20),
        ("vllm:generation_tokens_total", ALIAS, 20),
        ("tranche_gateway_prompt_tokens_total", {"tenant": "default"}, 2 * usage["prompt_tokens"]),
        ("vllm:prompt_tokens_total", ALIAS, 2 * usage["prompt_tokens"]),
        ("tranche_gateway_finished_requests_total", {"reason": "length"}, 3),
        ("vllm:request_success_total", {**ALIAS, "finished_reason": "length"}, 3),
        ("tranche_gateway_time_to_first_token_seconds_count", {"endpoint": "completions"}, 3),
        ("vllm:time_to_first_token_seconds_count", ALIAS, 3),
        ("tranche_gateway_request_seconds_count", {"endpoint": "completions"}, 3),
        ("vllm:e2e_request_latency_seconds_count", ALIAS, 3),
        ("tranche_gateway_time_per_output_token_seconds_count", {"endpoint": "completions"}, 3),
        ("vllm:request_time_per_output_token_seconds_count", ALIAS, 3),
        ("tranche_gateway_inter_token_seconds_count", {}, 5),
        ("vllm:inter_token_latency_seconds_count", ALIAS, 5),
        ("tranche_gateway_request_output_tokens_sum", {}, 20),
        ("vllm:request_generation_tokens_sum", ALIAS, 20),
        ("vllm:request_prompt_tokens_count", ALIAS, 3),
        ("vllm:request_params_n_sum", ALIAS, 3),
        ("vllm:request_params_max_tokens_sum", ALIAS, 12),
        ("vllm:request_max_num_generation_tokens_sum", ALIAS, 12),
        ("tranche_gateway_token_batches_total", {}, 8),
        ("tranche_gateway_token_runs_total", {"verdict": "new"}, 8),
        (
            "tranche_gateway_http_requests_total",
            {"route": "/v1/completions", "status": "200"},
            2,
        ),
    ]
    for name, labels, expected in both:
        assert stage.metric(name, **labels) == expected, name
    assert stage.metric("tranche_gateway_open_requests") == 0
    assert stage.metric("tranche_gateway_open_streams") == 0


async def test_unknown_paths_share_one_label(stage: Stage) -> None:
    for n in range(5):
        await stage.client.get(f"/nothing/{n}")
    labels = {"route": "other", "status": "404"}
    assert stage.metric("tranche_gateway_http_requests_total", **labels) == 5


async def test_errors_are_counted_by_code(stage: Stage) -> None:
    await stage.complete(temperature=9)
    await stage.complete(model="another")
    assert stage.metric("tranche_gateway_errors_total", kind="invalid_value") == 1
    assert stage.metric("tranche_gateway_errors_total", kind="model_not_found") == 1


def traced() -> tuple[Telemetry, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = start(GatewaySettings(log_level="error"), "gateway-test")
    return dataclasses.replace(telemetry, tracer=provider.get_tracer("test")), exporter


async def spans_of(exporter: InMemorySpanExporter, name: str, count: int = 1) -> list[ReadableSpan]:
    async with asyncio.timeout(10):
        while True:
            found = [span for span in exporter.get_finished_spans() if span.name == name]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.01)


async def test_one_trace_from_the_client_to_the_mesh_and_back() -> None:
    telemetry, exporter = traced()
    async with staged(telemetry=telemetry) as stage:
        body = {"model": "demo_model", "prompt": "ROMEO:", "max_tokens": 9, "ignore_eos": True}
        headers = {"traceparent": PARENT}
        await stage.client.post("/v1/completions", json={**body, "top_k": 5}, headers=headers)
        (root,) = await spans_of(exporter, "POST /v1/completions")
        assert root.context is not None
        assert f"{root.context.trace_id:032x}" == TRACE
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == "00f067aa0ba902b7"
        assert root.kind.name == "SERVER"
        assert root.attributes is not None
        expected = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "demo_model",
            "gen_ai.request.top_k": 5,
            "gen_ai.request.max_tokens": 9,
            "gen_ai.usage.output_tokens": 9,
            "gen_ai.response.finish_reasons": ("length",),
            "http.response.status_code": 200,
        }
        assert {key: root.attributes[key] for key in expected} == expected
        assert root.attributes["gen_ai.response.time_to_first_chunk"] > 0  # type: ignore[operator]
        assert [event.name for event in root.events] == ["first token"]
        first, last = await spans_of(exporter, "token return", 2)
        for span in (first, last):
            assert span.parent is not None
            assert span.parent.span_id == root.context.span_id
        (spec,) = stage.mesh.specs.values()
        assert spec.trace == f"00-{TRACE}-{root.context.span_id:016x}-01"


async def test_a_failure_is_on_the_span() -> None:
    telemetry, exporter = traced()
    async with staged(telemetry=telemetry) as stage:
        await stage.complete(max_tokens=5_000)
        (root,) = await spans_of(exporter, "POST /v1/completions")
        assert root.attributes is not None
        assert root.attributes["http.response.status_code"] == 400
        stage.mesh.plan = lambda spec: ()
        asking = asyncio.create_task(stage.complete())
        await stage.mesh.until_heard(Submit)
        asking.cancel()
        await stage.mesh.until_heard(Cancel)
        _, gone = await spans_of(exporter, "POST /v1/completions", 2)
        assert gone.attributes is not None
        assert gone.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)


async def test_the_order_says_all_that_was_asked(stage: Stage) -> None:
    body = {
        "model": "demo_model",
        "prompt": [[5, 6], [7]],
        "max_tokens": 11,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": -1,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"17": -100, "18": 5.5},
        "seed": 99,
        "logprobs": 2,
        "echo": True,
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [44],
        "allowed_token_ids": [44, 45],
        "priority": -2,
        "predicted_output_tokens": 500,
        "stream": True,
    }
    answer = await stage.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    specs = list(stage.mesh.specs.values())
    assert [tuple(unpack(spec.prompt)) for spec in specs] == [(5, 6), (5, 6), (7,), (7,)]
    assert [spec.choice for spec in specs] == [0, 1, 0, 1]
    assert len({spec.parent_id for spec in specs}) == 1
    assert len({spec.request_id for spec in specs}) == 4
    assert {(s.max_tokens, s.priority, s.stream, s.endpoint) for s in specs} == {
        (11, -2, True, "completions")
    }
    assert {s.predicted_output_tokens for s in specs} == {11}, "no more than may come"
    expected = Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=0,
        min_p=0.125,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={17: -100.0, 18: 5.5},
        seed=99,
        logprobs=2,
        prompt_logprobs=True,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=(44,),
        allowed_token_ids=(44, 45),
    )
    assert all(spec.sampling == expected for spec in specs)


async def test_chat_orders_the_rest_of_the_context(stage: Stage) -> None:
    body = {"model": "demo_model", "messages": [{"role": "user", "content": "Speak."}]}
    await stage.client.post("/v1/chat/completions", json={**body, "top_logprobs": 0})
    (spec,) = stage.mesh.specs.values()
    assert spec.endpoint == "chat"
    assert spec.max_tokens + len(unpack(spec.prompt)) == 2048
    assert spec.sampling.logprobs is None
    await stage.client.post(
        "/v1/chat/completions", json={**body, "logprobs": True, "truncate_prompt_tokens": 2}
    )
    second = list(stage.mesh.specs.values())[1]
    assert second.sampling.logprobs == 0
    assert len(unpack(second.prompt)) == 2


async def test_logs_name_the_request_and_never_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with staged(log_level="debug") as stage:
        body = {"model": "demo_model", "prompt": "my secret diary", "max_tokens": 3}
        headers = {"x-request-id": "find-me"}
        text = (await stage.client.post("/v1/completions", json=body, headers=headers)).json()
        await stage.client.post("/v1/completions", json={**body, "stop": ["my secret", 5]})
        await ended(stage, 1)
    logged = capsys.readouterr().err
    (line,) = [json.loads(line) for line in logged.splitlines() if "find-me" in line]
    assert line["event"] == "request"
    assert line["status"] == 200
    assert line["output_tokens"] == 3
    assert "secret" not in logged
    assert text["choices"][0]["text"] not in logged
