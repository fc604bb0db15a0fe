"""The comparison's reading of streamed answers and its seeded requests, on bytes and values."""

import asyncio
import json
from itertools import islice
from statistics import mean, median

import pytest

from bench.peers.clients import closed_loop
from bench.peers.model import countable_ids
from bench.peers.sse import Answer, request_bytes
from bench.peers.workload import OUTPUTS, PROMPTS, Ask, asks
from bench.prompts import WORDS

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str = "", reason: str | None = None, usage: int | None = None) -> bytes:
    body: dict[str, object] = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chunked(*parts: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return framed + b"0\r\n\r\n"


WHOLE = HEAD + chunked(
    event(" one"),
    b": keep-alive\n\n",
    event(" two three"),
    event("", "length", 3),
    b"data: [DONE]\n\n",
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_tokens_are_counted_however_the_bytes_are_cut(size: int) -> None:
    answer = Answer()
    counts = [answer.feed(WHOLE[at : at + size]) for at in range(0, len(WHOLE), size)]
    assert (sum(counts), answer.tokens, answer.usage_tokens, answer.prompt_tokens) == (3, 3, 3, 7)
    assert "".join(answer.text) == " one two three"
    assert answer.complete
    assert answer.done
    assert answer.ended


def test_an_event_over_two_chunks_and_one_read_with_two_events() -> None:
    pair = event(" a") + event(" b c")
    answer = Answer()
    assert answer.feed(HEAD + chunked(pair[:30], pair[30:])[:-5]) == 3
    assert not answer.ended


def test_without_done_the_last_chunk_is_the_end() -> None:
    answer = Answer()
    answer.feed(HEAD + chunked(event(" a", "length")))
    assert answer.ended
    assert answer.complete
    assert not answer.done


def test_a_body_without_chunks_is_read_too() -> None:
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 200 OK\r\n\r\n" + event(" a b", "stop")) == 2
    assert answer.complete


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"HTTP/1.1 422 No\r\n\r\n{'detail': 'ignore_eos'}", "422 {'detail': 'ignore_eos'}"),
        (HEAD + chunked(b'data: {"error": {"message": "engine died"}}\n\n'), "engine died"),
        (HEAD + b"zz\r\n", "bad chunk size"),
        (HEAD + chunked(b"data: {no json\n\n"), "DecodeError"),
        (b"nonsense\r\n\r\n", "bad status line"),
    ],
)
def test_what_goes_wrong_is_said(data: bytes, said: str) -> None:
    answer = Answer()
    answer.feed(data)
    assert said in answer.error
    assert answer.ended
    assert not answer.complete


def test_a_request_has_its_length_and_closes_its_connection() -> None:
    head, body = request_bytes("h", 1, {"prompt": "é"}).split(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Connection: close" in head
    assert json.loads(body) == {"prompt": "é"}


def test_requests_repeat_with_their_seed_and_only_with_it() -> None:
    assert list(islice(asks(1), 50)) == list(islice(asks(1), 50))
    one, two = ({ask.prompt for ask in islice(asks(seed), 500)} for seed in (1, 2))
    assert len(one) > 490
    assert not {prompt for prompt in one & two if prompt.count(" ") > 8}


def test_lengths_are_as_told() -> None:
    drawn = list(islice(asks(5), 8000))
    prompts = [ask.prompt_tokens for ask in drawn]
    outputs = [ask.output_tokens for ask in drawn]
    assert (min(prompts) >= PROMPTS.least, max(prompts)) == (True, PROMPTS.most)
    assert (min(outputs) >= OUTPUTS.least, max(outputs)) == (True, OUTPUTS.most)
    assert median(prompts) == pytest.approx(100, rel=0.05)
    assert median(outputs) == pytest.approx(60, rel=0.06)
    assert mean(outputs) == pytest.approx(89, rel=0.06)
    assert all(ask.prompt.count(" ") == ask.prompt_tokens for ask in drawn[:100])
    assert all(word in WORDS for word in drawn[0].prompt.split())


def test_only_tokens_of_one_space_and_letters_may_be_chosen() -> None:
    vocabulary = {"<|end|>": 0, "a": 1, "Ġ": 2, "Ġa": 3, "ĠThe": 4, "Ġa.": 5, "ĠĠa": 6, "ĠÃ©": 7}
    assert countable_ids(vocabulary) == [3, 4]


class _Server(asyncio.Protocol):
    """Answers each request with the tokens it asks for, two in one event, and one token less where
    `max_tokens` is 13."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        wanted = json.loads(data.split(b"\r\n\r\n")[1])["max_tokens"]
        tokens = wanted - (wanted == 13)
        events = [event(" x" * min(2, tokens - at)) for at in range(0, tokens, 2)]
        self._transport.write(HEAD + chunked(*events, event("", "length", tokens)))


async def test_a_closed_loop_counts_every_token_and_every_short_answer() -> None:
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    marks: list[int] = []
    traces = await closed_loop(
        "127.0.0.1",
        port,
        iter([Ask("p", 1, tokens) for tokens in (5, 13, 8, 3)]),
        lambda ask: {"prompt": ask.prompt, "max_tokens": ask.output_tokens},
        2,
        (0.0, 10.0),
        marks.append,
    )
    server.close()
    assert marks == [0, 1]
    assert sorted(trace.tokens for trace in traces) == [3, 5, 8, 12]
    assert all(sum(n for _, n in trace.arrivals) == trace.tokens for trace in traces)
    bad = [trace for trace in traces if not trace.complete]
    assert [trace.error for trace in bad] == ["12 tokens came, 13 were asked for"]
