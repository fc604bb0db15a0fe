"""The proxy between a service and the broker, with an echo in the broker's place."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench.chaos.line import Line

GREETING = b"AMQP\x00\x00\x09\x01"
"""Eight bytes that pass as they are; the echo's answer then is no frame and is not parsed: short
texts would wait for a whole frame, so what is sent here are whole frames."""
SHORT_S = 0.3
OPEN: list[asyncio.StreamWriter] = []
"""The clients' ends, closed after each test."""


def frame(text: bytes) -> bytes:
    """A heartbeat-like frame of an unknown kind with this payload."""
    return b"\x08\x00\x00" + len(text).to_bytes(4, "big") + text + b"\xce"


class Far:
    """What listens behind the proxy: answers every frame with itself, without the greeting."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            await reader.readexactly(len(GREETING))
            while data := await reader.read(1024):
                writer.write(data)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended.set()
            writer.close()


@pytest.fixture
async def far() -> Far:
    return Far()


@pytest.fixture
async def line(far: Far) -> AsyncIterator[Line]:
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    made = Line("test", server.sockets[0].getsockname()[1], "1")
    await made.open()
    yield made
    await made.close()
    server.close()
    for writer in (*OPEN, *far.writers):
        writer.transport.abort()
    OPEN.clear()
    await asyncio.sleep(0)  # transports tell their sockets in the loop's next turn


async def connected(line: Line) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
    OPEN.append(writer)
    writer.write(GREETING + frame(b"hello"))
    assert await hears(reader, frame(b"hello"))
    return reader, writer


async def hears(reader: asyncio.StreamReader, wanted: bytes, within_s: float = 5.0) -> bool:
    """Whether just this comes in time."""
    try:
        async with asyncio.timeout(within_s):
            return await reader.readexactly(len(wanted)) == wanted
    except TimeoutError:
        return False


async def test_bytes_pass_both_ways(line: Line) -> None:
    await connected(line)


async def test_a_cut_resets_the_client_and_tells_the_far_end(line: Line, far: Far) -> None:
    reader, _ = await connected(line)
    assert line.cut(one=False) == 1
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    await asyncio.wait_for(far.ended.wait(), 5)
    await connected(line)  # the next one is well


async def test_a_half_open_line_swallows_and_tells_nobody(line: Line, far: Far) -> None:
    reader, writer = await connected(line)
    assert line.half_open(one=True) == 1
    writer.write(frame(b"lost"))
    far.writers[0].write(frame(b"lost too"))
    assert not await hears(reader, frame(b"lost"), SHORT_S)
    far.writers[0].close()
    assert not await hears(reader, b"x", SHORT_S)  # no end either
    await connected(line)


async def test_delay_and_slowness_take_their_time_and_pass(line: Line) -> None:
    reader, writer = await connected(line)
    loop = asyncio.get_running_loop()
    line.delay_s = 0.2
    began = loop.time()
    writer.write(frame(b"late"))
    assert await hears(reader, frame(b"late"))
    assert loop.time() - began >= 0.4  # both ways
    line.heal()
    line.bytes_per_s = 10_000
    began = loop.time()
    writer.write(frame(b"x" * 2_000))
    assert await hears(reader, frame(b"x" * 2_000))
    assert loop.time() - began >= 0.2
