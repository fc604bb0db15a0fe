"""The worker's core under any order of events."""

import random

import pytest

from services.worker.core.events import (
    BatchRefused,
    Command,
    EngineStepped,
    StartBatch,
    TokensNotSent,
    TokensSent,
)
from services.worker.engines.api import SliceEnd, StepReport, StepTokens
from shared.messages import (
    Drop,
    SendTokens,
    SliceDone,
    SliceResult,
    TokenBatch,
)
from shared.tokens import unpack
from tests.worker.core_bench import TIMINGS, Bench
from tests.worker.orders import make_batch, make_order, make_spec


@pytest.mark.parametrize("seed", range(30))
def test_the_core_survives_any_order_of_events(seed: int) -> None:
    """Every batch is answered exactly once, whatever comes when; tokens never leave a gap."""
    rng = random.Random(seed)
    bench = Bench()
    started: dict[str, list[object]] = {}
    orders: dict[str, object] = {}
    answered: list[str] = []
    sent: dict[tuple[str, int], int] = {}
    attempts = {f"r{n}": 0 for n in range(6)}

    def note(commands: list[Command]) -> None:
        for command in commands:
            match command:
                case StartBatch():
                    started[command.order.batch_id] = [
                        [o.spec.request_id, o.attempt, 0] for o in command.order.orders
                    ]
                    orders[command.order.batch_id] = command.order
                case SliceDone():
                    answered.append(command.batch_id)
                case TokenBatch():
                    for run in command.runs:
                        key = (run.request_id, run.attempt)
                        assert run.position <= sent.get(key, 0), "a gap"
                        end = run.position + len(unpack(run.ids))
                        sent[key] = max(end, sent.get(key, 0))
                    if rng.random() < 0.8:
                        note(bench.do(TokensSent(command.gateway)))
                    else:
                        sent_back = TokensNotSent(command)
                        for run in command.runs:
                            key = (run.request_id, run.attempt)
                            sent[key] = min(sent[key], run.position)
                        note(bench.do(sent_back))

    given = 0
    for step in range(300):
        bench.now += rng.choice([0.0, 0.001, 0.01])
        action = rng.random()
        if action < 0.2:
            chosen = rng.sample(sorted(attempts), rng.randrange(1, 4))
            for name in chosen:
                attempts[name] += 1
            given += 1
            shares = [make_order(make_spec(n), attempt=attempts[n]) for n in chosen]
            note(bench.do(make_batch(*shares, epoch=0, batch_id=f"b{given}")))
        elif action < 0.7 and started:
            batch_id = next(iter(started))
            tokens = []
            for row in started[batch_id]:
                name, attempt, position = row  # type: ignore[misc]
                tokens.append(StepTokens(name, attempt, position, (step,)))
                row[2] += 1  # type: ignore[index]
            ended: tuple[SliceEnd, ...] = ()
            if rng.random() < 0.3:
                rows = started.pop(batch_id)
                results = tuple(
                    SliceResult(request_id=r[0], attempt=r[1], position=0)  # type: ignore[index]
                    for r in rows
                )
                ended = (SliceEnd(batch_id, results, TIMINGS),)
            note(bench.do(EngineStepped(StepReport(tokens=tuple(tokens), ended=ended))))
        elif action < 0.75 and started:
            batch_id = rng.choice(sorted(started))
            del started[batch_id]
            note(bench.do(BatchRefused(orders[batch_id], "no")))  # type: ignore[arg-type]
        elif action < 0.8:
            name = rng.choice(sorted(attempts))
            attempt = rng.randrange(attempts[name] + 1)
            note(bench.do(Drop(epoch=0, worker="worker-1", request_id=name, attempt=attempt)))
        elif action < 0.85:
            name = rng.choice(sorted(attempts))
            note(
                bench.do(
                    SendTokens(epoch=0, worker="worker-1", request_id=name, attempt=1, position=0)
                )
            )
        else:
            note(bench.wake())
    for batch_id in sorted(started):
        note(bench.do(BatchRefused(orders[batch_id], "end")))  # type: ignore[arg-type]
    batches = [batch_id for batch_id in answered if batch_id]
    assert sorted(batches) == sorted(f"b{n + 1}" for n in range(given))
