"""One delivery's way through a handler: decode, call, judge. The same for every bus."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import msgspec
import structlog

from shared.bus.api import DELIVERY_LIMIT, BusUnavailable, Delivery, Handler
from shared.messages import AnyMessage, decode

_log = structlog.get_logger(__name__)

HANDLER_GRACE_S = 5.0
"""How long a closing subscription lets a running handler call finish before it is cancelled: longer
than any ordinary call, shorter than an orchestrator's patience at shutdown (10 s by custom)."""

OnDeadLetter = Callable[[str], None]
"""Called with the queue's name for every message that this process condemns; counts in metrics."""


class Verdict(Enum):
    """What becomes of a message."""

    DONE = auto()
    RETRY = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came from the broker, not decoded yet."""

    body: bytes
    routing_key: str
    sent_at: float
    headers: Mapping[str, str]
    redelivered: bool
    exchange: str = ""
    failures: int = 0
    """How often a handler failed on it before."""


async def handle(queue: str, handler: Handler, received: Received) -> Verdict:
    """Decode and hand over; never raises, except to be cancelled.

    Undecodable: DEAD. Handler raised: RETRY, or DEAD at the DELIVERY_LIMIT-th failure; a handler
    that had no bus condemns no message, and is tried again as long as it takes.
    """
    try:
        message = decode(received.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log.warning(
            "bus.undecodable",
            queue=queue,
            routing_key=received.routing_key,
            size=len(received.body),
            error=str(error),
        )
        return Verdict.DEAD
    delivery = Delivery(
        message=message,
        routing_key=received.routing_key,
        sent_at=received.sent_at,
        received_at=time.time(),
        headers=received.headers,
        redelivered=received.redelivered,
        exchange=received.exchange,
    )
    try:
        await handler(delivery)
    except BusUnavailable as error:
        # The line is gone, and this delivery with it: the broker will give it again.
        _log.warning(
            "bus.handler_cut_off",
            queue=queue,
            message=type(message).__name__,
            request_id=request_id_of(message),
            error=str(error),
        )
        return Verdict.RETRY
    except Exception:
        attempt = received.failures + 1
        verdict = Verdict.DEAD if attempt >= DELIVERY_LIMIT else Verdict.RETRY
        _log.exception(
            "bus.handler_failed",
            queue=queue,
            message=type(message).__name__,
            request_id=request_id_of(message),
            attempt=attempt,
            dead=verdict is Verdict.DEAD,
        )
        return verdict
    return Verdict.DONE


def request_id_of(message: AnyMessage) -> str:
    """The request that a message is about, for logs; empty if it is about none or several."""
    spec = getattr(message, "spec", None)
    return str(getattr(spec or message, "request_id", ""))
