"""Garbage on every queue of a serving mesh: it is put aside and counted, and the mesh serves on."""

import asyncio
from random import Random

import aio_pika
import httpx

from shared import messages
from shared.bus.api import DEAD_LETTER_QUEUE
from shared.bus.topology import EPOCH_QUEUE
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh, live_mesh
from tests.rabbitmq import Management

PER_QUEUE = 500
TIMEOUT_S = 60.0
COUNTER = "tranche_bus_dead_lettered_messages_total"


def garbage(number: int, rng: Random) -> bytes:
    """One of seven kinds of bytes that are no message."""
    spec = messages.RequestSpec(
        request_id="r", parent_id="r", gateway="g", model="m", prompt=b"", max_tokens=1
    )
    valid = messages.encode(messages.Submit(spec=spec))
    kinds = (
        b"",
        rng.randbytes(rng.randrange(1, 400)),
        valid[: rng.randrange(1, len(valid))],
        valid + b"\x00",
        valid.replace(b"max_tokens", b"max_tokenz"),
        valid.replace(b"Submit", b"Sabmit"),
        b'{"type": "Submit", "spec": {}}' + rng.randbytes(3),
    )
    return kinds[number % len(kinds)]


async def throw(url: str, queues: list[str]) -> None:
    """PER_QUEUE pieces into each queue, past all exchanges, confirmed."""
    connection = await aio_pika.connect(url)
    async with connection:
        exchange = (await connection.channel()).default_exchange
        for queue in queues:
            rng = Random(queue)
            pieces = [aio_pika.Message(garbage(number, rng)) for number in range(PER_QUEUE)]
            await asyncio.gather(*(exchange.publish(p, queue, timeout=TIMEOUT_S) for p in pieces))


async def dead_letters(url: str) -> int:
    """How many lie in the dead-letter queue."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(DEAD_LETTER_QUEUE, passive=True)
        return declared.declaration_result.message_count or 0


async def wait_for_dead_letters(url: str, wanted: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while await dead_letters(url) < wanted:
            await asyncio.sleep(0.2)
    assert await dead_letters(url) == wanted


def counted(mesh: LiveMesh) -> float:
    """What the mesh itself counted."""
    lines = httpx.get(f"{mesh.url}/metrics", timeout=TIMEOUT_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(COUNTER + "{"))


def test_garbage_on_every_queue_is_dead_lettered_and_the_mesh_serves_on(
    broker_url: str, management: Management
) -> None:
    question = Question((1, 5, 6), 12)
    with live_mesh(broker_url, workers=2) as mesh:
        before = ask_all(mesh.url, [question])
        vhost = broker_url.rsplit("/", 1)[1]
        listed = management.call("GET", f"/api/queues/{vhost}")
        assert isinstance(listed, list)
        consumed = sorted(
            str(queue["name"])
            for queue in listed
            if queue["name"] not in (DEAD_LETTER_QUEUE, EPOCH_QUEUE)
        )
        assert len(consumed) >= 6, consumed  # scheduler, estimator (2), gateway, two workers
        asyncio.run(throw(broker_url, consumed))
        asyncio.run(wait_for_dead_letters(broker_url, PER_QUEUE * len(consumed)))
        assert counted(mesh) == PER_QUEUE * len(consumed)
        assert ask_all(mesh.url, [question]) == before


def test_garbage_beside_the_epoch_does_not_lower_it(broker_url: str) -> None:
    with live_mesh(broker_url):
        pass
    asyncio.run(throw(broker_url, [EPOCH_QUEUE]))
    with live_mesh(broker_url) as mesh:
        assert ask_all(mesh.url, [Question((1, 5, 6), 4)])
        lines = httpx.get(f"{mesh.url}/metrics", timeout=TIMEOUT_S).text.splitlines()
        epochs = [line for line in lines if line.startswith("tranche_epoch")]
        assert epochs, lines
        assert float(epochs[0].rsplit(" ", 1)[1]) == 2
    asyncio.run(wait_for_dead_letters(broker_url, PER_QUEUE))


def test_the_garbage_is_garbage() -> None:
    rng = Random(0)
    for number in range(200):
        try:
            decoded = messages.decode(garbage(number, rng))
        except messages.msgspec.DecodeError:
            continue
        raise AssertionError(f"{number} is a message: {decoded}")
