"""The load generator: thousands of streams over raw sockets, in one thread and one epoll.

A client library would cost more than the servers it asks. This one sends a request that was made
once and reads bytes: it counts them and the `data:` lines, and compares the token ids of every
line with those of the other streams at the same place: all have one prompt and one seed, and only
their lengths differ. So a token that is lost, doubled or out of place is seen. A stream that has
ended is followed by another one on the same connection: as many stay open as are wanted.

It is a process of its own: `python -m bench.swarm.load`; it writes its counts to a file every
second, and reads from its standard input how many streams are wanted.
"""

import os
import random
import re
import select
import socket
import sys
import time
from argparse import ArgumentParser
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from bench.stream_request import stream_request

IDS = re.compile(rb'"token_ids":\[([0-9,]+)\]')
DONE = b"data: [DONE]\n"
RESPONSE_END = b"0\r\n\r\n"
READ_BYTES = 65_536
GAP_BUCKET_S = 0.05
GAP_BUCKETS = 600
"""Gaps between two arrivals of a stream, in steps of 50 ms; the last bucket has all above 30 s."""
REFUSED_PAUSE_S = 1.0
POLL_S = 0.02
TELL_S = 1.0
DRAIN = "drain"


class Counts(msgspec.Struct):
    """What was seen so far."""

    at: float = 0.0
    """Monotonic seconds."""
    bytes: int = 0
    lines: int = 0
    tokens: int = 0
    open: int = 0
    """Streams under way that have had a token."""
    waiting: int = 0
    """Streams under way that have had none."""
    begun: int = 0
    complete: int = 0
    """Streams with exactly the tokens they were to have, then [DONE]."""
    short: int = 0
    """Streams that ended, or were cut, with fewer tokens."""
    wrong: int = 0
    """Streams with another token than was its turn: lost, doubled or out of place."""
    cut: int = 0
    refused: dict[str, int] = {}
    """Status lines other than 200."""
    gaps: list[int] = []
    first: list[int] = []
    """Waits for the first token, in the same buckets."""


@dataclass(slots=True)
class Stream:
    """One connection and the stream that is under way on it."""

    line: socket.socket
    wanted: int = 0
    got: int = 0
    rest: bytes = b""
    """The beginning of a line whose end is not here yet."""
    last_at: float = 0.0
    headed: bool = False
    done: bool = False
    wrong: bool = False


