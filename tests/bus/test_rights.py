"""RabbitMQ only: each kind of service has an account that can do its own work and nothing else.

Two connections of the workers' one account: neither reads, takes or says what is the other's.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource

from shared.bus.api import DEAD_LETTER_EXCHANGE, DEAD_LETTER_QUEUE, Bus, QueueSpec, Unroutable
from shared.bus.connect import make_bus
from shared.bus.identity import new_id, public_id
from shared.bus.rabbit_epoch import LOCK_QUEUE
from shared.bus.rights import ROLES, Account, definitions, new_password
from shared.bus.topology import (
    ASKS,
    EPOCH_QUEUE,
    ESTIMATOR_QUEUE,
    EXCHANGES,
    HISTORY,
    INBOX,
    NOTICES,
    ORDERS,
    SCHEDULER_QUEUE,
    TOKENS,
    Address,
    estimator_beat_queue,
    from_estimator,
    from_gateway,
    from_worker,
    gateway_queue,
    host_queue,
    hosted_worker,
    worker_queue,
)
from tests.bus.place import Inbox, eventually, numbered
from tests.rabbitmq import Management

REFUSED = (ChannelAccessRefused, ChannelLockedResource)
SHARED_QUEUES = (SCHEDULER_QUEUE.name, ESTIMATOR_QUEUE.name, EPOCH_QUEUE, DEAD_LETTER_QUEUE)


@dataclass(frozen=True)
class Guarded:
    """A virtual host with an account per role."""

    management: Management
    vhost: str
    accounts: dict[str, Account]

    def url(self, role: str) -> str:
        """The address for services of this role."""
        parts = urlsplit(self.management.amqp_url)
        account = self.accounts[role]
        host = parts.netloc.rpartition("@")[2]
        return f"amqp://{account.name}:{account.password}@{host}/{quote(self.vhost, safe='')}"


@pytest.fixture
def guarded(management: Management) -> Iterator[Guarded]:
    """Made as an operator would: by importing the definitions into an empty virtual host."""
    mark = uuid.uuid4().hex[:12]
    vhost = f"guarded-{mark}"
    accounts = {role: Account(f"{role}-{mark}", new_password()) for role in ROLES}
    management.create_vhost(vhost)
    management.call("POST", "/api/definitions", definitions(accounts, vhost))
    yield Guarded(management, vhost, accounts)
    management.delete_vhost(vhost)
    for account in accounts.values():
        management.call("DELETE", f"/api/users/{account.name}")


class Cracker:
    """A client with an account's password and no manners: every attempt has a channel of its own,
    since a refusal ends it."""

    def __init__(self, connection: aiormq.abc.AbstractConnection) -> None:
        self._connection = connection

    async def channel(self) -> AbstractChannel:
        return await self._connection.channel(on_return_raises=True)

    async def may(self, verb: str, *arguments: object, **options: object) -> bool:
        """Whether the broker lets us."""
        channel = await self.channel()
        try:
            await getattr(channel, verb)(*arguments, **options)
        except REFUSED:
            return False
        await channel.close()
        return True

    async def may_publish(self, exchange: str, key: str) -> bool:
        return await self.may("basic_publish", b"x", exchange=exchange, routing_key=key)

    async def may_read(self, queue: str) -> bool:
        """By any means."""
        consumed = await self.may("basic_consume", queue, _nothing, no_ack=True)
        fetched = await self.may("basic_get", queue, no_ack=True)
        return consumed or fetched

    async def own_queue(self, kind: str, boot_id: str) -> str:
        """An exclusive queue under a name that the account may use."""
        name = f"tranche.{kind}.{boot_id}"
        assert await self.may("queue_declare", name, exclusive=True)
        return name


async def _nothing(_: object) -> None:
    pass


@contextlib.asynccontextmanager
async def cracker(url: str) -> AsyncIterator[Cracker]:
    connection = await aiormq.connect(url)
    yield Cracker(connection)
    await connection.close()


@contextlib.asynccontextmanager
async def bus(url: str) -> AsyncIterator[Bus]:
    made = make_bus(url, service="test")
    await made.open()
    yield made
    await made.close()


async def test_a_worker_cannot_read_another_worker_s_orders(guarded: Guarded) -> None:
    victim, own = new_id("worker-1"), new_id("worker-2")
    url = guarded.url("worker")
    orders = Inbox()
    async with (
        bus(url) as worker,
        bus(guarded.url("scheduler")) as scheduler,
        cracker(url) as thief,
    ):
        await worker.consume(worker_queue(victim), orders)
        queue = worker_queue(victim).name
        assert not await thief.may_read(queue)
        for verb in ("queue_purge", "queue_delete"):
            assert not await thief.may(verb, queue)
        assert not await thief.may("queue_bind", queue, ORDERS, f"worker.{victim}")
        mine = await thief.own_queue("worker", own)
        for pattern in (
            *("#", "*.*", "worker.#", "worker.*", "#.#", "", f"worker.{public_id(victim)}"),
            *(f"worker.{public_id(victim)}*", f"*.{victim}", f"worker.{victim}.#", "worker.*.*"),
        ):
            assert not await thief.may("queue_bind", mine, ORDERS, pattern), pattern
            assert not await thief.may("queue_bind", mine, ASKS, pattern), pattern
        for exchange in (INBOX, TOKENS, NOTICES, HISTORY, DEAD_LETTER_EXCHANGE):
            for key in ("#", f"worker.{own}", "beat", "finished", ""):
                assert not await thief.may("queue_bind", mine, exchange, key), (exchange, key)
        assert await thief.may("queue_bind", mine, ORDERS, f"worker.{own}"), "what is its own"
        await scheduler.publish(Address(ORDERS, f"worker.{victim}"), numbered(1))
        await orders.until(1)
        got = await (await thief.channel()).basic_get(mine, no_ack=True)
        assert not got.body


async def test_a_worker_cannot_read_shared_queues(guarded: Guarded) -> None:
    boot = new_id("gateway")
    async with bus(guarded.url("gateway")) as gateway, cracker(guarded.url("worker")) as thief:
        await gateway.consume(gateway_queue(boot), Inbox())
        for queue in (*SHARED_QUEUES, f"tranche.gateway.{boot}"):
            assert not await thief.may_read(queue), queue
            assert not await thief.may("queue_purge", queue), queue
            assert not await thief.may("queue_delete", queue), queue
            assert not await thief.may("queue_bind", queue, ORDERS, "beat"), queue
        assert not await thief.may("queue_declare", f"tranche.gateway.{new_id('g')}")
        assert not await thief.may("queue_declare", "anything")
        assert not await thief.may("queue_declare", LOCK_QUEUE, exclusive=True)
        for exchange in (*EXCHANGES, DEAD_LETTER_EXCHANGE):
            assert not await thief.may("exchange_delete", exchange), exchange
            assert not await thief.may("exchange_bind", "tranche.tokens", exchange, "#"), exchange


async def test_a_worker_cannot_speak_as_anybody_else(guarded: Guarded) -> None:
    gateway, other, own = new_id("gateway"), new_id("worker-1"), new_id("worker-2")
    async with cracker(guarded.url("worker")) as forger:
        for exchange, key in (
            (INBOX, f"gateway.{gateway}"),
            (INBOX, "gateway"),
            (INBOX, f"estimator.{new_id('estimator')}"),
            (INBOX, f"worker.{public_id(other)}"),
            (INBOX, "worker"),
            (INBOX, ""),
            (ORDERS, f"worker.{other}"),
            (ORDERS, "beat"),
            (NOTICES, f"gateway.{gateway}"),
            (NOTICES, "beat"),
            (ASKS, f"worker.{other}"),
            (HISTORY, "finished"),
            (HISTORY, "beat"),
            (DEAD_LETTER_EXCHANGE, "x"),
            (DEAD_LETTER_EXCHANGE, ""),
            ("", SCHEDULER_QUEUE.name),
            ("", f"tranche.worker.{other}"),
            ("amq.topic", "x"),
        ):
            assert not await forger.may_publish(exchange, key), (exchange, key)
        assert await forger.may_publish(INBOX, f"worker.{own}"), "what is its own"
        assert await forger.may_publish(INBOX, f"worker.{hosted_worker(own, 3)}")


SAYS = {
    "gateway": {INBOX: "gateway", ASKS: "worker"},
    "estimator": {INBOX: "estimator"},
    "scheduler": {ORDERS: "worker", NOTICES: "gateway", HISTORY: ""},
    "worker": {INBOX: "worker", TOKENS: "gateway"},
}


@pytest.mark.parametrize("role", ROLES)
async def test_every_account_publishes_where_it_must_and_nowhere_else(
    guarded: Guarded, role: str
) -> None:
    keys = {kind: f"{kind}.{new_id(kind)}" for kind in ("gateway", "worker", "estimator")}
    async with cracker(guarded.url(role)) as client:
        for exchange in EXCHANGES:
            for kind, key in keys.items():
                told = await _may_say(client, exchange, key)
                assert told == (SAYS[role].get(exchange) == kind), (exchange, key)
            assert await _may_say(client, exchange, "beat") == (
                role == "scheduler" and exchange in SAYS[role]
            )
        assert not await _may_say(client, DEAD_LETTER_EXCHANGE, "x")
        assert not await client.may("exchange_declare", "new", exchange_type="topic")
        assert not await client.may("queue_declare", "new")
        readable = {
            "scheduler": {SCHEDULER_QUEUE.name, EPOCH_QUEUE},
            "estimator": {ESTIMATOR_QUEUE.name},
        }.get(role, set())
        for queue in SHARED_QUEUES:
            assert await client.may_read(queue) == (queue in readable), queue


async def _may_say(client: Cracker, exchange: str, key: str) -> bool:
    try:
        return await client.may_publish(exchange, key)
    except aiormq.exceptions.PublishError:
        return True  # let through, and nobody is there


async def test_services_work_with_their_accounts(guarded: Guarded) -> None:
    """Through the bus: every queue is read, every exchange carries, the epoch rises."""
    gateway, worker, host = new_id("gateway"), new_id("worker-1"), new_id("many")
    estimator = new_id("estimator")
    inboxes = {name: Inbox() for name in ("s", "e", "eb", "g", "w", "h")}
    async with (
        bus(guarded.url("gateway")) as g,
        bus(guarded.url("scheduler")) as s,
        bus(guarded.url("estimator")) as e,
        bus(guarded.url("worker")) as w,
    ):
        for each in (g, s, w):
            await each.declare(SCHEDULER_QUEUE)
        await s.declare(ESTIMATOR_QUEUE)
        epoch = await s.raise_epoch()
        assert await s.raise_epoch() == epoch + 1
        reading: list[tuple[Bus, QueueSpec, str]] = [
            *((s, SCHEDULER_QUEUE, "s"), (e, ESTIMATOR_QUEUE, "e")),
            *((e, estimator_beat_queue(estimator), "eb"), (g, gateway_queue(gateway), "g")),
            *((w, worker_queue(worker), "w"), (w, host_queue(host), "h")),
        ]
        for reader, spec, name in reading:
            await reader.consume(spec, inboxes[name])
        member = hosted_worker(host, 7)
        saying = [
            *((g, from_gateway(gateway)), (w, from_worker(worker)), (w, from_worker(member))),
            *((e, from_estimator(estimator)), (s, Address(ORDERS, f"worker.{worker}"))),
            *((s, Address(ORDERS, f"worker.{member}")), (s, Address(ORDERS, "beat"))),
            *((s, Address(NOTICES, f"gateway.{gateway}")), (s, Address(NOTICES, "beat"))),
            *((s, Address(HISTORY, "finished")), (s, Address(HISTORY, "beat"))),
            *((w, Address(TOKENS, f"gateway.{gateway}")), (g, Address(ASKS, f"worker.{worker}"))),
            (g, Address(ASKS, f"worker.{host}")),
        ]
        for speaker, address in saying:
            await speaker.publish(address, numbered(1))
        counts = {"s": 4, "e": 1, "eb": 1, "g": 3, "w": 3, "h": 3}
        await eventually(
            lambda: {name: len(inbox.deliveries) for name, inbox in inboxes.items()} == counts
        )
        with pytest.raises(Unroutable):
            await s.publish(Address(ORDERS, f"worker.{new_id('gone')}"), numbered(1))


async def test_the_scheduler_of_a_restarted_mesh_goes_on_counting(guarded: Guarded) -> None:
    epochs = []
    for _ in range(3):
        async with bus(guarded.url("scheduler")) as scheduler:
            epochs.append(await scheduler.raise_epoch())
    assert epochs == [1, 2, 3]


async def test_a_broker_without_the_definitions_is_told(guarded: Guarded) -> None:
    """An account that may not declare meets a virtual host in which nothing is declared."""
    await asyncio.to_thread(
        guarded.management.call, "DELETE", f"/api/exchanges/{guarded.vhost}/{TOKENS}"
    )
    made = make_bus(guarded.url("worker"), service="test")
    with pytest.raises(Exception, match=r"not set up within.*tranche\.tokens"):
        await made.open(deadline_s=3.0)
