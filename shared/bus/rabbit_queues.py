"""How queues and exchanges look in RabbitMQ: arguments that 3.10 and 4.x both take.

Always set here, because defaults differ or are missing: the delivery limit, the dead-letter
exchange, the overflow rule. Never used: x-max-priority on quorum queues, x-queue-mode, mirroring,
global prefetch, transient queues that are not exclusive. Nor x-dead-letter-strategy=at-least-once:
it depends on feature flags and buys little, a dead letter is only there to be looked at.
"""

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused
from pamqp.common import FieldTable

from shared.bus.api import DEAD_LETTER_EXCHANGE, DEAD_LETTER_QUEUE, QueueSpec

RETURN_LIMIT = 20
"""How often the broker gives a message of a quorum queue out again for whatever reason; lost
connections count too, and they return a whole prefetch at once. So it is well above DELIVERY_LIMIT,
which counts failed handlers only and is kept by the consumer. It is what stops a message that
kills its consumer. 4.x has the same number as its default."""
DEAD_LETTERS_MAX = 100_000
"""The dead-letter queue drops its oldest past this: it is for looking at, and must never block."""


DEAD_LETTER_ARGUMENTS: FieldTable = {"x-queue-type": "quorum", "x-max-length": DEAD_LETTERS_MAX}


async def may_declare(channel: AbstractChannel) -> bool:
    """Whether this account makes shared exchanges and queues. If not, they are the operator's
    (`shared.bus.rights`), and the channel is closed."""
    try:
        await declare_exchange(channel, DEAD_LETTER_EXCHANGE)
    except ChannelAccessRefused:
        return False
    return True


async def declare_exchange(channel: AbstractChannel, name: str, *, given: bool = False) -> None:
    """A durable topic exchange. `given`: it must be there already."""
    await channel.exchange_declare(name, exchange_type="topic", durable=True, passive=given)


async def declare_dead_letters(channel: AbstractChannel) -> None:
    """Where dead letters of all queues end; the original routing key and x-death tell the story."""
    await declare_exchange(channel, DEAD_LETTER_EXCHANGE)
    await channel.queue_declare(DEAD_LETTER_QUEUE, durable=True, arguments=DEAD_LETTER_ARGUMENTS)
    await channel.queue_bind(DEAD_LETTER_QUEUE, DEAD_LETTER_EXCHANGE, "#")


async def declare_queue(channel: AbstractChannel, spec: QueueSpec, *, given: bool = False) -> None:
    """The queue with its bindings, their exchanges and the dead-letter queue. `given`: all that is
    shared must be there already, and only an exclusive queue is made."""
    if given and spec.kind == "durable":
        await channel.queue_declare(spec.name, passive=True)
        return
    if not given:
        await declare_dead_letters(channel)
    await channel.queue_declare(
        spec.name,
        durable=spec.kind == "durable",
        exclusive=spec.kind == "exclusive",
        arguments=arguments_of(spec),
    )
    for exchange in dict.fromkeys(exchange for exchange, _ in spec.bindings):
        await declare_exchange(channel, exchange, given=given)
    for exchange, pattern in spec.bindings:
        await channel.queue_bind(spec.name, exchange, pattern)


def arguments_of(spec: QueueSpec) -> FieldTable:
    """The x-arguments of a queue."""
    arguments: FieldTable = {
        "x-queue-type": "quorum" if spec.kind == "durable" else "classic",
        "x-max-length": spec.length_max,
        "x-overflow": "drop-head" if spec.overhears else "reject-publish",
    }
    if not spec.overhears:
        arguments["x-dead-letter-exchange"] = DEAD_LETTER_EXCHANGE
    if spec.kind == "durable":
        arguments["x-delivery-limit"] = RETURN_LIMIT
    if spec.single_active_consumer:
        arguments["x-single-active-consumer"] = True
    if spec.message_ttl_s is not None:
        arguments["x-message-ttl"] = max(1, round(spec.message_ttl_s * 1000))
    return arguments
