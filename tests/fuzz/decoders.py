"""Broken messages at everything that decodes them, without a broker.

    python -m tests.fuzz.decoders --messages 100000

A message either is refused by the decoder with its own error, or it means something; then it can
be sent on, and every core that it may reach survives it and goes on answering.
"""

import argparse
import json
import time
from collections import Counter
from random import Random
from typing import get_args

import msgspec

from services.estimator.core.history import History, fault_of
from services.gateway.core.ledger import Ledger
from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from services.worker.core.worker import Worker
from services.worker.engines.api import EngineInfo
from shared.messages import (
    AnyMessage,
    Elected,
    Finished,
    Message,
    OrderReturned,
    RequestSpec,
    ToEstimator,
    ToGateway,
    ToScheduler,
    ToWorker,
    WorkerMemory,
    decode,
    encode,
)
from tests.fuzz.mutate import mutated, valid

STEP_S = 0.01
LIFE = 2_000
"""Messages that one set of cores lives through: then new ones, as after restarts."""
ENGINE = EngineInfo("fuzzed", ("closed", "leased"), "m", 4_096, 2_000)


class Cores:
    """One of each, with something open in it."""

    def __init__(self, policy: str) -> None:
        self.now = 100.0
        self.scheduler = Scheduler(preset_named(policy), Constants(slice_tokens=16))
        self.scheduler.handle(Elected(epoch=1), self.now)
        self.ledger = Ledger("g1")
        for number in range(8):
            spec = RequestSpec(
                request_id=f"r{number}",
                parent_id="p",
                gateway="g1",
                model="m",
                prompt=b"\x05\x00\x00\x00" * 4,
                max_tokens=40,
            )
            self.ledger.open(spec, self.now, self.now + 1e6)
        memory = WorkerMemory(kv_tokens_capacity=4_096)
        self.worker = Worker("w1", "w", ENGINE, memory, self.now)
        self.history = History(100, version=1)

    def take(self, message: AnyMessage) -> None:
        """To whoever it may be for; the scheduler's local events never come over a line."""
        self.now += STEP_S
        said: list[object] = []
        if isinstance(message, ToScheduler):
            said += self.scheduler.handle(message, self.now)
            deadline = self.scheduler.deadline()
            if deadline is not None and deadline <= self.now:
                said += self.scheduler.wake(self.now)
        if isinstance(message, ToGateway):
            said += self.ledger.handle(message, self.now)
            said += self.ledger.wake(self.now)
        if isinstance(message, ToWorker):
            said += self.worker.handle(message, self.now)  # type: ignore[arg-type]
            said += self.worker.wake(self.now)
        if isinstance(message, Finished) and not fault_of(message):
            self.history.add(message)
            said.append(self.history.forecast())
        for each in said:
            if isinstance(each, Message):
                assert decode(encode(each)) is not None


def fuzz(messages: int, seed: int) -> Counter[str]:
    """Raises whatever should not have been raised; counts what became of the messages."""
    chance = Random(seed)
    counts: Counter[str] = Counter()
    cores = Cores("past-future")
    for number in range(messages):
        if number % LIFE == 0:
            cores = Cores(("past-future", "scls", "vllm", "sal+larry")[number // LIFE % 4])
        data = mutated(chance, encode(valid(chance)))
        try:
            counts[received(data, cores)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}, message {number}: {data[:300]!r}")
            raise
    return counts


def received(data: bytes, cores: Cores) -> str:
    """What became of these bytes."""
    try:
        message = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "refused"
    except RecursionError:
        return "refused: nested too deeply"
    assert isinstance(message, Message)
    encode(message)  # it can be sent on
    if isinstance(message, OrderReturned | Elected):
        return "local only"
    cores.take(message)
    return f"decoded: {type(message).__name__}"


def kinds_of_wire() -> set[str]:
    """Every message that travels."""
    wire = (ToScheduler, ToGateway, ToWorker, ToEstimator)
    return {kind.__name__ for union in wire for kind in get_args(union)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.process_time()
    counts = fuzz(arguments.messages, arguments.seed)
    told = {"messages": counts.total(), "seed": arguments.seed, **dict(counts.most_common())}
    told["cpu_s"] = round(time.process_time() - begin, 1)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
