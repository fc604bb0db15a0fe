"""A crowd: many clients of one gateway over raw sockets, in one thread and one epoll.

Each visit is a connection of its own: it asks for a stream of so many tokens, reads it quickly or
slowly, or hangs up on the way, and what became of it is written down. Visits come at times that
somebody else decides; the crowd sees to the sockets only. A client library would cost more than the
mesh that it asks.
"""

import re
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from bench.stream_request import stream_request

IDS = re.compile(rb'"token_ids":\[([0-9,]+)\]')
DONE = b"data: [DONE]\n"
READ_BYTES = 65_536
SLOW_STEP_S = 0.1
"""Between two looks at slow readers."""
SLOW_BUFFER_BYTES = 4_096
"""Their receive buffer, so that the gateway's side fills up."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset."""

Outcome = Literal["complete", "refused", "aborted", "short", "wrong", "cut", "error", "open"]
"""`short`: ended with too few tokens. `wrong`: another token than its turn was, or too many. `cut`:
the connection broke. `error`: another status than 200 and 429, or an error in the stream."""


@dataclass(slots=True)
class Visit:
    """One request, as its client sees it. Times are monotonic seconds."""

    client: int
    tokens: int
    read_bps: int = 0
    """Reads so many bytes a second; 0: as they come."""
    leave_after_s: float | None = None
    """Hangs up after so long, whatever it has got."""
    leave_at_token: int | None = None
    again: bool = False
    """It was refused before and comes back when it was told to."""
    sent_at: float = 0.0
    status: int = 0
    retry_after_s: float | None = None
    """Of the header Retry-After, whole seconds."""
    retry_after_ms: float | None = None
    predicted_start_ms: float | None = None
    predicted_finish_ms: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    ended_at: float | None = None
    got: int = 0
    outcome: Outcome = "open"


@dataclass(slots=True)
class _Line:
    """The socket of a visit."""

    visit: Visit
    line: socket.socket
    rest: bytes = b""
    headed: bool = False
    done: bool = False
    failed: bool = False
    wrong: bool = False


@dataclass(slots=True)
class Crowd:
    """All visits under way at one gateway. `ended` is called for each one that is over."""

    url: str
    model: str
    ended: Callable[[Visit], None]
    reference: list[bytes] = field(default_factory=list)
    """The id at every place of the output: all have one prompt and one seed."""
    _lines: dict[int, _Line] = field(default_factory=dict)
    _slow: dict[int, _Line] = field(default_factory=dict)
    _poll: select.epoll = field(default_factory=select.epoll)
    _slow_at: float = 0.0

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def oldest_s(self) -> float:
        """The age of the oldest visit under way."""
        now = time.monotonic()
        return max((now - one.visit.sent_at for one in self._lines.values()), default=0.0)

    def send(self, visit: Visit) -> None:
        """It comes now."""
        visit.sent_at = time.monotonic()
        parts = urlsplit(self.url)
        line = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if visit.read_bps:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
            line.settimeout(10)
            line.connect((parts.hostname, parts.port))
            line.sendall(stream_request(self.model, visit.tokens, closes=True))
            line.setblocking(False)
        except OSError:
            line.close()
            self._over(visit, "cut")
            return
        one = _Line(visit, line)
        self._lines[line.fileno()] = one
        if visit.read_bps:
            self._slow[line.fileno()] = one
        else:
            self._poll.register(line.fileno(), select.EPOLLIN)

    def look(self, wait_s: float) -> None:
        """Reads what is there, for at most about so long."""
        for fd, _ in self._poll.poll(max(0.0, wait_s)):
            one = self._lines.get(fd)
            if one is not None:
                self._read(one, READ_BYTES)
        now = time.monotonic()
        if now - self._slow_at >= SLOW_STEP_S:
            passed_s, self._slow_at = min(1.0, now - self._slow_at), now
            for one in list(self._slow.values()):
                self._read(one, max(1, int(one.visit.read_bps * passed_s)))
            for one in list(self._lines.values()):
                self._leave_if_due(one, now)

    def hang_up(self) -> None:
        """Everybody leaves."""
        for one in list(self._lines.values()):
            self._close(one, "open")

    # ------------------------------------------------------------------------------- reading

    def _read(self, one: _Line, most: int) -> None:
        try:
            data = one.line.recv(most)
        except BlockingIOError:
            return
        except OSError:
            self._close(one, "cut")
            return
        if not data:
            self._close(one, self._outcome(one))
            return
        data = one.rest + data
        if not one.headed:
            if b"\r\n\r\n" not in data:
                one.rest = data
                return
            head, _, data = data.partition(b"\r\n\r\n")
            one.headed = True
            read_head(one.visit, head)
        end = data.rfind(b"\n") + 1
        data, one.rest = data[:end], data[end:]
        self._take(one, data)

    def _take(self, one: _Line, data: bytes) -> None:
        """Whole lines of an answer."""
        visit = one.visit
        for ids in IDS.findall(data):
            now = time.monotonic()
            visit.first_at, visit.last_at = visit.first_at or now, now
            for token in ids.split(b","):
                if visit.got == len(self.reference):
                    self.reference.append(token)
                if visit.got >= visit.tokens or token != self.reference[visit.got]:
                    one.wrong = True
                visit.got += 1
        one.done |= DONE in data
        one.failed |= b'data: {"error"' in data
        if visit.leave_at_token is not None and visit.got >= visit.leave_at_token:
            self._close(one, "aborted")

    def _outcome(self, one: _Line) -> Outcome:
        visit = one.visit
        if visit.status == 429:
            return "refused"
        if not one.headed:
            return "cut"
        if visit.status != 200 or one.failed:
            return "error"
        if one.wrong:
            return "wrong"
        if not one.done:
            return "cut"
        return "complete" if visit.got == visit.tokens else "short"

    def _leave_if_due(self, one: _Line, now: float) -> None:
        after_s = one.visit.leave_after_s
        if after_s is not None and now - one.visit.sent_at >= after_s:
            self._close(one, "aborted")

    def _close(self, one: _Line, outcome: Outcome) -> None:
        fd = one.line.fileno()
        if self._lines.pop(fd, None) is None:
            return
        if self._slow.pop(fd, None) is None:
            self._poll.unregister(fd)
        if outcome == "aborted" and one.visit.client % 2:
            one.line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.line.close()
        self._over(one.visit, outcome)

    def _over(self, visit: Visit, outcome: Outcome) -> None:
        visit.outcome, visit.ended_at = outcome, time.monotonic()
        self.ended(visit)


def read_head(visit: Visit, head: bytes) -> None:
    """Status and the headers that are of interest."""
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    visit.status = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def number(name: str) -> float | None:
        value = headers.get(name)
        return float(value) if value is not None else None

    visit.retry_after_s = number("retry-after")
    visit.retry_after_ms = number("retry-after-ms")
    visit.predicted_start_ms = number("x-tranche-predicted-start-ms")
    visit.predicted_finish_ms = number("x-tranche-predicted-finish-ms")
