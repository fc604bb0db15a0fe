"""From an address in the settings to a bus: memory:// or amqp(s)://."""

from urllib.parse import urlsplit

from shared.bus.api import Bus
from shared.bus.handling import OnDeadLetter
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.config import mask_url

_brokers: dict[str, MemoryBroker] = {}


def memory_broker(url: str = "memory://") -> MemoryBroker:
    """The process-wide broker of a memory:// address; memory://name is one of its own."""
    name = urlsplit(url).netloc
    if name not in _brokers:
        _brokers[name] = MemoryBroker()
    return _brokers[name]


def forget_memory_broker(url: str) -> None:
    """The next bus at this address finds an empty broker."""
    _brokers.pop(urlsplit(url).netloc, None)


def make_bus(url: str, *, service: str, on_dead_letter: OnDeadLetter | None = None) -> Bus:
    """A bus for one service, not open yet. `service` names the connection at the broker.

    Raises ValueError for an address of another kind.
    """
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return MemoryBus(memory_broker(url), on_dead_letter=on_dead_letter)
    if scheme in ("amqp", "amqps"):
        # On demand, so that an embedded mesh runs without an AMQP library loaded.
        from shared.bus.rabbit import RabbitBus

        return RabbitBus(url, service=service, on_dead_letter=on_dead_letter)
    raise ValueError(f"{mask_url(url)!r} is no bus; use memory:// or amqp://user:password@host/")
