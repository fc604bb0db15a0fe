"""The bus inside one process: a broker with queues, and buses that are its connections.

It behaves like `shared.bus.rabbit` as far as a service can see: messages are encoded and decoded,
queues are bounded, what is not settled comes back, what fails too often becomes a dead letter.
Everything happens in one event loop; nothing polls. Queues live as long as the broker; exclusive
ones as long as their bus.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from shared.bus.api import (
    Address,
    BusFull,
    BusUnavailable,
    Handler,
    QueueSpec,
    Unroutable,
)
from shared.bus.handling import HANDLER_GRACE_S, OnDeadLetter, Received, Verdict, handle
from shared.bus.routing import RoutingTable
from shared.messages import Message, encode

DEAD_LETTERS_MAX = 10_000
"""Dead letters kept for inspection; the oldest go first."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that nobody could handle."""

    queue: str
    reason: str
    """`rejected` (undecodable, or failed too often) or `expired`."""
    routing_key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Stored:
    """A message in a queue; `expires_at` is on the monotonic clock."""

    received: Received
    expires_at: float | None


class _Queue:
    """Messages that wait, in order, and the subscriptions that take them."""

    def __init__(self, spec: QueueSpec, owner: "MemoryBus | None", broker: "MemoryBroker") -> None:
        self.spec = spec
        self.owner = owner
        self._broker = broker
        self._ready: deque[_Stored] = deque()
        self._subscriptions: deque[_Subscription] = deque()

    def depth(self) -> int:
        self._drop_expired()
        return len(self._ready)

    def put(self, received: Received) -> bool:
        """False if the queue is full."""
        self._drop_expired()
        if len(self._ready) >= self.spec.length_max:
            if not self.spec.overhears:
                return False
            self._ready.popleft()
        ttl_s = self.spec.message_ttl_s
        expires_at = None if ttl_s is None else time.monotonic() + ttl_s
        self._ready.append(_Stored(received, expires_at))
        self._dispatch()
        return True

    def give_back(self, returned: list[_Stored]) -> None:
        """Back to the head, in their order."""
        for stored in reversed(returned):
            marked = replace(stored.received, redelivered=True)
            self._ready.appendleft(_Stored(marked, stored.expires_at))
        self._dispatch()

    def bury(self, stored: _Stored, reason: str = "rejected") -> None:
        """It becomes a dead letter, unless it was a copy only."""
        if not self.spec.overhears:
            self._broker.bury(self.spec.name, reason, stored.received)

    def add(self, subscription: "_Subscription") -> None:
        self._subscriptions.append(subscription)
        self._dispatch()

    def remove(self, subscription: "_Subscription") -> None:
        with suppress(ValueError):
            self._subscriptions.remove(subscription)
        self._dispatch()

    def settled(self) -> None:
        """A subscription has room again."""
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand messages out in turn, to each subscription at most its prefetch; to the first
        subscription only if there is to be a single active one."""
        self._drop_expired()
        while self._ready:
            if self.spec.single_active_consumer:
                chosen = self._subscriptions[0] if self._subscriptions else None
                if chosen is None or not chosen.has_room:
                    return
            else:
                chosen = next((s for s in self._subscriptions if s.has_room), None)
                if chosen is None:
                    return
                self._subscriptions.remove(chosen)
                self._subscriptions.append(chosen)
            chosen.take(self._ready.popleft())

    def _drop_expired(self) -> None:
        if self.spec.message_ttl_s is None or not self._ready:
            return
        now = time.monotonic()
        while self._ready and (expires_at := self._ready[0].expires_at) is not None:
            if expires_at > now:
                return
            self.bury(self._ready.popleft(), "expired")


class _Subscription:
    """One consumer of one queue: holds up to `prefetch` messages and handles them one by one."""

    def __init__(self, queue: _Queue, spec: QueueSpec, handler: Handler, bus: "MemoryBus") -> None:
        self._queue = queue
        self._prefetch = spec.prefetch
        self._handler = handler
        self._bus = bus
        self._held: deque[_Stored] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._run(), name=f"bus:{spec.name}")

    @property
    def has_room(self) -> bool:
        return not self._closing and len(self._held) < self._prefetch

    def take(self, stored: _Stored) -> None:
        self._held.append(stored)
        self._arrived.set()

    async def close(self) -> None:
        """Lets the running call end (for HANDLER_GRACE_S at most); the rest goes back."""
        self._closing = True
        self._arrived.set()
        if asyncio.current_task() is self._task:
            return  # called by the handler: the task ends after this call
        await asyncio.wait([self._task], timeout=HANDLER_GRACE_S)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        try:
            while not self._closing:
                if self._held:
                    await self._handle_first()
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            self._queue.remove(self)
            self._queue.give_back(list(self._held))
            self._bus.forget(self)

    async def _handle_first(self) -> None:
        stored = self._held[0]  # stays held meanwhile, so that a cancelled call gives it back
        name = self._queue.spec.name
        verdict = await handle(name, self._handler, stored.received)
        self._held.popleft()
        match verdict:
            case Verdict.RETRY:
                failures = stored.received.failures + 1
                failed = replace(stored.received, failures=failures)
                self._queue.give_back([_Stored(failed, stored.expires_at)])
            case Verdict.DEAD:
                self._queue.bury(stored)
                self._bus.count_dead_letter(name)
                self._queue.settled()
            case Verdict.DONE:
                self._queue.settled()


class MemoryBroker:
    """All queues and bindings of one mesh inside this process."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._table: RoutingTable[str] = RoutingTable()
        self._epoch = 0
        self._dead: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS_MAX)

    @property
    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """The last DEAD_LETTERS_MAX, oldest first."""
        return tuple(self._dead)

    def depths(self) -> dict[str, int]:
        """Messages that wait, per queue; what a consumer already holds does not count."""
        return {name: queue.depth() for name, queue in self._queues.items()}

    def publish_bytes(
        self,
        address: Address,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        mandatory: bool = True,
    ) -> None:
        """Route any bytes, also such as are no message. Raises Unroutable, BusFull."""
        targets = self._table.route(address.exchange, address.routing_key)
        if not targets and mandatory:
            raise Unroutable(f"no queue for {address.routing_key} at {address.exchange}")
        received = Received(
            body=body,
            routing_key=address.routing_key,
            sent_at=time.time(),
            headers=dict(headers) if headers else {},
            redelivered=False,
            exchange=address.exchange,
        )
        full = [name for name in targets if not self._queues[name].put(received)]
        if full:
            raise BusFull(f"queue {', '.join(full)} is at its length limit")

    def declare(self, spec: QueueSpec, owner: "MemoryBus") -> _Queue:
        """The queue of that name, made if it is not there. Raises BusUnavailable if it belongs to
        another bus."""
        queue = self._queues.get(spec.name)
        if queue is None:
            queue = _Queue(spec, owner if spec.kind == "exclusive" else None, self)
            self._queues[spec.name] = queue
        if queue.owner not in (None, owner):
            raise BusUnavailable(f"queue {spec.name} is exclusive to another connection")
        for exchange, pattern in spec.bindings:
            self._table.bind(exchange, pattern, spec.name)
        return queue

    def drop_queues_of(self, owner: "MemoryBus") -> None:
        """The owner is gone, and its exclusive queues with it."""
        for name in [n for n, queue in self._queues.items() if queue.owner is owner]:
            del self._queues[name]
            self._table.remove(name)

    def raise_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def bury(self, queue: str, reason: str, received: Received) -> None:
        self._dead.append(DeadLetter(queue, reason, received.routing_key, received.body))


