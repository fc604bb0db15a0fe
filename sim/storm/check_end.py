"""Checked when all is over: nothing is left anywhere, and every length is in the history once."""

from typing import TYPE_CHECKING, Any

from shared.messages import SendTokens, TokenBatch
from sim.storm.broker import BACKLOG_MAX

if TYPE_CHECKING:
    from sim.storm.storm import Storm


def check_end(storm: "Storm") -> None:
    """Tell the judge what is left."""
    tell = storm.judge.tell
    for worker in storm.workers:
        held = worker.engine.held
        if held:
            tell("end", f"{worker.name} still computes {held}")
        used = worker.engine.memory().kv_tokens_used
        if used:
            tell("end", f"{worker.name} still uses {used} KV slots")
        residents = worker.residents()
        if residents:
            tell("end", f"{worker.name} still lists {residents}")
    for gateway in storm.gateways:
        if len(gateway.ledger):
            tell("end", f"{gateway.name} still has {len(gateway.ledger)} open requests")
    for name, queue in storm.broker.queues.items():
        if queue.backlog:
            tell("end", f"{len(queue.backlog)} messages are left in {name}")
    if storm.broker.longest > BACKLOG_MAX:
        tell("bounds", f"a queue had {storm.broker.longest} messages")
    _leader(storm)
    _kept(storm)
    _history(storm)


def _leader(storm: "Storm") -> None:
    tell, leader = storm.judge.tell, storm.leader
    if leader is None or leader.core is None:
        tell("end", "nobody leads")
        return
    storm.judge.audit(leader)
    books = leader.core.books
    left = [f"{name} {request.state.value}" for name, request in books.requests.open.items()]
    if left:
        tell("end", f"the leader still has {left}")
    if books.parking or books.requests.pool or books.requests.recalling:
        tell("end", "the leader still parks, recalls or has somebody in its pool")
    for name, worker in books.workers.active.items():
        credit: Any = worker.credit
        sums = (credit.blocks, credit.parking_blocks, credit.backlog_tokens, worker.load_s)
        if any(sums) or credit.leases or worker.batches or worker.waiting_tokens:
            tell("end", f"the leader still counts {sums} on {name}")
    dead = set(books.gateways) - {gateway.name for gateway in storm.gateways}
    if dead:
        tell("end", f"the leader has not noticed that {sorted(dead)} are gone")
    alive = {worker.name for worker in storm.workers}
    if set(books.workers.active) != alive:
        tell("end", f"the leader knows {sorted(books.workers.active)}, there are {sorted(alive)}")


def _kept(storm: "Storm") -> None:
    """Tokens of requests whose end was acknowledged in calm weather are forgotten."""
    names = [asked.request_id for asked in storm.asked if asked.wish.number >= 1_000]
    for worker in storm.workers:
        for name in names:
            ask = SendTokens(
                epoch=storm.broker.epoch,
                worker=worker.name,
                request_id=name,
                attempt=storm.judge.attempt_of(name),
                position=0,
            )
            said = [*worker.core.handle(ask, worker.now()), *worker.core.wake(worker.now() + 1)]
            if any(isinstance(command, TokenBatch) for command in said):
                storm.judge.tell("ack", f"{worker.name} still keeps tokens of {name}")


def _history(storm: "Storm") -> None:
    """Each length that was published is there once. What the leader never heard of, because it
    died, is missing: docs/protocol.md."""
    estimator = storm.estimator
    if estimator is None:
        return
    said = (finished for each in storm.judge.published.values() for finished in each)
    ends = [finished for finished in said if finished.reason in ("stop", "length")]
    known = {row.request_id for row in storm.stored.values() if row.reason in ("stop", "length")}
    published = {finished.request_id for finished in ends}
    if not known <= published:
        storm.judge.tell("history", f"{sorted(known - published)} were never published")
    if not storm.faults and published - known:
        storm.judge.tell("history", f"{sorted(published - known)} are missing")
    counted = sum(row.finished for row in estimator.history.forecast().classes)
    if counted != len(known):
        storm.judge.tell("history", f"{counted} lengths are counted, {len(known)} are known")
