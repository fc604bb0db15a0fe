"""Rights: what each kind of service may do at RabbitMQ, as accounts that a broker can import.

One account per kind: all workers share one, so that workers can be scaled. What keeps one worker
from another's messages is the secret part of its id (`shared.bus.identity`). Queues of one process
are exclusive and named by its id; routing keys towards the scheduler, and from a worker to
gateways, end in an id too; and a topic permission lets nobody bind or publish without a whole id,
so no wildcard ever covers somebody else's. Shared exchanges and queues are made by the operator,
with these definitions; no service may declare or delete them.
"""

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.bus.api import DEAD_LETTER_EXCHANGE, DEAD_LETTER_QUEUE, QueueSpec
from shared.bus.identity import ID_PATTERN
from shared.bus.rabbit_epoch import ARGUMENTS as EPOCH_ARGUMENTS, LOCK_QUEUE
from shared.bus.rabbit_queues import DEAD_LETTER_ARGUMENTS, arguments_of
from shared.bus.topology import (
    ASKS,
    BEAT,
    EPOCH_QUEUE,
    ESTIMATOR_QUEUE,
    EXCHANGES,
    FINISHED,
    HISTORY,
    INBOX,
    NOTICES,
    ORDERS,
    SCHEDULER_QUEUE,
    TOKENS,
)

ROLES = ("gateway", "scheduler", "estimator", "worker")
ADMIN = "admin"
"""The account of people: management pages, dead letters. No service has its password."""
EVERYTHING = ".*"
NOTHING = "^$"
"""As a name: the one that is empty. RabbitMQ's own way to say nothing."""
NEVER = "(?!)"
"""As a routing key: none at all, the empty one included."""
DEFAULT_EXCHANGE = "amq.default"
MEMBER = r"(\.[0-9]+)?"
"""One of the workers that a process pretends to be."""


@dataclass(frozen=True, slots=True)
class Topic:
    """Routing keys of one exchange: which may be published, which may be bound. Patterns."""

    write: str = NEVER
    read: str = NEVER


@dataclass(frozen=True, slots=True)
class Rights:
    """Patterns of the names that an account may declare, publish or bind to, and read from."""

    configure: str
    write: str
    read: str
    topics: Mapping[str, Topic]
    """By exchange; for all others no key is allowed."""


def own(kind: str) -> str:
    """The names of the exclusive queues of this kind of service."""
    return rf"tranche\.{kind}\.{ID_PATTERN}"


def _any(*names: str) -> str:
    return f"^({'|'.join(names)})$"


def _name(text: str) -> str:
    return text.replace(".", r"\.")


_DEAD = _name(DEAD_LETTER_EXCHANGE)
"""Whoever declares a queue must be allowed to write to where its dead letters go."""

