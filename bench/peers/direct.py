"""`python -m bench.peers.direct`: an engine called directly, in a closed loop, without any mesh.

Loads the engine once, then answers a line on its standard input, a JSON object of `seed`,
`clients`, `warm_up_s` and `seconds`, with a line of `output_tps`. It is what the mesh around an
engine is measured against.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import typer

from bench.peers.workload import Ask, asks
from services.worker.engines.api import Engine
from services.worker.engines.registry import engine_maker
from services.worker.loop import warm_up
from services.worker.settings import WorkerSettings
from shared.messages import RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import pack

FIRST_ID = 300
"""Ids below are bytes and special tokens of the model of `bench.peers.model`."""


class Run(msgspec.Struct, frozen=True):
    """What to measure."""

    seed: int
    clients: int
    warm_up_s: float
    seconds: float


class Measured(msgspec.Struct, frozen=True):
    """Tokens per second of the counted time."""

    output_tps: float


class ClosedLoop:
    """So many requests at any time; whoever ends is followed by the next."""

    def __init__(self, engine: Engine, requests: Iterator[Ask], seed: int) -> None:
        self._engine, self._requests, self._rng = engine, requests, Random(seed)
        self._seed, self._made = seed, 0
        self.running: set[str] = set()

    def add(self) -> None:
        """Start the next request."""
        request = next(self._requests)
        self._made += 1
        vocabulary = self._engine.info.vocabulary_size
        prompt = [self._rng.randrange(FIRST_ID, vocabulary) for _ in range(request.prompt_tokens)]
        spec = RequestSpec(
            request_id=f"{self._seed}-{self._made}",
            parent_id="",
            gateway="",
            model="",
            prompt=pack(prompt),
            max_tokens=request.output_tokens,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
        )
        order = SliceOrder(spec=spec, attempt=1, lease_tokens=request.output_tokens)
        self._engine.start(
            RunSlice(epoch=1, worker="", batch_id=spec.request_id, form="leased", orders=(order,))
        )
        self.running.add(spec.request_id)

    def run_for(self, seconds: float) -> float:
        """Tokens per second."""
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for told in self._engine.step().tokens:
                tokens += len(told.ids)
                if told.finish_reason is not None:
                    self.running.remove(told.request_id)
                    self.add()
        return tokens / (time.perf_counter() - began)


def measure(engine: Engine, run: Run) -> Measured:
    """One closed loop; the engine is empty before and after."""
    loop = ClosedLoop(engine, asks(run.seed), run.seed)
    for _ in range(run.clients):
        loop.add()
    loop.run_for(run.warm_up_s)
    found = Measured(loop.run_for(run.seconds))
    for request_id in loop.running:
        engine.cancel(request_id)
    return found


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    engine: str = "paged",
) -> None:
    """Load, then one line out for each line in."""
    loaded = engine_maker(engine)(WorkerSettings(model=str(model), torch_threads=1))
    warm_up(loaded)
    print("{}", flush=True)  # noqa: T201
    for line in sys.stdin:
        found = measure(loaded, msgspec.json.decode(line, type=Run))
        print(msgspec.json.encode(found).decode(), flush=True)  # noqa: T201
    loaded.close()


if __name__ == "__main__":
    typer.run(main)
