"""A TCP proxy between one service and the broker, with everything that lines do to people.

It cuts (RST), swallows (half open: both ends believe in the line), delays, slows, and by way of
`frames` repeats and reorders deliveries. One proxy for each service; faults end by themselves only
where the storm ends them.
"""

import asyncio
import socket
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from bench.chaos.frames import Counts, Deliveries, Mischief

CHUNK_BYTES = 16 * 1024
WAITING_BYTES_MAX = 1 << 20
"""On their way in one direction; beyond that the sender is not read on."""
SLOW_PIECE_S = 0.05
LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends RST."""


class _Way:
    """One direction of one connection: bytes that are due later, in order."""

    def __init__(self, line: "Line", writer: asyncio.StreamWriter) -> None:
        self._line = line
        self._writer = writer
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._stirred = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = False

    async def put(self, data: bytes) -> None:
        """Goes out after the line's present delay."""
        if not data:
            return
        self._waiting.append((asyncio.get_running_loop().time() + self._line.delay_s, data))
        self._bytes += len(data)
        self._stirred.set()
        if self._bytes > WAITING_BYTES_MAX:
            self._room.clear()
        await self._room.wait()

    def put_nowait(self, data: bytes) -> None:
        """The same for a timer."""
        if data:
            self._waiting.append((asyncio.get_running_loop().time() + self._line.delay_s, data))
            self._bytes += len(data)
            self._stirred.set()

    def end(self) -> None:
        """Nothing more comes; what waits still goes out."""
        self._ended = True
        self._stirred.set()

    async def run(self) -> None:
        """Until everything is out after `end`; then the writer is closed."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._waiting:
                    if self._ended:
                        return
                    self._stirred.clear()
                    await self._stirred.wait()
                due, data = self._waiting.popleft()
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                await self._write(data)
                self._bytes -= len(data)
                if self._bytes <= WAITING_BYTES_MAX:
                    self._room.set()
        finally:
            self._room.set()
            self._writer.close()

    async def _write(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            rate = self._line.bytes_per_s
            piece = data[start : start + max(1, int(rate * SLOW_PIECE_S))] if rate else data[start:]
            self._writer.write(piece)
            await self._writer.drain()
            start += len(piece)
            if rate:
                await asyncio.sleep(len(piece) / rate)


@dataclass(eq=False, slots=True)
class _Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter | None
    swallowed: bool = False
    """Half open: what comes is read and forgotten, and nobody is told of the other's end."""
    ends_closed: int = 0
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)


class Line:
    """The proxy of one service."""

    def __init__(self, name: str, target_port: int, seed: str) -> None:
        self.name = name
        self.port = 0
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        """0: as fast as it goes."""
        self.mischief = Mischief()
        self.counts = Counts()
        self._target_port = target_port
        self._rng = Random(f"line {name} {seed}")
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()

    async def open(self) -> None:
        """Listens from now on."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        tasks = [task for link in self._links for task in link.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in tuple(self._links):
            _abort(link)
        self._links.clear()

    def cut(self, *, one: bool) -> int:
        """RST to both ends of all connections, or of one; how many."""
        chosen = self._choose(one)
        for link in tuple(chosen):
            self._drop(link)
        return len(chosen)

    def half_open(self, *, one: bool) -> int:
        """All connections that are there now, or one, carry nothing any more; how many."""
        chosen = self._choose(one)
        for link in chosen:
            link.swallowed = True
        return len(chosen)

    def heal(self) -> None:
        """Ordinary again; what is half open stays so until an end of it notices."""
        self.delay_s = self.bytes_per_s = 0.0
        self.mischief.duplicate = self.mischief.reorder = 0.0

    def _choose(self, one: bool) -> list[_Link]:
        links = [link for link in self._links if not link.swallowed and link.broker is not None]
        return [self._rng.choice(links)] if one and links else links

    def _drop(self, link: _Link) -> None:
        for task in link.tasks:
            task.cancel()
        _abort(link, reset=True)
        self._links.discard(link)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer, None)
        self._links.add(link)
        try:
            onward, link.broker = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            _abort(link)
            self._links.discard(link)
            return
        deliveries = Deliveries(self.mischief, self._rng, self.counts)
        up, down = _Way(self, link.broker), _Way(self, writer)
        link.tasks = [
            asyncio.ensure_future(job)
            for job in (
                up.run(),
                down.run(),
                self._pump_up(link, reader, up, deliveries),
                self._pump_down(link, onward, down, deliveries),
            )
        ]
        await asyncio.gather(*link.tasks, return_exceptions=True)
        _abort(link)
        self._links.discard(link)

    async def _pump_up(
        self, link: _Link, reader: asyncio.StreamReader, way: _Way, deliveries: Deliveries
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if not link.swallowed:
                    await way.put(deliveries.up(data))
        self._one_end_closed(link, link.client, way)

    async def _pump_down(
        self, link: _Link, reader: asyncio.StreamReader, way: _Way, deliveries: Deliveries
    ) -> None:
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def release() -> None:
            nonlocal timer
            timer = None
            data = deliveries.wake(loop.time())
            if not link.swallowed:
                way.put_nowait(data)
            arm()

        def arm() -> None:
            nonlocal timer
            deadline = deliveries.deadline()
            if deadline is not None and timer is None:
                timer = loop.call_at(deadline + 0.001, release)

        try:
            with suppress(OSError):
                while data := await reader.read(CHUNK_BYTES):
                    if not link.swallowed:
                        await way.put(deliveries.down(data, loop.time()))
                        arm()
        finally:
            if timer is not None:
                timer.cancel()
        assert link.broker is not None
        self._one_end_closed(link, link.broker, way)

    def _one_end_closed(self, link: _Link, own: asyncio.StreamWriter, way: _Way) -> None:
        """Half open: the other end is not told. Otherwise what is under way still arrives."""
        link.ends_closed += 1
        if not link.swallowed:
            way.end()
            return
        own.transport.abort()
        if link.ends_closed == len((link.client, link.broker)):
            for task in link.tasks:
                task.cancel()


def _abort(link: _Link, *, reset: bool = False) -> None:
    for writer in (link.client, link.broker):
        if writer is None:
            continue
        if reset and (end := writer.get_extra_info("socket")) is not None:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        writer.transport.abort()
