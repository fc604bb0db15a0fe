"""AMQP 0-9-1 on the wire, as far as a proxy must know it to repeat and to reorder deliveries.

Theory of operation. A client must see the delivery tags of a channel rise one by one, and the
broker must see each of its own tags settled once. So what goes to the client gets tags of its own:
`Deliveries` remembers which of them stands for which of the broker's (for none, if it is a copy),
and translates acknowledgements on their way back. What is held back loses its place in the order;
if its channel ends first it is dropped, as on any lost line: the broker gives it out again.

No socket and no clock here: bytes and times go in, bytes come out.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

METHOD, HEADER, BODY = 1, 2, 3
FRAME_END = 0xCE
HEAD = struct.Struct(">BHI")
TAG = struct.Struct(">Q")
PROTOCOL_HEADER_BYTES = 8
CHANNEL_OPEN = (20, 10)
DELIVER = (60, 60)
GET_OK = (60, 71)
ACK, REJECT, NACK = (60, 80), (60, 90), (60, 120)
PAYLOAD = HEAD.size
"""Where a frame's payload begins."""


@dataclass(slots=True)
class FrameReader:
    """Cuts a stream of bytes into frames; what is no frame at its beginning passes as it is."""

    greeting: bool
    """The client's side begins with the protocol's header."""
    _rest: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Whole frames, and the greeting."""
        rest = self._rest
        rest += data
        if self.greeting:
            if len(rest) < PROTOCOL_HEADER_BYTES:
                return
            self.greeting = False
            yield bytes(rest[:PROTOCOL_HEADER_BYTES])
            del rest[:PROTOCOL_HEADER_BYTES]
        start = 0
        while len(rest) - start >= HEAD.size:
            size = HEAD.unpack_from(rest, start)[2] + HEAD.size + 1
            if len(rest) - start < size:
                break
            yield bytes(rest[start : start + size])
            start += size
        del rest[:start]


@dataclass(slots=True)
class Mischief:
    """What is done to deliveries now; shared by the connections of one service."""

    duplicate: float = 0.0
    """Share of messages that come twice,"""
    reorder: float = 0.0
    """and of those that are overtaken by later ones."""
    hold_s: float = 0.5
    """Late ones, and half of the copies, are late by so much at most."""


@dataclass(slots=True)
class _Message:
    """A delivery whose frames are not all here yet, or that is held back."""

    frames: list[bytes]
    tag_at: int
    left: int = -1
    """Bytes of its body to come; -1: the header too."""


@dataclass(slots=True)
class _Channel:
    """Tags of one channel."""

    last: int = 0
    """The last tag that the client saw."""
    open: dict[int, int | None] = field(default_factory=dict)
    """Tags that the client has not settled: the broker's tag, or None for a copy."""
    clean: bool = True
    """The client's tags are the broker's, so far."""
    coming: _Message | None = None


@dataclass(slots=True)
class Counts:
    """What was done to one service's messages."""

    messages: int = 0
    duplicated: int = 0
    reordered: int = 0


