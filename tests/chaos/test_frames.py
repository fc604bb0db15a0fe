"""Deliveries through the proxy: tags rise, everything arrives, each is settled once.

A small broker and a small client that know tags only; the frames are real ones of pamqp.
"""

from random import Random

import pamqp.frame
from hypothesis import given, settings, strategies as st
from pamqp import body, commands, header

from bench.chaos.frames import Counts, Deliveries, FrameReader, Mischief

CHANNEL = 3


def delivery(tag: int, text: bytes, pieces: int = 1) -> bytes:
    """A delivery's frames, its body in so many pieces."""
    deliver = commands.Basic.Deliver("ctag1", tag, False, "tranche.orders", "worker.w")
    head = header.ContentHeader(body_size=len(text), properties=commands.Basic.Properties())
    size = max(1, -(-len(text) // pieces))
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    frames = [deliver, head, *(body.ContentBody(part) for part in parts)]
    return b"".join(pamqp.frame.marshal(frame, CHANNEL) for frame in frames)


def said(data: bytes) -> list[tuple[int, bytes]]:
    """Tags and bodies of whole deliveries."""
    found: list[tuple[int, bytes]] = []
    for frame in FrameReader(greeting=False).feed(data):
        what = pamqp.frame.unmarshal(frame)[2]
        if isinstance(what, commands.Basic.Deliver):
            found.append((what.delivery_tag, b""))
        elif isinstance(what, body.ContentBody):
            found[-1] = (found[-1][0], found[-1][1] + what.value)
    return found


def acknowledged(data: bytes) -> list[tuple[int, bool]]:
    """Tags that the broker is told of."""
    frames = [pamqp.frame.unmarshal(f)[2] for f in FrameReader(greeting=False).feed(data)]
    return [(f.delivery_tag, f.multiple) for f in frames if isinstance(f, commands.Basic.Ack)]


def ack(tag: int, *, multiple: bool = False) -> bytes:
    return pamqp.frame.marshal(commands.Basic.Ack(tag, multiple), CHANNEL)


def opened(mischief: Mischief, seed: int = 1) -> Deliveries:
    deliveries = Deliveries(mischief, Random(seed), Counts())
    greeting = b"AMQP\x00\x00\x09\x01"
    opening = pamqp.frame.marshal(commands.Channel.Open(), CHANNEL)
    assert deliveries.up(greeting + opening) == greeting + opening
    return deliveries


def test_without_mischief_bytes_stay_as_they_are() -> None:
    deliveries = opened(Mischief())
    stream = b"".join(delivery(tag, b"x" * tag, pieces=2) for tag in range(1, 9))
    through = b"".join(deliveries.down(stream[at : at + 7], 0.0) for at in range(0, 2000, 7))
    assert through == stream
    assert deliveries.up(ack(5, multiple=True)) == ack(5, multiple=True)
    assert deliveries.up(ack(7)) == ack(7)
    assert deliveries.deadline() is None


def test_a_copy_is_acknowledged_to_nobody() -> None:
    mischief = Mischief(duplicate=1.0, hold_s=1.0)
    deliveries = opened(mischief)
    got = said(deliveries.down(delivery(1, b"one"), 0.0) + deliveries.wake(2.0))
    assert got == [(1, b"one"), (2, b"one")]
    assert acknowledged(deliveries.up(ack(2))) == []
    assert acknowledged(deliveries.up(ack(1))) == [(1, False)]


def test_what_is_held_is_overtaken_and_acknowledged_by_its_own_tag() -> None:
    mischief = Mischief(reorder=1.0)
    deliveries = opened(mischief)
    assert deliveries.down(delivery(1, b"one"), 0.0) == b""
    mischief.reorder = 0.0
    assert said(deliveries.down(delivery(2, b"two"), 0.0)) == [(1, b"two")]
    deadline = deliveries.deadline()
    assert deadline is not None
    assert said(deliveries.wake(deadline)) == [(2, b"one")]
    assert sorted(acknowledged(deliveries.up(ack(2, multiple=True)))) == [(1, False), (2, False)]


def test_a_channel_that_is_opened_anew_forgets_what_was_held() -> None:
    deliveries = opened(Mischief(reorder=1.0))
    deliveries.down(delivery(1, b"one"), 0.0)
    deliveries.up(pamqp.frame.marshal(commands.Channel.Open(), CHANNEL))
    assert deliveries.deadline() is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**16),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
)
def test_everything_arrives_and_each_is_settled_once(
    seed: int, duplicate: float, reorder: float, batches: list[int]
) -> None:
    """The client acknowledges many at once, as ours does; the broker's tags are all covered."""
    deliveries = opened(Mischief(duplicate=duplicate, reorder=reorder), seed)
    got: list[tuple[int, bytes]] = []
    settled: list[int] = []
    last, now = 0, 0.0
    for size in batches:
        for _ in range(size):
            last += 1
            now += 0.05
            got += said(deliveries.down(delivery(last, b"%d" % last, pieces=2), now))
            got += said(deliveries.wake(now))
        if got:
            for tag, multiple in acknowledged(deliveries.up(ack(got[-1][0], multiple=True))):
                known = set(range(1, tag + 1)) - set(settled) if multiple else {tag}
                settled += sorted(known)
    got += said(deliveries.wake(now + 10))
    for tag, multiple in acknowledged(deliveries.up(ack(got[-1][0], multiple=True))):
        settled += sorted(set(range(1, tag + 1)) - set(settled)) if multiple else [tag]
    assert [tag for tag, _ in got] == list(range(1, len(got) + 1))
    assert {int(text) for _, text in got} == set(range(1, last + 1))
    assert sorted(settled) == list(range(1, last + 1))
