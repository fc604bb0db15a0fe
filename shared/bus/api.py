"""What every bus does: at-least-once delivery of messages between services.

Two buses implement it: `shared.bus.memory` (in one process, but it really encodes) and
`shared.bus.rabbit` (RabbitMQ). `tests/bus` holds one conformance suite for both.

Theory of operation. A service opens one bus. `publish` hands a message to an exchange under a
routing key and returns once it is safe (confirmed by the broker); it retries over reconnects until
its deadline. `consume` reads one queue; the handler gets decoded deliveries. A handler that
returns settles the message; one that raises gives it back, and after `DELIVERY_LIMIT` deliveries
it goes to the dead-letter queue. Bytes that do not decode go there at once. Messages may repeat
and may overtake each other across publishers; from one publisher to one queue they stay in order
as long as no connection breaks.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from shared.messages import AnyMessage, Message

DELIVERY_LIMIT = 5
"""A message whose handler fails this often is poison; RabbitMQ 3.10 has no default, 4.x has 20."""

DEAD_LETTER_EXCHANGE = "tranche.dead-letters"
DEAD_LETTER_QUEUE = "tranche.dead"

QueueKind = Literal["durable", "exclusive"]
"""`durable`: a quorum queue, shared, survives everything. `exclusive`: a classic queue of this
connection, gone with it."""


class BusError(Exception):
    """Something outside us failed. The base of all errors that a bus raises."""


class Unroutable(BusError):
    """No queue is bound for this routing key: the addressee is gone."""


class BusUnavailable(BusError):
    """The broker could not be reached, or did not confirm, before the deadline."""


class BusFull(BusError):
    """The queue is at its length limit (the broker refused the message)."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a message goes."""

    exchange: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue and what flows into it."""

    name: str
    kind: QueueKind
    bindings: tuple[tuple[str, str], ...]
    """(exchange, routing-key pattern) pairs; all exchanges are topic exchanges."""
    prefetch: int = 100
    single_active_consumer: bool = False
    length_max: int = 100_000
    """At the limit a publisher gets BusFull."""
    message_ttl_s: float | None = None
    overhears: bool = False
    """Copies of what is meant for others, for who looks on: at the limit the oldest go and no
    publisher hears of it, and nothing becomes a dead letter."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One received message."""

    message: AnyMessage
    routing_key: str
    sent_at: float
    """Wall-clock seconds, from the sender's header; for measuring waits only."""
    received_at: float
    """Wall-clock seconds here."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate` among them, if the sender had a trace."""
    redelivered: bool = False
    exchange: str = ""
    """By which it came, and so what kind of sender it has; empty: straight into the queue."""

    @property
    def queue_wait_s(self) -> float:
        """How long the message was under way; never negative, whatever the clocks say."""
        return max(0.0, self.received_at - self.sent_at)


Handler = Callable[[Delivery], Awaitable[None]]


class Subscription(Protocol):
    """A running consumer."""

    async def close(self) -> None:
        """Stop; what was delivered but not handled goes back to the queue."""


class Bus(Protocol):
    """See the module's text. All methods are safe to call from several tasks."""

    async def open(self, deadline_s: float = 60.0) -> None:
        """Connect, with backoff. Raises BusUnavailable."""

    async def publish(
        self,
        address: Address,
        message: Message,
        headers: Mapping[str, str] | None = None,
        *,
        deadline_s: float = 30.0,
        persistent: bool = True,
        mandatory: bool = True,
    ) -> None:
        """Returns when confirmed. Raises Unroutable (only if mandatory), BusFull, BusUnavailable.

        Not persistent: for beats and tokens, whose loss is noticed and mended by the protocol.
        """

    async def consume(self, queue: QueueSpec, handler: Handler) -> Subscription:
        """Declare the queue and read it, one handler call at a time, in order. After a broken
        connection it declares and reads again by itself. Raises BusUnavailable."""

    async def declare(self, queue: QueueSpec) -> None:
        """Make sure a durable queue exists before anybody publishes to it."""

    async def raise_epoch(self) -> int:
        """One more than the last epoch anybody was given, kept durably in a one-message queue.
        Two callers never get the same. Raises BusUnavailable."""

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call this after a connection was lost and is back (exclusive queues are new then)."""

    @property
    def connected(self) -> bool:
        """False while the broker is out of reach."""

    async def close(self) -> None:
        """Flush what waits for a confirm, within a limit; then disconnect."""
