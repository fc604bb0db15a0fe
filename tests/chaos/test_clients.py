"""The clients against a scripted server: what they keep of good, refused and broken answers."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator

import pytest

from bench.chaos.clients import Load, Stream
from bench.chaos.questions import Ask, AskMaker, Question, Style

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"connection: close\r\n\r\n"
)
REFUSAL = (
    b"HTTP/1.1 503 Unavailable\r\nretry-after: 0\r\ncontent-length: 28\r\nconnection: close\r\n\r\n"
    b'{"error":{"message":"later"}'
)
END = b"0\r\n\r\n"
QUESTION = Question(key="q", endpoint="completions", prompt=(1, 2))
PATIENCE_S = 10.0


def chunk(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def piece(*ids: int, reason: str | None = None) -> bytes:
    text = "".join(f"<{i}>" for i in ids)
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason}
    return chunk(json.dumps({"id": "cmpl-1", "choices": [choice]}))


DONE = chunk("[DONE]") + END
GOOD = HEAD + piece(5) + piece(6, 7) + piece(8, reason="length") + DONE


class Server:
    """Gives its answers one after the other, then no connection lives."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = deque(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().splitlines()
            if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        writer.write(self.answers.popleft())
        await writer.drain()
        writer.close()


class OneAsk(AskMaker):
    """Always the same stream."""

    def __init__(self, style: Style) -> None:
        self._style = style

    def next(self) -> Ask:
        after = 2 if self._style == "abort" else 0
        return Ask(
            number=1, question="q", max_tokens=4, gateway=1, style=self._style, abort_after=after
        )


@pytest.fixture
async def addresses() -> AsyncIterator[list[asyncio.Server]]:
    servers: list[asyncio.Server] = []
    yield servers
    for server in servers:
        server.close()


async def first_of(
    addresses: list[asyncio.Server], *answers: bytes, style: Style = "plain"
) -> tuple[Stream, Load]:
    """The first stream that was accepted, by one client."""
    server = Server(*answers)
    addresses.append(await asyncio.start_server(server.serve, "127.0.0.1", 0))
    port = addresses[-1].sockets[0].getsockname()[1]
    load = Load({1: f"http://127.0.0.1:{port}"}, {"q": QUESTION}, OneAsk(style))
    async with asyncio.timeout(PATIENCE_S):
        await load.until_accepted(OneAsk(style).next())
    return load.streams[0], load


async def test_a_good_answer_is_kept_piece_by_piece(addresses: list[asyncio.Server]) -> None:
    stream, load = await first_of(addresses, GOOD)
    assert (stream.outcome, stream.ids, stream.reasons) == ("complete", [[5, 6, 7, 8]], ["length"])
    assert stream.texts == ["<5><6><7><8>"]
    assert sum(count for _, count in stream.arrivals) == 4
    assert stream.answer_id == "cmpl-1"
    assert not load.refusals


async def test_a_refused_stream_is_asked_for_again(addresses: list[asyncio.Server]) -> None:
    stream, load = await first_of(addresses, REFUSAL, REFUSAL, GOOD)
    assert stream.outcome == "complete"
    assert len(load.streams) == 1
    assert sum(load.refusals.values()) == 2


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (HEAD + piece(5), "cut"),
        (HEAD + piece(5) + END, "cut"),
        (b"", "cut"),
        (HEAD + piece(5) + chunk('{"error": {"message": "gone"}}') + DONE, "error"),
        (HEAD + piece(5, reason="stop") + piece(6) + DONE, "error"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", "error"),
    ],
    ids=["cut in mid-stream", "no done", "no answer", "error event", "after its end", "500"],
)
async def test_a_broken_answer_says_how(
    addresses: list[asyncio.Server], answer: bytes, outcome: str
) -> None:
    stream, _ = await first_of(addresses, answer)
    assert stream.outcome == outcome
    assert stream.detail


async def test_who_means_to_go_away_does(addresses: list[asyncio.Server]) -> None:
    stream, _ = await first_of(addresses, GOOD, style="abort")
    assert (stream.outcome, stream.ids) == ("aborted", [[5, 6, 7]])
