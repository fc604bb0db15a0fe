"""Broken messages into every queue of a live mesh over RabbitMQ, while requests run.

    python -m tests.fuzz.live --messages 5000

The whole mesh runs in this process, with the engine `simulated`, whose texts depend on seeds and
positions alone: so each text is compared with the one of a quiet mesh. A message goes under keys
and into queues of services that are really there, as from a member of the mesh gone mad. Left out
are bytes that happen to be a beat of the leader, or an order with an epoch above its own: whoever
has the scheduler's account is the scheduler, and is obeyed; and beats in a real worker's name: what
a worker says of itself, its model and its context, is believed, and refuses requests. At the end
another scheduler takes over, with an epoch from a queue that was full of rubbish.
"""

import argparse
import asyncio
import json
import os
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from threading import Thread

import aiormq
import msgspec
from aiormq import spec
from aiormq.exceptions import DeliveryError, PublishError

from shared.bus.api import DEAD_LETTER_EXCHANGE, DEAD_LETTER_QUEUE
from shared.bus.topology import (
    ASKS,
    BEAT,
    EPOCH_QUEUE,
    FINISHED,
    HISTORY,
    INBOX,
    NOTICES,
    ORDERS,
    TOKENS,
)
from shared.messages import AnyMessage, Message, SchedulerBeat, decode, encode
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import live_mesh
from tests.fuzz.mutate import mutated, valid
from tests.rabbitmq import Broker, Management, make_broker, management_of

TOKENS_EACH = 60
QUESTIONS = [
    Question(tuple(range(10, 15 + number)), TOKENS_EACH, temperature=1.0, seed=7919 * number)
    for number in range(8)
]
SETTLE_S = 20.0
TARGETS = 16
"""With one gateway, one estimator and two workers."""
SCHEDULERS = (ORDERS, NOTICES, HISTORY)
READ = (*SCHEDULERS, INBOX, ASKS, TOKENS)
"""What services read, and condemn what they do not understand."""


@dataclass
class Found:
    """What came of it."""

    sent: Counter[str] = field(default_factory=Counter)
    """By exchange."""
    undecodable: int = 0
    left_out: int = 0
    rounds: int = 0
    """Of requests that ran meanwhile."""
    wrong: int = 0
    """Texts that differ from the quiet mesh's."""
    faults: list[str] = field(default_factory=list)
    dead_letters: int = 0
    waiting: int = 0
    """Messages left in the shared queues."""


def quiet_texts() -> list[list[list[int]]]:
    """Of a mesh that nobody disturbs."""
    with live_mesh(**_simulated()) as mesh:
        return ask_all(mesh.url, QUESTIONS)


def fuzz(management: Management, vhost: str, messages: int, seed: int) -> Found:
    """Raises MeshFailed if a service of the mesh dies."""
    wanted, found = quiet_texts(), Found()
    with live_mesh(management.vhost_url(vhost), workers=2, **_simulated()) as mesh:
        over = False

        def ask() -> None:
            while not over:
                try:
                    texts = ask_all(mesh.url, QUESTIONS)
                except BaseException as error:  # whatever a client may see
                    found.faults.append(repr(error)[:300])
                else:
                    found.wrong += sum(a != b for a, b in zip(texts, wanted, strict=True))
                found.rounds += 1

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asyncio.run(_send_all(management, vhost, messages, seed, found))
        over = True
        asking.join(120)
        assert not asking.is_alive(), "a request hangs"
        mesh.replace_scheduler()
        after = ask_all(mesh.url, QUESTIONS)
        found.wrong += sum(a != b for a, b in zip(after, wanted, strict=True))
        _await_settled(management, vhost, found)
        found.dead_letters = _depth(management, vhost, DEAD_LETTER_QUEUE)
        if not mesh.alive:
            found.faults.append("a service of the mesh has ended")
    return found


async def _send_all(
    management: Management, vhost: str, messages: int, seed: int, found: Found
) -> None:
    chance = Random(seed)
    connection = await aiormq.connect(management.vhost_url(vhost))
    channel = await connection.channel()
    async with asyncio.timeout(SETTLE_S):
        while len(targets := _targets(management, vhost)) < TARGETS:
            await asyncio.sleep(0.1)  # the estimator may join after the gateway is ready
    number = 0
    while found.sent.total() < messages:
        exchange, key = targets[number % len(targets)]
        number += 1
        body = mutated(chance, encode(_as_from(chance, key, valid(chance))))
        try:
            message = decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found.undecodable += exchange in READ
        else:
            if exchange in SCHEDULERS and _commands(message):
                found.left_out += 1
                continue
        with suppress(PublishError, DeliveryError):
            await channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=key,
                properties=spec.Basic.Properties(message_id=f"fuzz-{seed}-{number}"),
            )
        found.sent[exchange] += 1
    await connection.close()


