"""Span attributes of messages in OpenTelemetry's words.

The names are those of the semantic conventions that opentelemetry-semantic-conventions 0.66 ships
(a test compares them), where the group is still marked as in development.
"""

from typing import Literal

from opentelemetry.util.types import AttributeValue

Operation = Literal["send", "receive", "process", "settle"]

SYSTEM = "rabbitmq"


def messaging_attributes(
    operation: Operation,
    *,
    queue: str = "",
    exchange: str = "",
    routing_key: str = "",
    message_id: str = "",
    batch_size: int | None = None,
    body_bytes: int | None = None,
) -> dict[str, AttributeValue]:
    """Attributes of a span about messages; what is empty or None is left out.

    RabbitMQ's destination is `exchange:routing_key:queue`, of whatever is known. `batch_size`:
    how many messages one span covers; it is for batches only.
    """
    destination = ":".join(part for part in (exchange, routing_key, queue) if part)
    known: dict[str, AttributeValue | None] = {
        "messaging.system": SYSTEM,
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
        "messaging.destination.name": destination or None,
        "messaging.rabbitmq.destination.routing_key": routing_key or None,
        "messaging.message.id": message_id or None,
        "messaging.batch.message_count": batch_size,
        "messaging.message.body.size": body_bytes,
    }
    return {name: value for name, value in known.items() if value is not None}
