"""One streaming request to an OpenAI-compatible server, timed as its client sees it."""

import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from sim.report import Outcome, Record


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    """Where they were asked for; a token may have no text of its own."""
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        return self.text or (self.delta.content or "" if self.delta else "")


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Chunk)
DETAIL_CHARACTERS_MAX = 120


@dataclass(slots=True)
class _Stream:
    """What has come of one answer so far."""

    first_s: float | None = None
    last_s: float | None = None
    gap_s: float = 0.0
    chunks: int = 0
    usage: _Usage = field(default_factory=_Usage)
    finished: bool = False
    done: bool = False
    error: str = ""

    def take(self, line: str, now_s: float) -> None:
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self.done = True
            return
        chunk = _decoder.decode(data)
        if chunk.error is not None:
            self.error = str(chunk.error.get("message", "error event"))
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.content or choice.token_ids:
                self._content(now_s)
            self.finished = self.finished or choice.finish_reason is not None

    def _content(self, now_s: float) -> None:
        self.chunks += 1
        if self.first_s is None:
            self.first_s = now_s
        elif self.last_s is not None:
            self.gap_s = max(self.gap_s, now_s - self.last_s)
        self.last_s = now_s


async def stream_request(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], start_s: float
) -> Record:
    """Send `body` to `path` and read the answer to its end; never raises for what a server does.

    Times in the record count from `start_s` (time.monotonic). A chunk counts as a token only if
    the server sends no usage.
    """
    sent_s = time.monotonic() - start_s
    stream = _Stream()
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                return _refused(sent_s, response.status_code, text)
            async for line in response.aiter_lines():
                stream.take(line, time.monotonic() - start_s)
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        stream.error = type(error).__name__
    return _record(sent_s, stream, time.monotonic() - start_s)


def _refused(sent_s: float, status: int, text: str) -> Record:
    outcome: Outcome = "rejected" if status in (429, 503) else "failed"
    return Record(sent_s, outcome, detail=f"{status} {text[:DETAIL_CHARACTERS_MAX]}")


def _record(sent_s: float, stream: _Stream, now_s: float) -> Record:
    complete = stream.finished and stream.done and not stream.error
    cut = "stream cut before [DONE]" if not stream.done else "no finish_reason"
    return Record(
        sent_s=sent_s,
        outcome="completed" if complete else "failed",
        first_token_s=now_s if stream.first_s is None and complete else stream.first_s,
        last_token_s=now_s if stream.last_s is None and complete else stream.last_s,
        gap_max_s=stream.gap_s,
        prompt_tokens=stream.usage.prompt_tokens,
        output_tokens=stream.usage.completion_tokens or stream.chunks,
        detail="" if complete else (stream.error or cut)[:DETAIL_CHARACTERS_MAX],
    )