def _commands(message: AnyMessage) -> bool:
    """Whether the leader itself might have said it."""
    epoch = getattr(message, "epoch", 0)
    return epoch > 1 or (epoch == 1 and isinstance(message, SchedulerBeat))


def _as_from(chance: Random, key: str, message: Message) -> Message:
    """Every second message names who is really there: it comes past the check of its sender."""
    kind, _, boot_id = key.partition(".")
    changes = {name: boot_id for name in (kind, "host") if hasattr(message, name)}
    return msgspec.structs.replace(message, **changes) if chance.random() < 0.5 else message


def _targets(management: Management, vhost: str) -> list[tuple[str, str]]:
    """Every exchange, under keys that somebody listens to or speaks under."""
    queues = [name.split(".", 2) for name in _queues(management, vhost)]
    own = {
        kind: [part[2] for part in queues if part[:2] == ["tranche", kind] and len(part) == 3]
        for kind in ("gateway", "worker", "estimator")
    }
    targets = [(NOTICES, BEAT), (ORDERS, BEAT), (HISTORY, BEAT), (HISTORY, FINISHED)]
    targets += [("", EPOCH_QUEUE), (DEAD_LETTER_EXCHANGE, "x")]
    for worker in own["worker"]:
        key = f"worker.{worker}"
        targets += [(INBOX, key), (ORDERS, key), (ASKS, key)]
    for gateway in own["gateway"]:
        key = f"gateway.{gateway}"
        targets += [(INBOX, key), (NOTICES, key), (TOKENS, key)]
    for estimator in own["estimator"]:
        targets.append((INBOX, f"estimator.{estimator}"))
    return targets


def _queues(management: Management, vhost: str) -> dict[str, int]:
    """Their messages, by name."""
    listed = management.call("GET", f"/api/queues/{vhost}")
    assert isinstance(listed, list)
    return {str(queue["name"]): int(queue.get("messages", 0)) for queue in listed}


def _depth(management: Management, vhost: str, queue: str) -> int:
    """Counted by a passive declaration: the management interface is seconds behind."""

    async def count() -> int:
        connection = await aiormq.connect(management.vhost_url(vhost))
        channel = await connection.channel()
        declared = await channel.queue_declare(queue, passive=True)
        await connection.close()
        return declared.message_count or 0

    return asyncio.run(count())


def _await_settled(management: Management, vhost: str, found: Found) -> None:
    """Until the shared queues are read, and every undecodable message is a dead letter."""
    expected = found.undecodable + found.sent[DEAD_LETTER_EXCHANGE]
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        found.waiting = sum(
            _depth(management, vhost, queue) for queue in ("tranche.scheduler", "tranche.estimator")
        )
        if not found.waiting and _depth(management, vhost, DEAD_LETTER_QUEUE) >= expected:
            return
        time.sleep(0.1)


def _simulated() -> dict[str, object]:
    return {
        "policy": "past-future",
        "engine": "simulated",
        "simulated_lengths": "mean=100000",
        "simulated_speed": 20,
    }


def report(found: Found, seed: int) -> str:
    """As JSON."""
    told = {**msgspec.to_builtins(found), "seed": seed, "messages": found.sent.total()}
    return json.dumps(told, indent=2)


def main() -> None:
    """The command line; with the broker that AMQP_URL names, or else one of our own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outside = os.environ.get("AMQP_URL")
    if outside:
        _run(management_of(outside), arguments.messages, arguments.seed)
        return
    broker: Broker = make_broker()
    try:
        broker.start()
        _run(broker.management, arguments.messages, arguments.seed)
    finally:
        broker.close()


def _run(management: Management, messages: int, seed: int) -> None:
    vhost = f"fuzz-{uuid.uuid4().hex}"
    management.create_vhost(vhost)
    try:
        print(report(fuzz(management, vhost, messages, seed), seed))
    finally:
        management.delete_vhost(vhost)


if __name__ == "__main__":
    main()
