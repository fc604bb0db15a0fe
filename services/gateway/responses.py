"""The answer to a generating request, as an ASGI response: whole, or as server-sent events.

Theory of operation. The call is submitted when the response starts, so that a client that goes
away is noticed from the first moment. A loop waits for the call to change and writes all that is
new in one piece; while it writes, more may come, so a slow client gets fewer and larger events.
The status line is held back until the first token or `keepalive_s`: a refusal in that time is a
proper HTTP error, later ones are error events. Who is accepted and told that it waits longer than
`LONG_WAIT_S` gets the status line with that at once; what fails after it is an error event, too.

A stream writes a few bytes for every token, and a timer for every wait and every write would cost
more than all the rest. So an answer has one timer, which is set anew only when it fires: it looks
whether nothing was written for `keepalive_s`, and whether a write has been under way for longer
than `write_timeout_s`.
"""

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from services.gateway.answers import DONE, Writer, event, waiting_comment
from services.gateway.calls import Call
from services.gateway.errors import ApiError
from services.gateway.link import MeshLink

LONG_WAIT_S = 1.0
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class CallResponse(Response):
    """Submits a call and writes its answer."""

    def __init__(
        self,
        call: Call,
        writer: Writer,
        link: MeshLink,
        *,
        stream: bool,
        keepalive_s: float,
        write_timeout_s: float,
        on_end: Callable[[Call, int], None],
    ) -> None:
        """`on_end(call, status)` is called exactly once; status 499: the client went away."""
        self.status_code = 200
        self.background = None
        self._call = call
        self._writer = writer
        self._link = link
        self._stream = stream
        self._keepalive_s = keepalive_s
        self._write_timeout_s = write_timeout_s
        self._on_end = on_end
        self._gone = False
        self._over = False
        """All is written, or given up: who goes away now goes in peace."""
        self._started = False
        self._silent = False
        """Nothing was written for so long that a sign of life is due."""
        self._stuck = False
        """A write took too long; the answer is being given up."""
        self._wrote_at = 0.0
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the answer; the call is over when this returns."""
        status = 499
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(receive))
                # A task of its own, so that not every token wakes all the layers around this one.
                answering = tasks.create_task(self._answer(scope, receive, send))
                try:
                    status = await answering
                finally:
                    watching.cancel()
        finally:
            self._link.cancel(self._call)
            self._on_end(self._call, 499 if self._gone else status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._wrote_at = loop.time()
        timer = _Timer(loop, lambda now: self._look(now, task))
        try:
            await self._link.submit(self._call)
            if self._stream:
                return await self._write_stream(send)
            return await self._write_whole(send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return error.status
        except asyncio.CancelledError:
            if not self._stuck or task.uncancel():
                raise
            self._gone = True  # the connection is of no use any more
            return 499
        finally:
            self._over = True
            timer.cancel()

    def _look(self, now: float, task: "asyncio.Task[object]") -> float:
        """The timer fired; returns when it is to fire next."""
        if self._writing_since is not None:
            due = self._writing_since + self._write_timeout_s
            if now >= due:
                self._stuck = True
                task.cancel()
        else:
            due = self._wrote_at + self._keepalive_s
            if now >= due:
                self._silent, self._wrote_at = True, now
                self._call.changed.set()
        latest = now + min(self._keepalive_s, self._write_timeout_s)
        return latest if due <= now else min(due, latest)

    async def _watch(self, receive: Receive) -> None:
        """Notices that the client went away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._over:
            self._gone = True
            self._call.changed.set()

    async def _write_whole(self, send: Send) -> int:
        while not self._call.finished and self._call.error is None:
            await self._call.changed.wait()
            self._call.changed.clear()
            if self._gone:
                return 499
        if self._call.error is not None:
            raise self._call.error
        body = self._writer.answer()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *promise_headers(self._call),
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await self._send(send, start, {"type": "http.response.body", "body": body})
        return 200

    async def _write_stream(self, send: Send) -> int:
        changed = self._call.changed
        while True:
            await changed.wait()
            changed.clear()
            if self._gone:
                return 499
            events, over = self._new_events()
            if not events and (self._silent or self._waits_long()):
                events = waiting_comment(self._call, self._link.now())
            self._silent = False
            if events:
                await self._write(send, events, more=not over)
                self._link.caught_up(self._call)
            if over:
                return 200

    def _waits_long(self) -> bool:
        """It was accepted and waits, and its client has not been told so."""
        promise = self._call.promise
        if promise is None or self._started or self._call.error is not None:
            return False
        if not self._call.promised:  # another choice may still be refused
            return False
        return promise[0] - self._link.now() > LONG_WAIT_S

    def _new_events(self) -> tuple[bytes, bool]:
        """All that is new, and whether the stream is over. Raises ApiError if it never began."""
        events: list[bytes] = []
        for choice in self._call.choices:
            delta = choice.transcript.take()
            if delta is not None:
                events += self._writer.chunks(choice, delta)
        error = self._call.error
        if error is not None:
            if not self._started and not events:
                raise error
            return b"".join((*events, event(error.content()), DONE)), True
        over = all(choice.transcript.done for choice in self._call.choices)
        if over:
            events += self._writer.last_chunks()
        return b"".join(events), over

    async def _write(self, send: Send, events: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            headers = [*EVENT_STREAM, *promise_headers(self._call)]
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send(send, start)
        await self._send(send, {"type": "http.response.body", "body": events, "more_body": more})

    async def _send(self, send: Send, *messages: Message) -> None:
        """Cancelled by the timer if the client takes nothing for too long."""
        self._wrote_at = self._writing_since = self._link.now()
        for message in messages:
            await send(message)
        self._writing_since = None


def promise_headers(call: Call) -> list[tuple[bytes, bytes]]:
    """What was predicted when the call was accepted, in milliseconds since it was received; none
    if the first token came before the prediction."""
    if call.promise is None:
        return []
    start_ms, finish_ms = (
        str(max(0, round((at - call.received_at) * 1_000))).encode() for at in call.promise
    )
    return [
        (b"x-tranche-predicted-start-ms", start_ms),
        (b"x-tranche-predicted-finish-ms", finish_ms),
    ]


class _Timer:
    """Calls `look` with the time, again and again, when it last said."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[float], float]) -> None:
        self._loop = loop
        self._look = look
        self._handle = loop.call_at(look(loop.time()), self._fire)

    def cancel(self) -> None:
        """No more calls."""
        self._handle.cancel()

    def _fire(self) -> None:
        self._handle = self._loop.call_at(self._look(self._loop.time()), self._fire)


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """An error as a plain answer."""
    return Response(
        error.body(),
        status_code=error.status,
        headers={**error.headers(), **(headers or {})},
        media_type="application/json",
    )
