"""A few of the broken messages; how to send all of them stands at the head of each module."""

import os
from random import Random
from typing import get_args
from urllib.parse import urlsplit

from shared.bus.api import Delivery
from shared.bus.handling import Received, Verdict, handle
from shared.bus.topology import (
    ASKS,
    HISTORY,
    INBOX,
    NOTICES,
    ORDERS,
    SAID_BY,
    TOKENS,
    said_rightly,
)
from shared.messages import ToGateway, ToWorker, decode, encode
from tests.fuzz import decoders, live
from tests.fuzz.mutate import KINDS, MUTATIONS, nested, valid
from tests.rabbitmq import Management

SEED = int(os.environ.get("TRANCHE_FUZZ_SEED", "20261127"))
DECODED = 4_000
SENT = 192


def test_valid_messages_of_every_kind_are_drawn() -> None:
    chance = Random(SEED)
    for kind in KINDS:
        for _ in range(20):
            message = valid(chance, kind)
            assert decode(encode(message)) == message
    assert {kind.__name__ for kind in KINDS} >= decoders.kinds_of_wire()


def test_mutations_differ_from_what_they_are_made_of() -> None:
    chance = Random(SEED)
    for mutation in MUTATIONS:
        messages = [encode(valid(chance)) for _ in range(50)]
        assert sum(mutation(chance, message) != message for message in messages) >= 25, mutation


def test_decoders_and_cores_survive() -> None:
    counts = decoders.fuzz(DECODED, SEED)
    assert counts.total() == DECODED
    assert counts["refused"] > DECODED // 3
    understood = {name.partition(": ")[2] for name in counts if name.startswith("decoded")}
    assert understood == decoders.kinds_of_wire(), "every kind comes past the decoder now and then"


async def test_a_message_nested_too_deeply_is_a_dead_letter_and_no_crash() -> None:
    async def handler(_: object) -> None:
        raise AssertionError("it was decoded")

    chance = Random(SEED)
    for _ in range(20):
        body = nested(chance, encode(valid(chance)))
        received = Received(body, "k", 0.0, {}, redelivered=False)
        assert await handle("q", handler, received) is Verdict.DEAD


def test_a_live_mesh_survives(management: Management, broker_url: str) -> None:
    vhost = urlsplit(broker_url).path[1:]
    found = live.fuzz(management, vhost, SENT, SEED)
    assert found.faults == []
    assert found.wrong == 0
    assert found.rounds >= 1
    assert found.sent.total() == SENT
    assert found.dead_letters >= found.undecodable > SENT // 3
    assert found.waiting == 0


def test_only_the_right_sender_s_exchange_makes_a_word_believed() -> None:
    """Found by 5,000 at a live mesh: a false leader's beat among tokens stopped a gateway."""
    chance = Random(SEED)
    heard = {exchange: get_args(kinds) or (kinds,) for exchange, kinds in SAID_BY.items()}
    for kind in KINDS:
        message = valid(chance, kind)
        for exchange in ("", INBOX, HISTORY, *SAID_BY):
            delivery = Delivery(
                message=message, routing_key="k", sent_at=0.0, received_at=0.0, exchange=exchange
            )
            assert said_rightly(delivery) == (kind in heard.get(exchange, ()))
    for exchange, others in ((TOKENS, (NOTICES,)), (ASKS, (ORDERS,))):
        assert not set(heard[exchange]) & {kind for each in others for kind in heard[each]}
    assert {kind for kinds in heard.values() for kind in kinds} == set(
        get_args(ToGateway) + get_args(ToWorker)
    )