class MemoryBus:
    """One service's connection to a MemoryBroker. See shared.bus.api.Bus."""

    def __init__(self, broker: MemoryBroker, *, on_dead_letter: OnDeadLetter | None = None) -> None:
        self._broker = broker
        self._on_dead_letter = on_dead_letter
        self._open = False
        self._subscriptions: set[_Subscription] = set()

    @property
    def broker(self) -> MemoryBroker:
        """For tests and metrics: depths and dead letters."""
        return self._broker

    @property
    def connected(self) -> bool:
        return self._open

    async def open(self, deadline_s: float = 60.0) -> None:
        self._open = True

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
        self._check_open()
        self._broker.publish_bytes(address, encode(message), headers, mandatory=mandatory)
        await asyncio.sleep(0)  # a busy publisher must not starve the consumers in its loop

    async def consume(self, queue: QueueSpec, handler: Handler) -> _Subscription:
        self._check_open()
        source = self._broker.declare(queue, self)
        subscription = _Subscription(source, queue, handler, self)
        self._subscriptions.add(subscription)
        source.add(subscription)
        return subscription

    async def declare(self, queue: QueueSpec) -> None:
        self._check_open()
        self._broker.declare(queue, self)

    async def raise_epoch(self) -> int:
        self._check_open()
        return self._broker.raise_epoch()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """A memory bus never loses its broker, so this is never called."""

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        await asyncio.gather(*(s.close() for s in tuple(self._subscriptions)))
        self._broker.drop_queues_of(self)

    def forget(self, subscription: _Subscription) -> None:
        self._subscriptions.discard(subscription)

    def count_dead_letter(self, queue: str) -> None:
        if self._on_dead_letter is not None:
            self._on_dead_letter(queue)

    def _check_open(self) -> None:
        if not self._open:
            raise BusUnavailable("the bus is not open")