class Deliveries:
    """One connection's deliveries and acknowledgements."""

    def __init__(self, mischief: Mischief, rng: Random, counts: Counts) -> None:
        self._mischief = mischief
        self._rng = rng
        self._counts = counts
        self._down, self._up = FrameReader(greeting=False), FrameReader(greeting=True)
        self._channels: dict[int, _Channel] = {}
        self._held: list[tuple[float, int, _Message, int | None]] = []
        """When, on which channel, what, and the broker's tag."""

    def deadline(self) -> float | None:
        """When to call `wake`."""
        return min((due for due, *_ in self._held), default=None)

    def wake(self, now: float) -> bytes:
        """What was held back until now."""
        due = sorted((h for h in self._held if h[0] <= now), key=lambda h: h[0])
        self._held = [held for held in self._held if held[0] > now]
        return b"".join(self._emit(number, message, tag) for _, number, message, tag in due)

    def down(self, data: bytes, now: float) -> bytes:
        """From the broker to the client."""
        return b"".join(self._from_broker(frame, now) for frame in self._down.feed(data))

    def up(self, data: bytes) -> bytes:
        """From the client to the broker."""
        return b"".join(self._from_client(frame) for frame in self._up.feed(data))

    # ---------------------------------------------------------------------------- to the client

    def _from_broker(self, frame: bytes, now: float) -> bytes:
        kind, number, _ = HEAD.unpack_from(frame)
        if kind == METHOD:
            method = struct.unpack_from(">HH", frame, PAYLOAD)
            if method == DELIVER:
                tag_at = PAYLOAD + 5 + frame[PAYLOAD + 4]
                self._channel(number).coming = _Message([frame], tag_at)
                return b""
            if method == GET_OK:
                return self._emit(number, _Message([frame], PAYLOAD + 4), _tag(frame, PAYLOAD + 4))
            return frame
        channel = self._channels.get(number)
        message = None if channel is None else channel.coming
        if channel is None or message is None or kind not in (HEADER, BODY):
            return frame
        message.frames.append(frame)
        if kind == HEADER:
            message.left = TAG.unpack_from(frame, PAYLOAD + 4)[0]
        else:
            message.left -= len(frame) - HEAD.size - 1
        if message.left:
            return b""
        channel.coming = None
        return self._deliver(number, message, now)

    def _deliver(self, number: int, message: _Message, now: float) -> bytes:
        self._counts.messages += 1
        mischief, rng = self._mischief, self._rng
        tag = _tag(message.frames[0], message.tag_at)
        if mischief.reorder and rng.random() < mischief.reorder:
            self._counts.reordered += 1
            self._hold(number, message, tag, now)
            return b""
        out = self._emit(number, message, tag)
        if mischief.duplicate and rng.random() < mischief.duplicate:
            self._counts.duplicated += 1
            if rng.random() < 0.5:
                return out + self._emit(number, message, None)
            self._hold(number, message, None, now)
        return out

    def _hold(self, number: int, message: _Message, tag: int | None, now: float) -> None:
        due = now + self._rng.uniform(0.0, self._mischief.hold_s)
        self._held.append((due, number, message, tag))
        self._channel(number).clean = False

    def _emit(self, number: int, message: _Message, tag: int | None) -> bytes:
        """The frames, with the client's next tag in place of the broker's."""
        channel = self._channel(number)
        channel.last += 1
        channel.open[channel.last] = tag
        if tag != channel.last:
            channel.clean = False
        first = bytearray(message.frames[0])
        TAG.pack_into(first, message.tag_at, channel.last)
        return b"".join((bytes(first), *message.frames[1:]))

    # ---------------------------------------------------------------------------- to the broker

    def _from_client(self, frame: bytes) -> bytes:
        if len(frame) <= PROTOCOL_HEADER_BYTES or frame[0] != METHOD:
            return frame
        number = HEAD.unpack_from(frame)[1]
        method = struct.unpack_from(">HH", frame, PAYLOAD)
        if method == CHANNEL_OPEN:
            self._channels.pop(number, None)
            self._held = [held for held in self._held if held[1] != number]
        elif method in (ACK, NACK, REJECT) and number in self._channels:
            multiple = method != REJECT and bool(frame[PAYLOAD + 12] & 1)
            return self._settle(self._channels[number], frame, multiple)
        return frame

    def _settle(self, channel: _Channel, frame: bytes, multiple: bool) -> bytes:
        """The same about the broker's tags, one by one where they are not the client's."""
        tag = _tag(frame, PAYLOAD + 4) or channel.last
        if not multiple:
            covered = [tag] if tag in channel.open else []
        else:
            covered = []
            for one in channel.open:  # in rising order
                if one > tag:
                    break
                covered.append(one)
        settled = [channel.open.pop(one) for one in covered]
        if channel.clean:
            return frame
        out = bytearray()
        for broker_tag in settled:
            if broker_tag is not None:
                single = bytearray(frame)
                TAG.pack_into(single, PAYLOAD + 4, broker_tag)
                if multiple:
                    single[PAYLOAD + 12] &= ~1
                out += single
        return bytes(out)

    def _channel(self, number: int) -> _Channel:
        return self._channels.setdefault(number, _Channel())


def _tag(frame: bytes, at: int) -> int:
    tag: int = TAG.unpack_from(frame, at)[0]
    return tag
