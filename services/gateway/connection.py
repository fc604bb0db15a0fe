"""A client's connection: how much head it may send, how long it may take, and how many there are.

uvicorn's protocol has no limit of its own here: a head may go on without end, and a client that
sends a byte a minute keeps its connection. So there is a deadline for whatever the client owes us:
a whole head, then a whole body. While we owe it an answer there is none; between two requests
uvicorn's own limit for idle connections holds. What is too much or too late is answered once, in
plain HTTP, and the connection is closed.
"""

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from services.gateway.errors import UNAVAILABLE_RETRY_S, ApiError, unavailable
from services.gateway.metrics import GatewayMetrics

BODY_GRACE = 1.5
"""The app has a limit of its own for bodies and says it better; this one is for what it does not
read."""
FRAMES = 2
"""Chunked bodies may be so much longer on the line than they are, their trailers included."""
WRITE_BUFFER_BYTES = 16_384
"""What waits here for a slow reader, beside the kernel's buffers; with more, writing waits."""
SEND_BUFFER_BYTES = 65_536
"""And there; by itself Linux takes some 2 MB for a reader on the same machine, an hour of text."""
REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}
REASONS |= {413: "Content Too Large", 503: "Service Unavailable"}


class TooMuch(Exception):
    """Ends the parsing of a request that was refused."""


@dataclass(slots=True)
class ConnectionLimits:
    """Of all connections of one gateway."""

    header_bytes_max: int
    """Request line and headers together."""
    headers_max: int
    header_timeout_s: float
    body_bytes_max: int
    body_timeout_s: float
    connections_max: int
    metrics: GatewayMetrics
    open: set["GuardedProtocol"] = field(default_factory=set)


class GuardedProtocol(HttpToolsProtocol):
    """See the module's text."""

    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._body_bytes = 0
        """As they came over the line."""
        self._in_body = False
        self._refused = False

    # ------------------------------------------------------------------------ from the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more; beyond the limit it is told and closed."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        line = transport.get_extra_info("socket")
        if line is not None:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self._limits.open) >= self._limits.connections_max:
            message = "Too many connections are open here. Try again later."
            self._refuse(unavailable(message, UNAVAILABLE_RETRY_S, "too_many_connections"))
            return
        self._limits.open.add(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        self._limits.open.discard(self)
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it, unless the head grows too large."""
        if self._refused:
            return
        if self._deadline is None and self._idle:
            self._expect_head()
        if not self._in_body:
            self._head_bytes += len(data)
        super().data_received(data)
        limits = self._limits
        if self._in_body:  # the head's last bytes may be counted too
            self._body_bytes += len(data)
        if not self._in_body and self._head_bytes > limits.header_bytes_max:
            self._refuse_head(f"The head is larger than {limits.header_bytes_max} bytes.")
        elif self._body_bytes > FRAMES * limits.body_bytes_max + limits.header_bytes_max:
            message = f"The body is larger than {limits.body_bytes_max} bytes."
            self._refuse(ApiError(413, message, code="request_too_large"))

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP; unless something better was said already."""
        if not self._refused:
            super().send_400_response(msg)

    # --------------------------------------------------------------------------- from the parser

    def on_message_begin(self) -> None:
        """A head, perhaps behind another request."""
        super().on_message_begin()
        if self._idle:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        super().on_url(url)
        if len(self.url) > self._limits.header_bytes_max:
            self._too_much(f"The address is longer than {self._limits.header_bytes_max} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers_max:
            self._too_much(f"There are more than {self._limits.headers_max} headers.")

    def on_headers_complete(self) -> None:
        """The head is here."""
        head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head > self._limits.header_bytes_max:
            self._too_much(f"The head is larger than {self._limits.header_bytes_max} bytes.")
        self._head_bytes = self._body_bytes = 0
        if self._idle:  # else it waits behind another one, and nobody reads on
            self._expect(self._limits.body_timeout_s * BODY_GRACE, "body")
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is here, if there is one: now it is our turn."""
        self._in_body = False
        self._head_bytes = self._body_bytes = 0
        self._expect_nothing()
        super().on_message_complete()

    # -------------------------------------------------------------------------------- deadlines

    @property
    def _idle(self) -> bool:
        """No answer is owed."""
        return not self._in_body and (self.cycle is None or self.cycle.response_complete)

    def _expect_head(self) -> None:
        self._expect(self._limits.header_timeout_s, "head")

    def _expect(self, within_s: float, what: str) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(within_s, self._late, what, within_s)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, what: str, within_s: float) -> None:
        self._deadline = None
        message = f"The {what} of the request did not arrive within {within_s:g} s."
        self._refuse(ApiError(408, message, code=f"{what}_timeout"))

    # --------------------------------------------------------------------------------- refusals

    def _too_much(self, message: str) -> None:
        """From within the parser, which must not go on."""
        self._refuse_head(message)
        raise TooMuch(message)

    def _refuse_head(self, message: str) -> None:
        self._refuse(ApiError(431, message, code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._expect_nothing()
        self._limits.metrics.errors.labels(error.code).inc()
        if self._owed_an_answer:
            self.transport.write(_plain(error))
        self.transport.close()

    @property
    def _owed_an_answer(self) -> bool:
        """Not to who said nothing, nor where an answer has begun."""
        if self._in_body:
            return not self.cycle.response_started
        said = self._head_bytes > 0 or self not in self._limits.open
        return said and (self.cycle is None or self.cycle.response_complete)


def _plain(error: ApiError) -> bytes:
    """A whole answer, for where no app is asked."""
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers(),
    }
    lines = [f"HTTP/1.1 {error.status} {REASONS[error.status]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
