"""Span attributes in OpenTelemetry's words: messaging for queues, GenAI for inference.

The names are those of the semantic conventions that opentelemetry-semantic-conventions 0.66 ships
(a test compares them); both groups are still marked as in development there.
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


def genai_attributes(
    *,
    model: str,
    operation: Literal["chat", "text_completion"],
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    choices: int | None = None,
    finish_reasons: tuple[str, ...] = (),
    response_id: str = "",
) -> dict[str, AttributeValue]:
    """Attributes of a span about one inference; what is empty or None is left out."""
    known: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tranche",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": response_id or None,
        "gen_ai.request.max_tokens": max_tokens,
        "gen_ai.request.temperature": temperature,
        "gen_ai.request.top_p": top_p,
        "gen_ai.request.seed": seed,
        "gen_ai.request.choice.count": choices,
        "gen_ai.usage.input_tokens": input_tokens,
        "gen_ai.usage.output_tokens": output_tokens,
        "gen_ai.response.finish_reasons": finish_reasons or None,
    }
    return {name: value for name, value in known.items() if value is not None}