@dataclass(slots=True)
class Load:
    """All streams. `request` makes the bytes of a request for so many tokens."""

    urls: list[str]
    model: str
    tokens: int
    """Mean length of a stream."""
    opens_per_s: float
    counts: Counts = field(default_factory=Counts)
    wanted: int = 0
    draining: bool = False
    reference: list[bytes] = field(default_factory=list)
    """The id at every place, as the first stream that came so far had it."""
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    _streams: dict[int, Stream] = field(default_factory=dict)
    _poll: select.epoll = field(default_factory=select.epoll)
    _idle: deque[Stream] = field(default_factory=deque)
    _again: deque[tuple[float, Stream]] = field(default_factory=deque)
    _refused: Counter[str] = field(default_factory=Counter)
    _gaps: list[int] = field(default_factory=lambda: [0] * GAP_BUCKETS)
    _first: list[int] = field(default_factory=lambda: [0] * GAP_BUCKETS)
    _waiting: int = 0
    _under_way: int = 0
    _may_open: float = 0.0
    _opened: int = 0
    _at: float = 0.0

    @property
    def longest(self) -> int:
        """No stream gets more tokens."""
        return self.tokens * 3 // 2

    def run(self, tell: Path) -> None:
        """Until told to drain and nothing is under way."""
        commands = sys.stdin.fileno()
        os.set_blocking(commands, False)
        self._at = told_at = time.monotonic()
        while not (self.draining and not self._under_way):
            ready = self._poll.poll(POLL_S)
            self._tick(time.monotonic())
            for fd, _ in ready:
                self._read(fd)
            if self._at - told_at >= TELL_S:
                told_at = self._at
                self._listen(commands)
                self._tell(tell)
        self._tell(tell)

    # ------------------------------------------------------------------------------- opening

    def _tick(self, now: float) -> None:
        """Open what may be opened now."""
        self._may_open = min(self.opens_per_s, self._may_open + (now - self._at) * self.opens_per_s)
        self._at = now
        while self._again and self._again[0][0] <= now:
            self._idle.append(self._again.popleft()[1])
        while self._may_open >= 1 and self._under_way < self.wanted and not self.draining:
            self._may_open -= 1
            self._begin(self._idle.popleft() if self._idle else self._new())

    def _new(self) -> Stream:
        stream = Stream(self._connect())
        self._streams[stream.line.fileno()] = stream
        self._poll.register(stream.line.fileno(), select.EPOLLIN)
        return stream

    def _connect(self) -> socket.socket:
        parts = urlsplit(self.urls[self._opened % len(self.urls)])
        self._opened += 1
        line = socket.create_connection((parts.hostname, parts.port), timeout=10)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setblocking(False)
        return line

    def _begin(self, stream: Stream, *, first: bool = True) -> None:
        """The first streams have all lengths, so that not all end together."""
        shortest = 1 if first else self.tokens // 2
        stream.wanted = self.rng.randint(shortest, self.longest)
        stream.got, stream.rest, stream.last_at = 0, b"", self._at
        stream.headed = stream.done = stream.wrong = False
        self.counts.begun += 1
        self._waiting += 1
        self._under_way += 1
        try:
            stream.line.send(stream_request(self.model, stream.wanted))
        except OSError:
            self._lost(stream)

    # ------------------------------------------------------------------------------- reading

    def _read(self, fd: int) -> None:
        stream = self._streams.get(fd)
        if stream is None:
            return
        try:
            data = stream.line.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(stream)
            return
        self.counts.bytes += len(data)
        if stream.rest:
            data = stream.rest + data
        if data[-1] == 10:
            stream.rest = b""
        else:
            end = data.rfind(b"\n") + 1
            data, stream.rest = data[:end], data[end:]
        self._take(stream, data)

    def _take(self, stream: Stream, data: bytes) -> None:
        """Whole lines of an answer."""
        if not stream.headed:
            if not data.startswith(b"HTTP/1.1 200"):
                self._on_refusal(stream, data)
                return
            stream.headed = True
        counts = self.counts
        counts.lines += data.count(b"data: ")
        found = IDS.findall(data)
        if found:
            self._on_ids(stream, found)
        if DONE in data:
            stream.done = True
        if stream.done and data.endswith(RESPONSE_END):
            self._ended(stream)

    def _on_ids(self, stream: Stream, found: list[bytes]) -> None:
        gap = min(GAP_BUCKETS - 1, int((self._at - stream.last_at) / GAP_BUCKET_S))
        stream.last_at = self._at
        got, reference = stream.got, self.reference
        if got:
            self._gaps[gap] += 1
        else:
            self._first[gap] += 1
            self._waiting -= 1
        for ids in found:
            for one in ids.split(b",") if b"," in ids else (ids,):
                if got == len(reference):
                    reference.append(one)
                if got >= stream.wanted or one != reference[got]:
                    stream.wrong = True
                got += 1
        self.counts.tokens += got - stream.got
        stream.got = got

    def _ended(self, stream: Stream) -> None:
        counts = self.counts
        self._over(stream)
        if stream.wrong:
            counts.wrong += 1
        elif stream.got != stream.wanted:
            counts.short += 1
        else:
            counts.complete += 1
        if not self.draining and self._under_way < self.wanted:
            self._begin(stream, first=False)
        else:
            self._idle.append(stream)

    def _on_refusal(self, stream: Stream, data: bytes) -> None:
        self._refused[data[:16].decode(errors="replace")] += 1
        self._over(stream)
        stream.headed = True
        self._again.append((self._at + REFUSED_PAUSE_S, stream))

    def _lost(self, stream: Stream) -> None:
        """The connection is gone. One that has nothing under way is no loss."""
        fd = stream.line.fileno()
        self._poll.unregister(fd)
        del self._streams[fd]
        stream.line.close()
        if stream in self._idle:
            self._idle.remove(stream)
            return
        if any(each is stream for _, each in self._again):  # refused, and then closed
            self._again = deque((at, each) for at, each in self._again if each is not stream)
            return
        self.counts.cut += 1
        self.counts.short += 1
        self._over(stream)

    def _over(self, stream: Stream) -> None:
        self._under_way -= 1
        if not stream.got:
            self._waiting -= 1

    # ------------------------------------------------------------------------------- talking

    def _listen(self, commands: int) -> None:
        try:
            words = os.read(commands, 1024).decode().split()
        except BlockingIOError:
            return
        for word in words:
            if word == DRAIN:
                self.draining = True
            else:
                self.wanted = int(word)

    def _tell(self, file: Path) -> None:
        counts = self.counts
        counts.at, counts.waiting = self._at, self._waiting
        counts.open = self._under_way - self._waiting
        counts.refused = dict(self._refused)
        counts.gaps, counts.first = self._gaps, self._first
        partial = file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(counts))
        partial.replace(file)


def main() -> None:
    """The command line of the process."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--opens-per-s", type=float, required=True)
    parser.add_argument("--file", type=Path, required=True)
    given = parser.parse_args()
    load = Load(given.url, given.model, given.tokens, given.opens_per_s)
    load.run(given.file)


if __name__ == "__main__":
    main()
