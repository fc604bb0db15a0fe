"""Every refusal of a single request: the right status, OpenAI's shape, and advice."""

from collections.abc import Iterator

import httpx
import pytest

from tests.api.conftest import LiveGateway

JSON = {"content-type": "application/json"}
GOOD = b'{"model": "demo_model", "prompt": "x", "max_tokens": 2}'
TOO_LARGE = 8 * 1024 * 1024 + 1
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def raw(live_gateway: LiveGateway) -> Iterator[httpx.Client]:
    base_url = live_gateway.base_url.removesuffix("/v1")
    with httpx.Client(base_url=base_url, timeout=30.0) as client:
        yield client


def check(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert len(error["message"]) > 10
    assert answer.headers["x-request-id"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\\udc00 x"}',
        b'{"a": "\xed\xa0\x80"}',
        b"\xef\xbb\xbf" + GOOD,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"n": 1' + b"0" * 5000 + b"}",
        GOOD + b"x",
        b"model=demo_model&prompt=x",
    ],
)
def test_what_is_no_json_object(raw: httpx.Client, body: bytes) -> None:
    check(raw.post(COMPLETIONS, content=body, headers=JSON), 400, "invalid_json")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "model"),
        (b'{"model": "demo_model"}', "prompt"),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": null, "prompt": "x"}', "model"),
        (b'{"model": 5, "prompt": "x"}', "model"),
        (b'{"model": "demo_model", "prompt": null}', "prompt"),
        (b'{"model": "demo_model", "prompt": "x", "n": "2"}', "n"),
        (b'{"model": "demo_model", "prompt": "x", "n": true}', "n"),
        (b'{"model": "demo_model", "prompt": "x", "n": 1.5}', "n"),
        (b'{"model": "demo_model", "prompt": "x", "stream": "yes"}', "stream"),
        (b'{"model": "demo_model", "prompt": "x", "stop": [1]}', "stop"),
        (b'{"model": "demo_model", "prompt": "x", "seed": 99999999999999999999}', "seed"),
        (b'{"model": "demo_model", "prompt": "x", "logit_bias": [1]}', "logit_bias"),
        (b'{"model": "demo_model", "prompt": "x", "stop_token_ids": [-1]}', "stop_token_ids.0"),
    ],
)
def test_what_is_of_the_wrong_type(raw: httpx.Client, body: bytes, param: str) -> None:
    answer = raw.post(COMPLETIONS, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["param"] == param
    assert f"'{param.split('.')[0]}" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_prompt_text_is_never_quoted_back(raw: httpx.Client) -> None:
    body = {"model": "demo_model", "prompt": {"secret": "my diary"}, "stop": [["my diary"]]}
    assert "diary" not in raw.post(COMPLETIONS, json=body).text


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "multipart/form-data"])
def test_other_content_types(raw: httpx.Client, content_type: str) -> None:
    answer = raw.post(COMPLETIONS, content=GOOD, headers={"content-type": content_type})
    check(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["gzip", "br", "nonsense"])
def test_compressed_bodies(raw: httpx.Client, encoding: str) -> None:
    answer = raw.post(COMPLETIONS, content=GOOD, headers={"content-encoding": encoding})
    check(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_json_in_other_words(raw: httpx.Client, content_type: str) -> None:
    answer = raw.post(COMPLETIONS, content=GOOD, headers={"content-type": content_type})
    assert answer.status_code == 200


def test_bodies_over_the_limit(raw: httpx.Client) -> None:
    announced = raw.post(COMPLETIONS, content=b" " * TOO_LARGE, headers=JSON)
    check(announced, 413, "request_too_large")

    def parts() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * 1024 * 1024

    check(raw.post(COMPLETIONS, content=parts(), headers=JSON), 413, "request_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/models/another", 404, "model_not_found"),
        ("GET", "/v1/models/%00%ff", 404, "model_not_found"),
    ],
)
def test_other_paths_and_methods(
    raw: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = raw.request(method, path, headers=JSON)
    check(answer, status, code)
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize("name", ["x-tranche-ttft-ms", "x-tranche-deadline-ms"])
@pytest.mark.parametrize("value", ["soon", "-5", "0", "1.5", "9" * 40, "", "٣"])
def test_bad_deadlines(raw: httpx.Client, name: str, value: str) -> None:
    headers = [(b"content-type", b"application/json"), (name.encode(), value.encode())]
    answer = raw.post(COMPLETIONS, content=GOOD, headers=headers)
    check(answer, 400, "invalid_value")
    assert "from 1 to 999999999" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-id.1", True), ("a" * 129, False), ("two words", False), ("<script>", False)],
)
def test_request_ids(raw: httpx.Client, given: str, kept: bool) -> None:
    answer = raw.post(COMPLETIONS, content=GOOD, headers={**JSON, "x-request-id": given})
    assert (answer.headers["x-request-id"] == given) == kept


def test_too_many_requests_in_one_call(raw: httpx.Client) -> None:
    body = {"model": "demo_model", "prompt": ["x"] * 8, "n": 9}
    check(raw.post(COMPLETIONS, json=body), 400, "invalid_value")
    body = {"model": "demo_model", "prompt": ["x"] * 65}
    check(raw.post(COMPLETIONS, json=body), 400, "invalid_value")


def test_an_endless_prompt_is_refused_before_it_is_read(raw: httpx.Client) -> None:
    body = {"model": "demo_model", "prompt": "x" * 4_000_000}
    check(raw.post(COMPLETIONS, json=body), 400, "context_length_exceeded")
    ids = {"model": "demo_model", "prompt": [5] * 100_000}
    check(raw.post(COMPLETIONS, json=ids), 400, "context_length_exceeded")


@pytest.mark.parametrize("size", [20_000, 4_000_000])
def test_a_context_error_names_the_parameter_of_its_endpoint(raw: httpx.Client, size: int) -> None:
    text = "x " * (size // 2)
    answer = raw.post(COMPLETIONS, json={"model": "demo_model", "prompt": text})
    assert answer.json()["error"]["param"] == "prompt"
    messages = [{"role": "user", "content": text}]
    answer = raw.post("/v1/chat/completions", json={"model": "demo_model", "messages": messages})
    assert answer.json()["error"]["param"] == "messages"
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_questions_beside_generation(raw: httpx.Client) -> None:
    assert raw.get("/health").json() == {"status": "ok"}
    assert raw.get("/ready").json() == {"ready": True}
    assert set(raw.get("/version").json()) == {"version"}
    assert "tranche_gateway_http_requests_total" in raw.get("/metrics").text
    assert raw.get("/openapi.json").json()["openapi"].startswith("3.")