RIGHTS: Mapping[str, Rights] = {
    "gateway": Rights(
        configure=_any(own("gateway")),
        write=_any(own("gateway"), _name(INBOX), _name(ASKS), _DEAD),
        read=_any(own("gateway"), _name(TOKENS), _name(NOTICES)),
        topics={
            INBOX: Topic(write=_any(rf"gateway\.{ID_PATTERN}")),
            ASKS: Topic(write=_any(rf"worker\.{ID_PATTERN}{MEMBER}")),
            TOKENS: Topic(read=_any(rf"gateway\.{ID_PATTERN}")),
            NOTICES: Topic(read=_any(rf"gateway\.{ID_PATTERN}", BEAT)),
        },
    ),
    "scheduler": Rights(
        configure=_any(_name(LOCK_QUEUE)),
        write=_any(*map(_name, (ORDERS, NOTICES, HISTORY, DEFAULT_EXCHANGE))),
        read=_any(_name(SCHEDULER_QUEUE.name), _name(EPOCH_QUEUE)),
        topics={
            ORDERS: Topic(write=_any(rf"worker\.{ID_PATTERN}{MEMBER}", BEAT)),
            NOTICES: Topic(write=_any(rf"gateway\.{ID_PATTERN}", BEAT)),
            HISTORY: Topic(write=_any(FINISHED, BEAT)),
        },
    ),
    "estimator": Rights(
        configure=_any(own("estimator")),
        write=_any(own("estimator"), _name(INBOX), _DEAD),
        read=_any(own("estimator"), _name(ESTIMATOR_QUEUE.name), _name(HISTORY)),
        topics={
            INBOX: Topic(write=_any(rf"estimator\.{ID_PATTERN}")),
            HISTORY: Topic(read=_any(BEAT)),
        },
    ),
    "worker": Rights(
        configure=_any(own("worker")),
        write=_any(own("worker"), _name(INBOX), _name(TOKENS), _DEAD),
        read=_any(own("worker"), _name(ORDERS), _name(ASKS)),
        topics={
            INBOX: Topic(write=_any(rf"worker\.{ID_PATTERN}{MEMBER}")),
            TOKENS: Topic(write=_any(rf"gateway\.{ID_PATTERN}")),
            ORDERS: Topic(read=_any(rf"worker\.{ID_PATTERN}(\.\*)?", BEAT)),
            ASKS: Topic(read=_any(rf"worker\.{ID_PATTERN}")),
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the broker."""

    name: str
    password: str


def new_password() -> str:
    """256 random bits, without signs that an address or a shell would take for its own."""
    return secrets.token_urlsafe(32)


def definitions(accounts: Mapping[str, Account], vhost: str = "/") -> dict[str, Any]:
    """What a broker imports: accounts by role (or `ADMIN`), their rights, exchanges and queues.

    It holds salted hashes, no passwords. For `load_definitions` of rabbitmq.conf, for
    `rabbitmqctl import_definitions`, and for POST /api/definitions.
    """
    return {
        "vhosts": [{"name": vhost}],
        "users": [_user(role, account) for role, account in accounts.items()],
        "permissions": [_permission(role, account, vhost) for role, account in accounts.items()],
        "topic_permissions": [
            {"user": account.name, "vhost": vhost, "exchange": exchange, **_topic(role, exchange)}
            for role, account in accounts.items()
            if role != ADMIN
            for exchange in (*EXCHANGES, DEAD_LETTER_EXCHANGE)
        ],
        "exchanges": [
            {"name": name, "vhost": vhost, "type": "topic", "durable": True, **_PLAIN}
            for name in (*EXCHANGES, DEAD_LETTER_EXCHANGE)
        ],
        "queues": [
            {"name": name, "vhost": vhost, "durable": True, "auto_delete": False, "arguments": each}
            for name, each in _QUEUES.items()
        ],
        "bindings": [
            _binding(exchange, key, queue, vhost)
            for queue, bindings in _BINDINGS.items()
            for exchange, key in bindings
        ],
    }


def hashed(password: str, salt: bytes) -> str:
    """As RabbitMQ keeps it: base64 of a salt of four bytes and SHA-256 of salt and password."""
    digest = hashlib.sha256(salt + password.encode()).digest()
    return base64.b64encode(salt + digest).decode()


_PLAIN = {"auto_delete": False, "internal": False, "arguments": {}}
_SHARED: tuple[QueueSpec, ...] = (SCHEDULER_QUEUE, ESTIMATOR_QUEUE)
_QUEUES: Mapping[str, Mapping[str, Any]] = {
    **{queue.name: arguments_of(queue) for queue in _SHARED},
    EPOCH_QUEUE: EPOCH_ARGUMENTS,
    DEAD_LETTER_QUEUE: DEAD_LETTER_ARGUMENTS,
}
_BINDINGS = {
    **{queue.name: queue.bindings for queue in _SHARED},
    DEAD_LETTER_QUEUE: ((DEAD_LETTER_EXCHANGE, "#"),),
}


def _user(role: str, account: Account) -> dict[str, Any]:
    return {
        "name": account.name,
        "password_hash": hashed(account.password, secrets.token_bytes(4)),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": "administrator" if role == ADMIN else "",
    }


def _permission(role: str, account: Account, vhost: str) -> dict[str, Any]:
    everything = Rights(EVERYTHING, EVERYTHING, EVERYTHING, {})
    rights = everything if role == ADMIN else RIGHTS[role]
    return {
        "user": account.name,
        "vhost": vhost,
        "configure": rights.configure,
        "write": rights.write,
        "read": rights.read,
    }


def _topic(role: str, exchange: str) -> dict[str, str]:
    topic = RIGHTS[role].topics.get(exchange, Topic())
    return {"write": topic.write, "read": topic.read}


def _binding(exchange: str, key: str, queue: str, vhost: str) -> dict[str, Any]:
    return {
        "source": exchange,
        "vhost": vhost,
        "destination": queue,
        "destination_type": "queue",
        "routing_key": key,
        "arguments": {},
    }
