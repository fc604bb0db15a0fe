"""Reads one streamed HTTP answer from raw bytes and counts its tokens; no socket, no clock.

Works on what `bench.peers.model` guarantees: every token is one space and letters, so the tokens
in a piece of text are its spaces, whether a server sends one or many of them in an event.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

HEAD_BYTES_MAX = 64 * 1024
DETAIL_CHARACTERS_MAX = 200


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class BadAnswer(Exception):
    """The bytes are not the HTTP or the events that were expected."""


@dataclass(slots=True)
class BodyDecoder:
    """Takes HTTP/1.1 chunk framing off a body, however its bytes are cut."""

    _buffer: bytearray = field(default_factory=bytearray)
    _left: int = 0
    """Bytes of the present chunk that are still to come, its end of line counted."""
    ended: bool = False

    def feed(self, data: bytes) -> bytes:
        """What of the body is complete. Raises BadAnswer."""
        buffer, body = self._buffer, bytearray()
        buffer += data
        while buffer and not self.ended:
            if self._left:
                took = min(self._left, len(buffer))
                content = max(0, min(took, self._left - 2))
                body += buffer[:content]
                self._left -= took
                del buffer[:took]
                continue
            line_end = buffer.find(b"\r\n")
            if line_end < 0:
                break
            try:
                size = int(bytes(buffer[:line_end]).split(b";")[0], 16)
            except ValueError as error:
                raise BadAnswer("bad chunk size") from error
            del buffer[: line_end + 2]
            self.ended = size == 0
            self._left = size + 2
        return bytes(body)


@dataclass(slots=True)
class Answer:
    """One answer, fed with bytes as they come."""

    tokens: int = 0
    """Counted in the text."""
    usage_tokens: int | None = None
    """As the server says it, if it does."""
    prompt_tokens: int | None = None
    finished: bool = False
    """A finish reason came."""
    done: bool = False
    """`[DONE]` came."""
    error: str = ""
    text: list[str] = field(default_factory=list)
    _head: bytearray | None = field(default_factory=bytearray)
    _body: BodyDecoder | None = None
    _status: int = 0
    _rest: bytes = b""

    def feed(self, data: bytes) -> int:
        """Tokens in these bytes. What goes wrong is in `error`; it does not raise."""
        try:
            return self._feed(data)
        except (BadAnswer, msgspec.DecodeError) as error:
            self.error = self.error or f"{type(error).__name__}: {error}"
            return 0

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self.done or bool(self.error) or (self._body is not None and self._body.ended)

    @property
    def complete(self) -> bool:
        return self.finished and not self.error

    def _feed(self, data: bytes) -> int:
        if self._head is not None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > HEAD_BYTES_MAX:
                    raise BadAnswer("endless head")
                return 0
            data = bytes(self._head[end + 4 :])
            self._take_head(bytes(self._head[:end]))
            self._head = None
        if self._body is not None:
            data = self._body.feed(data)
        if self._status != 200:
            detail = data.decode(errors="replace")[:DETAIL_CHARACTERS_MAX]
            self.error = (self.error or f"{self._status} ") + detail
            return 0
        return self._events(data)

    def _take_head(self, head: bytes) -> None:
        lines = head.lower().split(b"\r\n")
        try:
            self._status = int(lines[0].split()[1])
        except (IndexError, ValueError) as error:
            raise BadAnswer("bad status line") from error
        if any(line.startswith(b"transfer-encoding:") and b"chunked" in line for line in lines):
            self._body = BodyDecoder()

    def _events(self, data: bytes) -> int:
        before = self.tokens
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())
        return self.tokens - before

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = _decoder.decode(data)
        if event.error is not None:
            self.error = str(event.error)[:DETAIL_CHARACTERS_MAX]
        if event.usage is not None:
            self.usage_tokens = event.usage.completion_tokens
            self.prompt_tokens = event.usage.prompt_tokens
        for choice in event.choices:
            if choice.text:
                self.tokens += choice.text.count(" ")
                self.text.append(choice.text)
            self.finished = self.finished or choice.finish_reason is not None


def request_bytes(host: str, port: int, body: dict[str, Any]) -> bytes:
    """A POST to /v1/completions whose connection ends with its answer."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
