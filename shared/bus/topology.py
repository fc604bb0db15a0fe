"""Who sends through which exchange, under which key, into which queue.

Every exchange has one kind of sender, so that the broker's topic permissions can tell who may say
what (`shared.bus.rights`); the routing key names the sender (towards the scheduler) or the receiver
(away from it). A boot id is not to be guessed (`shared.bus.identity`).

    exchange            from                to              routing key
    tranche.inbox       gateway             scheduler       gateway.<boot>
                        worker              scheduler       worker.<boot>
                        estimator           scheduler       estimator.<boot>
    tranche.orders      scheduler           worker          worker.<boot>, or `beat`
                        administrator       worker          worker.<boot>: `DrainWorker`
    tranche.notices     scheduler           gateway         gateway.<boot>, or `beat`
    tranche.tokens      worker              gateway         gateway.<boot>
    tranche.asks        gateway             worker          worker.<boot>
    tranche.history     scheduler           estimator       finished, or `beat` (questions too)
"""

from collections.abc import Mapping
from types import UnionType

from shared.bus.api import Address, Delivery, QueueSpec
from shared.messages import (
    Accepted,
    DrainWorker,
    Drop,
    FinishAck,
    Finished,
    Park,
    PredictionWanted,
    Recall,
    Rejected,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    TokenBatch,
)

INBOX = "tranche.inbox"
ORDERS = "tranche.orders"
NOTICES = "tranche.notices"
TOKENS = "tranche.tokens"
ASKS = "tranche.asks"
HISTORY = "tranche.history"
EXCHANGES = (INBOX, ORDERS, NOTICES, TOKENS, ASKS, HISTORY)
BEAT = "beat"
FINISHED = "finished"
EPOCH_QUEUE = "tranche.epoch"

SCHEDULER_QUEUE = QueueSpec(
    name="tranche.scheduler",
    kind="durable",
    bindings=((INBOX, "#"),),
    prefetch=200,
    single_active_consumer=True,
)
ESTIMATOR_QUEUE = QueueSpec(
    name="tranche.estimator", kind="durable", bindings=((HISTORY, FINISHED),), prefetch=200
)


SAID_BY: Mapping[str, type | UnionType] = {
    ORDERS: RunSlice | Park | Drop | SendTokens | DrainWorker | SchedulerBeat,
    NOTICES: Recall | Accepted | Rejected | SchedulerBeat,
    TOKENS: TokenBatch,
    ASKS: FinishAck,
}
"""What the senders of an exchange have to say, where a queue is fed by several."""


def said_rightly(delivery: Delivery) -> bool:
    """Whether the message came by the exchange of those who may say it. Only the exchange tells:
    the broker lets nobody else publish there, and a body can name anybody."""
    return isinstance(delivery.message, SAID_BY.get(delivery.exchange, ()))


def gateway_queue(boot_id: str) -> QueueSpec:
    """What a gateway reads: tokens from workers, notices and beats from the scheduler."""
    return QueueSpec(
        name=f"tranche.gateway.{boot_id}",
        kind="exclusive",
        bindings=((TOKENS, f"gateway.{boot_id}"), (NOTICES, f"gateway.{boot_id}"), (NOTICES, BEAT)),
        prefetch=500,
    )


def worker_queue(boot_id: str) -> QueueSpec:
    """What a worker reads: orders and beats from the scheduler, acknowledgements from gateways."""
    return QueueSpec(
        name=f"tranche.worker.{boot_id}",
        kind="exclusive",
        bindings=((ORDERS, f"worker.{boot_id}"), (ORDERS, BEAT), (ASKS, f"worker.{boot_id}")),
        prefetch=200,
    )


def hosted_worker(host: str, number: int) -> str:
    """The id of one of the workers that a process pretends to be."""
    return f"{host}.{number}"


def hosted_by(host: str, worker: str) -> bool:
    """Whether this worker's id is one that the process may give."""
    return worker.startswith(f"{host}.")


def host_queue(host: str) -> QueueSpec:
    """What a process reads that pretends to be many workers: all that they would."""
    return QueueSpec(
        name=f"tranche.worker.{host}",
        kind="exclusive",
        bindings=((ORDERS, f"worker.{host}.*"), (ORDERS, BEAT), (ASKS, f"worker.{host}")),
        prefetch=500,
    )


def estimator_beat_queue(boot_id: str) -> QueueSpec:
    """The scheduler's beats, for an estimator: a new epoch wants a forecast; and its questions."""
    return QueueSpec(
        name=f"tranche.estimator.{boot_id}", kind="exclusive", bindings=((HISTORY, BEAT),)
    )


def onlooker_queue(boot_id: str) -> QueueSpec:
    """What an operator's command reads: copies of what workers say to the scheduler, and its beats.
    Only the administrator's account may bind so."""
    return QueueSpec(
        name=f"tranche.onlooker.{boot_id}",
        kind="exclusive",
        bindings=((INBOX, "worker.#"), (ORDERS, BEAT)),
        length_max=10_000,
        message_ttl_s=10.0,
        overhears=True,
    )


def from_gateway(boot_id: str) -> Address:
    """The address for all that a gateway says to the scheduler."""
    return Address(INBOX, f"gateway.{boot_id}")


def from_worker(boot_id: str) -> Address:
    """The address for all that a worker says to the scheduler."""
    return Address(INBOX, f"worker.{boot_id}")


def from_estimator(boot_id: str) -> Address:
    """The address for all that an estimator says to the scheduler."""
    return Address(INBOX, f"estimator.{boot_id}")


def addresses_of(
    message: RunSlice
    | Drop
    | Park
    | SendTokens
    | DrainWorker
    | Recall
    | Accepted
    | Rejected
    | SchedulerBeat
    | Finished
    | PredictionWanted
    | TokenBatch
    | FinishAck,
) -> tuple[Address, ...]:
    """Where a message goes that names its receiver; a beat goes to everybody."""
    match message:
        case RunSlice() | Park() | Drop() | SendTokens() | DrainWorker():
            return (Address(ORDERS, f"worker.{message.worker}"),)
        case Recall() | Accepted() | Rejected():
            return (Address(NOTICES, f"gateway.{message.gateway}"),)
        case SchedulerBeat():
            return (Address(ORDERS, BEAT), Address(NOTICES, BEAT), Address(HISTORY, BEAT))
        case Finished():
            return (Address(HISTORY, FINISHED),)
        case PredictionWanted():
            return (Address(HISTORY, BEAT),)  # not durable: without an estimator nobody asks
        case TokenBatch():
            return (Address(TOKENS, f"gateway.{message.gateway}"),)
        case FinishAck():
            return (Address(ASKS, f"worker.{message.worker}"),)
