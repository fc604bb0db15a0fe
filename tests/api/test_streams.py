"""Server-sent events, as clients rely on them."""

import json
from typing import Any

import httpx

from tests.api.conftest import Stage


def events_of(text: str) -> list[Any]:
    """The events of a stream; it must end with [DONE]."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), text
    assert lines[-1] == "data: [DONE]", text
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_completion_stream_equals_whole_answer(stage: Stage) -> None:
    whole = (await stage.complete(max_tokens=30, seed=1)).json()
    answer = await stage.complete(max_tokens=30, seed=1, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(answer.text)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == whole["choices"][0]["text"] != ""
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert {event["object"] for event in events} == {"text_completion"}
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[:-1] == [None] * (len(events) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]


async def test_chat_stream(stage: Stage) -> None:
    body = {
        "model": "demo_model",
        "messages": [{"role": "user", "content": "Speak."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer: httpx.Response = await stage.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    *events, usage = events_of(answer.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
