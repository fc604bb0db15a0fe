"""The official `openai` client against a live gateway.

Nothing here knows what the gateway's model says: the same calls run against a scripted mesh and
against a real one (override the `live_gateway` fixture).
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api.conftest import LiveGateway

PROMPT = "ROMEO:\n"
CHAT: list[Any] = [{"role": "user", "content": "Speak, good friend."}]


@pytest.fixture(scope="module")
def client(live_gateway: LiveGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=live_gateway.base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(live_gateway: LiveGateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=live_gateway.base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(live_gateway: LiveGateway) -> str:
    return live_gateway.model


# ---------------------------------------------------------------------------------- completions


def test_completion(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, seed=1)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == model
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_completion_default_length(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_completion_stream(client: OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=20, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_stream_usage(client: OpenAI, model: str) -> None:
    *chunks, last = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_continuous_usage(client: OpenAI, model: str) -> None:
    chunks = list(
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True, "stream_options": {"continuous_usage_stats": True}},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_several_prompts(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=["ROMEO:", "JULIET:"], max_tokens=6, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    alone = client.completions.create(model=model, prompt="JULIET:", max_tokens=6, temperature=0)
    assert answer.choices[1].text == alone.choices[0].text


def test_token_prompt(client: OpenAI, model: str) -> None:
    whole = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=6,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    extra = whole.choices[0].model_extra
    assert extra is not None
    ids = extra["prompt_token_ids"]
    again = client.completions.create(model=model, prompt=ids, max_tokens=6, temperature=0)
    assert again.choices[0].text == whole.choices[0].text
    assert again.usage is not None
    assert again.usage.prompt_tokens == len(ids)
    both = client.completions.create(model=model, prompt=[ids, ids], max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices] == [whole.choices[0].text] * 2


def test_echo(client: OpenAI, model: str) -> None:
    plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    echoed = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, echo=True
    )
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text


def test_echo_stream(client: OpenAI, model: str) -> None:
    echoed = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, echo=True
    )
    chunks = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text


def test_completion_logprobs(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, logprobs=3, seed=1)
    (choice,) = answer.choices
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens
    assert scores.token_logprobs
    assert scores.top_logprobs
    assert scores.text_offset
    assert "".join(scores.tokens) == choice.text
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs)
    assert all(logprob <= 0 for logprob in scores.token_logprobs)
    assert all(3 <= len(top) <= 4 for top in scores.top_logprobs)
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_echo_with_logprobs(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, logprobs=1, echo=True, temperature=0
    )
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens
    assert scores.token_logprobs
    assert answer.usage is not None
    assert scores.token_logprobs[0] is None
    assert all(isinstance(logprob, float) for logprob in scores.token_logprobs[1:])
    assert len(scores.tokens) >= answer.usage.prompt_tokens


def test_only_the_prompt(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == PROMPT
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert len(scores.token_logprobs or []) == answer.usage.prompt_tokens


def test_zero_logprobs(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, logprobs=0)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs
    assert not scores.top_logprobs


def test_stop_string(client: OpenAI, model: str) -> None:
    plain = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
    )
    text = plain.choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=30,
        temperature=0,
        stop=stop,
        extra_body={"ignore_eos": True},
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert plain.usage is not None
    assert cut.usage is not None
    assert cut.usage.completion_tokens <= plain.usage.completion_tokens


def test_stop_string_in_stream_and_output(client: OpenAI, model: str) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 30,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "include_stop_str_in_output": True},
    }
    text = client.completions.create(**body).choices[0].text
    stop = text[len(text) // 2 :][:4]
    chunks = list(client.completions.create(**body, stop=[stop, "\u0000never"], stream=True))
    seen = "".join(chunk.choices[0].text for chunk in chunks)
    assert seen == text[: text.index(stop) + len(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_same_seed_same_text(client: OpenAI, model: str) -> None:
    texts = [
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=20, temperature=1, seed=seed
        )
        .choices[0]
        .text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_drawn_seeds_differ(client: OpenAI, model: str) -> None:
    texts = {
        client.completions.create(model=model, prompt=PROMPT, max_tokens=20).choices[0].text
        for _ in range(4)
    }
    assert len(texts) > 1


def test_n_choices(client: OpenAI, model: str) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=20, n=4, seed=3, temperature=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(set(first)) == 4
    assert texts() == first


def test_n_choices_in_a_stream(client: OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, n=3, seed=3)
    texts, reasons = ["", "", ""], [0, 0, 0]
    for chunk in client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, n=3, seed=3, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason is not None
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [1, 1, 1]


def test_prompts_times_n(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=["ROMEO:", "JULIET:"], max_tokens=4, n=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_ignore_eos_and_min_tokens(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=60, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 60
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=70, extra_body={"min_tokens": 50}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 50


def test_allowed_tokens(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=5,
        extra_body={
            "allowed_token_ids": [300, 301],
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert set(extra["token_ids"]) <= {300, 301}


def test_all_sampling_parameters_at_once(client: OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"300": 5, "301": -100},
        user="somebody",
        seed=-5,
        best_of=1,
        extra_body={
            "top_k": 50,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "skip_special_tokens": True,
            "stop_token_ids": [299],
            "priority": 3,
            "truncate_prompt_tokens": 4,
            "request_id": "mine-1",
            "cache_salt": "unknown to us",
            "an_unknown_field": {"with": ["anything"]},
        },
    )
    assert answer.id == "cmpl-mine-1"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens <= 4


# ----------------------------------------------------------------------------------------- chat


def test_chat(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=12, seed=1, extra_body={"min_tokens": 3}
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")


def test_chat_newer_limit_wins(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_tokens=3,
        max_completion_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_chat_stream(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=20, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=CHAT,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == whole.choices[0].message.content


def test_chat_stream_helper(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=CHAT, max_tokens=10, seed=1, extra_body={"min_tokens": 3}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        snapshot = stream.current_completion_snapshot
    assert snapshot.choices[0].message.content == text != ""


def test_chat_conversation_with_text_parts(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "A room."},
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Good"}]},
            {"role": "assistant", "content": "Sir?"},
            {"role": "user", "content": "Speak.", "name": "HAMLET"},
        ],
        max_tokens=5,
    )
    assert answer.choices[0].message.content is not None


def test_chat_logprobs(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=6, logprobs=True, top_logprobs=2, seed=1
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert bytes(entry.bytes or b"").decode() == entry.token
        assert math.isfinite(entry.top_logprobs[0].logprob)


def test_chat_logprobs_in_a_stream(client: OpenAI, model: str) -> None:
    chunks = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=6, logprobs=True, stream=True, temperature=0
    )
    tokens, text = "", ""
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        if choice.logprobs and choice.logprobs.content:
            tokens += "".join(entry.token for entry in choice.logprobs.content)
    assert tokens == text != ""


def test_chat_n_and_stop(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=10, n=2, seed=5, stop=["\u0000never", "e"]
    )
    contents = [choice.message.content for choice in answer.choices]
    assert len(contents) == 2
    assert all("e" not in (content or "") for content in contents)


def test_continue_final_message(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[*CHAT, {"role": "assistant", "content": "My lord, I"}],
        max_tokens=4,
        temperature=0,
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    assert answer.choices[0].message.content is not None


def test_response_format_text(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=3, response_format={"type": "text"}
    )
    assert answer.choices[0].message.content is not None


# --------------------------------------------------------------------------------------- models


def test_models(client: OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_unknown_model_card(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


# --------------------------------------------------------------------------------------- errors


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="another", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"min_tokens": 500, "max_tokens": 10}, "min_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
def test_bad_completion(client: OpenAI, model: str, change: dict[str, Any], param: str) -> None:
    body = {"model": model, "prompt": PROMPT, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=body, cast_to=httpx.Response)
    error = caught.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert error.code
    assert param.split(".")[0] in str(error)
    assert error.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"continue_final_message": True},
        {"max_completion_tokens": 0},
    ],
)
def test_bad_chat(client: OpenAI, model: str, change: dict[str, Any]) -> None:
    body = {"model": model, "messages": CHAT, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=httpx.Response)
    assert caught.value.param


def test_context_length(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word", max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"


def test_impossible_deadline(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=1000,
            extra_headers={"x-tranche-deadline-ms": "1"},
            extra_body={"ignore_eos": True},
        )
    assert caught.value.status_code in (408, 429)


def test_wrong_path(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post("/embeddings", body={}, cast_to=httpx.Response)


# ----------------------------------------------------------------------------------- asyncio


async def test_async_chat_stream(async_client: AsyncOpenAI, model: str) -> None:
    stream = await async_client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=10, seed=1, stream=True
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    whole = await async_client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=10, seed=1
    )
    assert text == whole.choices[0].message.content


async def test_async_completion_together(async_client: AsyncOpenAI, model: str) -> None:
    answers = await asyncio.gather(
        *(
            async_client.completions.create(model=model, prompt=PROMPT, max_tokens=8, seed=seed % 3)
            for seed in range(12)
        )
    )
    texts = [answer.choices[0].text for answer in answers]
    assert texts[:3] * 4 == texts


async def test_async_early_end_of_a_stream(async_client: AsyncOpenAI, model: str) -> None:
    stream = await async_client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        break
    await stream.close()
    answer = await async_client.completions.create(model=model, prompt=PROMPT, max_tokens=2)
    assert answer.choices


async def test_async_errors(async_client: AsyncOpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        await async_client.completions.create(model=model, prompt=PROMPT, temperature=9)
    with pytest.raises(openai.NotFoundError):
        await async_client.chat.completions.create(model="another", messages=CHAT)


async def test_raw_stream_ends_with_done(live_gateway: LiveGateway) -> None:
    async with httpx.AsyncClient() as raw:
        answer = await raw.post(
            f"{live_gateway.base_url}/completions",
            json={"model": live_gateway.model, "prompt": PROMPT, "stream": True},
        )
    assert answer.text.endswith("data: [DONE]\n\n")
    first = answer.text.split("\n\n")[0].removeprefix("data: ")
    assert json.loads(first)["object"] == "text_completion"
