"""A closed loop of streaming clients against one server, on raw sockets so that it costs little.

Every client sends its next request when its last answer has ended. Nothing is timed but the arrival
of bytes; `bench.peers.cell` makes figures of it.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.peers.sse import Answer, request_bytes
from bench.peers.workload import Ask

CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Trace:
    """What one client saw of one request; times are time.monotonic."""

    sent_s: float
    wanted_tokens: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, tokens) of every read that held tokens."""
    ended_s: float | None = None
    """None: cut off by the end of the run."""
    complete: bool = False
    tokens: int = 0
    usage_tokens: int | None = None
    prompt_tokens: int | None = None
    error: str = ""
    text: str = ""
    """Only where asked for."""


class _Client(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, content: bytes, trace: Trace, ended: asyncio.Future[None]) -> None:
        self._content, self._trace, self._ended = content, trace, ended
        self.answer = Answer()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._trace.sent_s = time.monotonic()
        transport.write(self._content)

    def data_received(self, data: bytes) -> None:
        tokens = self.answer.feed(data)
        if tokens:
            self._trace.arrivals.append((time.monotonic(), tokens))
        if self.answer.ended:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.complete and not self.answer.error:
            self.answer.error = f"connection lost: {exc or 'closed early'}"
        self._end()

    def _end(self) -> None:
        if self.transport is not None:
            self.transport.close()
        if not self._ended.done():
            self._ended.set_result(None)


async def ask(host: str, port: int, body: dict[str, Any], *, keep_text: bool = False) -> Trace:
    """Send one request and read its answer; what goes wrong is in the trace. Cancelling it hangs
    up and leaves the trace without an end."""
    trace = Trace(time.monotonic(), body["max_tokens"])
    return await _follow(host, port, body, trace, keep_text)


async def _follow(
    host: str, port: int, body: dict[str, Any], trace: Trace, keep_text: bool
) -> Trace:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    client = _Client(request_bytes(host, port, body), trace, ended)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: client, host, port)
    except OSError as error:
        trace.error, trace.ended_s = f"{type(error).__name__}: {error}", time.monotonic()
        return trace
    answer = client.answer
    try:
        await ended
        if not answer.complete and not answer.error:
            answer.error = "ended without a finish reason"
    finally:
        trace.tokens, trace.usage_tokens = answer.tokens, answer.usage_tokens
        trace.prompt_tokens = answer.prompt_tokens
        if keep_text:
            trace.text = "".join(answer.text)
        if client.transport is not None:
            client.transport.abort()
    trace.ended_s = time.monotonic()
    trace.error, trace.complete = answer.error, answer.complete
    if trace.complete and trace.tokens != trace.wanted_tokens:
        trace.complete = False
        trace.error = f"{trace.tokens} tokens came, {trace.wanted_tokens} were asked for"
    elif trace.complete and trace.usage_tokens not in (None, trace.tokens):
        trace.complete = False
        trace.error = f"{trace.tokens} tokens came, usage says {trace.usage_tokens}"
    return trace


ERROR_PAUSE_S = 0.2
"""A client whose request failed waits so long, that a broken server is not flooded."""


async def closed_loop(
    host: str,
    port: int,
    requests: Iterator[Ask],
    body_of: Callable[[Ask], dict[str, Any]],
    clients: int,
    marks_s: tuple[float, float],
    at_mark: Callable[[int], None],
) -> list[Trace]:
    """Run `clients` clients until the second mark, then hang up.

    `marks_s` are seconds from now: the beginning and the end of the time that is counted; `at_mark`
    is called at each with 0 and 1. Returns every trace, cut ones included.
    """
    traces: list[Trace] = []

    async def one_client() -> None:
        for request in requests:
            trace = Trace(time.monotonic(), request.output_tokens)
            traces.append(trace)
            await _follow(host, port, body_of(request), trace, keep_text=False)
            if trace.error:
                await asyncio.sleep(ERROR_PAUSE_S)

    gc.collect()
    gc.disable()
    try:
        begin = time.monotonic()
        tasks = [asyncio.create_task(one_client()) for _ in range(clients)]
        for number, mark_s in enumerate(marks_s):
            await asyncio.wait(tasks, timeout=max(0.0, begin + mark_s - time.monotonic()))
            at_mark(number)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        gc.enable()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return traces
