"""Thousands of broken requests: never a 5xx, always a clear error, and the gateway goes on."""

import copy
import errno
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ensure_resource_availability,
    response_schema_conformance,
    status_code_conformance,
    use_after_free,
)

from tests.api.conftest import LiveGateway

CASES = 2000
SCHEMA_EXAMPLES = int(os.environ.get("TRANCHE_FUZZ_EXAMPLES", "40"))
"""Of each operation; hundreds are for a run of their own (docs/security.md)."""
SEQUENCES = max(8, SCHEMA_EXAMPLES // 5)
STEPS = 6
CUT_OFF = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
"""What a client sees of a connection that the server has closed: which one depends on when."""
ANSWER_S = 60
"""A chat without max_tokens may fill the context."""
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 1.5, -0.0, 1e308, 5e-324),
    *("", " ", "x", "\u0000", "\ufffd", "😀" * 50, "a" * 10_000, "\u202e", "NaN", "1", "null"),
    *([], {}, [[]], [None], [[None]], {"": None}, [1, "a"], ["a", 1], [[1], "a"], [1.5], [[[1]]]),
    *([-1], [2**40], ["x"] * 70, {"type": "json_schema"}, {"1": 1e300}, {"-1": 1}, {"1.0": 1}),
]
COMPLETION = {"model": "demo_model", "prompt": "x", "max_tokens": 2}
CHAT = {
    "model": "demo_model",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 2,
}
FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "n", "echo"),
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("stop", "user", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
    *("stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "logprobs"),
    *("allowed_token_ids", "truncate_prompt_tokens", "priority", "request_id", "best_of"),
    "predicted_output_tokens",
    *("return_token_ids", "tools", "tool_choice", "response_format", "prompt_logprobs"),
    *("stream_options", "suffix", "top_logprobs", "add_generation_prompt", "modalities"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
)


@pytest.fixture(scope="module")
def raw(live_gateway: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_gateway.base_url, timeout=30.0) as client:
        yield client


def mutated(chance: random.Random) -> tuple[str, bytes]:
    """A path and a body with something wrong, or merely strange, in it."""
    path, body = chance.choice([("/completions", COMPLETION), ("/chat/completions", CHAT)])
    content: Any = copy.deepcopy(body)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        content[chance.choice(FIELDS)] = copy.deepcopy(chance.choice(STRANGE))
    if path.startswith("/chat") and chance.random() < 0.5:
        content["messages"] = [
            {
                chance.choice(["role", "content", "name", "tool_calls", "x"]): chance.choice(
                    [*STRANGE, "user", "assistant"]
                )
                for _ in range(3)
            }
        ]
    data = json.dumps(content).encode()
    kind = chance.random()
    if kind < 0.15:
        place = chance.randrange(len(data))
        data = data[:place] + chance.randbytes(chance.randint(1, 4)) + data[place + 1 :]
    elif kind < 0.25:
        data = data[: chance.randrange(len(data))]
    elif kind < 0.3:
        data = data.replace(b"{", b'{"prompt": "y", "model": 1,', 1)
    return path, data


def test_mutations(raw: httpx.Client) -> None:
    chance = random.Random(20_240_607)
    statuses: dict[int, int] = {}
    for number in range(CASES):
        path, data = mutated(chance)
        answer = raw.post(path, content=data, headers={"content-type": "application/json"})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (number, data, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], (number, data)
    assert statuses[400] > CASES // 2
    assert raw.post("/completions", json=COMPLETION).status_code == 200


def test_broken_http(live_gateway: LiveGateway) -> None:
    """Requests that are no HTTP: the connection is refused or closed, and nothing else happens."""
    url = httpx.URL(live_gateway.base_url)
    chance = random.Random(1)
    lines = [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
        *(chance.randbytes(200) + b"\r\n\r\n" for _ in range(20)),
    ]
    for line in lines:
        with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
            try:
                connection.sendall(line)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65_536)
            except OSError as error:  # it was refused before all of it was sent
                if error.errno not in CUT_OFF:
                    raise
                answer = b""
        assert not answer.startswith(b"HTTP/1.1 5"), (line[:80], answer[:200])
    assert httpx.get(f"{live_gateway.base_url}/models").status_code == 200


def test_space_around_a_limit_is_no_part_of_it(live_gateway: LiveGateway) -> None:
    """RFC 9110, 5.5; httpx sends no such header, some proxies do."""
    url = httpx.URL(live_gateway.base_url)
    body = json.dumps(COMPLETION).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
        b"connection: close\r\nx-tranche-deadline-ms: \t60000\t \r\n"
        b"content-length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection((url.host, url.port or 80), timeout=ANSWER_S) as connection:
        connection.sendall(head + body)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
CHECKS += [response_schema_conformance]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_schema_of_the_api(live_gateway: LiveGateway, mode: GenerationMode) -> None:
    """schemathesis: what the OpenAPI document allows, and what it forbids."""
    root = live_gateway.base_url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
    tested, statuses = 0, set[int]()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to get wrong
        tested += 1

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=SCHEMA_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                case.body["model"] = "demo_model"  # else all would end at the unknown model
            answer = case.call_and_validate(checks=CHECKS, timeout=ANSWER_S)
            statuses.add(answer.status_code)

        check()
    assert tested >= 2
    assert 400 in statuses
    assert mode is GenerationMode.NEGATIVE or 200 in statuses


def test_sequences_of_calls(live_gateway: LiveGateway) -> None:
    """schemathesis: along the document's links, each call made of what the last one answered."""
    root = live_gateway.base_url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
    called: Counter[tuple[str, int]] = Counter()

    class Client(schema.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            if isinstance(case.body, dict):
                case.body["model"] = "demo_model"
            return {"timeout": ANSWER_S}

        def validate_response(
            self, response: schemathesis.Response, case: schemathesis.Case, **_: Any
        ) -> None:
            called[case.operation.label, response.status_code] += 1
            checks = [*CHECKS, use_after_free, ensure_resource_availability]
            case.validate_response(response, checks=checks)

    Client.run(
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
    )
    good = {operation for operation, status in called if status == 200}
    assert good >= {
        "GET /v1/models",
        "GET /v1/models/{model_id}",
        "POST /v1/completions",
        "POST /v1/chat/completions",
    }, called
    assert not [status for _, status in called if status >= 500]
