"""Soak: thousands of requests of hidden length against a KV pool that leases keep nearly full.

    python -m bench.pool_soak [--requests 10000] [--json FILE]

Theory of operation. An admission that knows nothing of lengths hands out credit: a lease of a few
tokens, and the next one before it is used up, as long as the blocks of all leases fit the pool.
Where they do not, requests pause; if nobody can go on, the youngest parks and comes back later with
its tokens. The outputs end where the model draws an end token. Before and after every step what the
leases may fill is compared with what the engine says is used; nothing may ever fail for want of
memory.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from services.worker.engines.api import LeasedEngine, OutOfMemory
from shared.memory import leased_blocks
from shared.messages import RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import pack

LEASE_TOKENS = 16
MARGIN_TOKENS = 4
"""A lease with no more than this left is renewed."""
HEADROOM = 0.02
"""Share of the pool that new requests leave to the renewals of those that run."""
PATIENCE_STEPS = 4
"""So long may a request pause before the youngest gives way."""
OUTPUT_MAX = 200
"""max_tokens of all; few get there."""
PROGRESS_EVERY_S = 5.0


@dataclass(slots=True, eq=False)
class Job:
    """A request, what it has, and the lease that it holds."""

    spec: RequestSpec
    prompt_tokens: int
    output: list[int] = field(default_factory=list)
    attempt: int = 0
    until: int = 0
    paused_steps: int = 0
    parking: bool = False

    def blocks(self, until: int, size: int) -> int:
        """Of a lease up to there."""
        return leased_blocks(self.prompt_tokens, min(until, self.spec.max_tokens), size)


@dataclass(slots=True)
class Outcome:
    """What happened."""

    requests: int = 0
    finished: int = 0
    output_tokens: int = 0
    longest_output: int = 0
    steps: int = 0
    blocks: int = 0
    block_tokens: int = 0
    failed_allocations: int = 0
    """Orders that were refused for want of memory, and leases that ended early for it."""
    wrong_predictions: int = 0
    """How often, before a step or after it, the engine used another number of blocks than the
    leases may fill."""
    parked: int = 0
    running_mean: float = 0.0
    full_mean: float = 0.0
    """Share of the pool in use in a step, over those for which requests were waiting."""
    full_least: float = 1.0
    """Of these steps."""
    blocks_in_use_at_the_end: int = 0
    seconds: float = 0.0


def drawn_requests(
    number: int, end: int, seed: int = 1, *, end_bias: tuple[float, float] = (0.0, 5.0)
) -> Iterator[RequestSpec]:
    """Prompts of 4 to 60 tokens. How likely the end token is differs from request to request, so
    that outputs are long-tailed; only the model's draws say where one ends."""
    rng = Random(seed)
    for index in range(number):
        prompt = [rng.randrange(end) for _ in range(rng.randrange(4, 60))]
        yield RequestSpec(
            request_id=f"r{index}",
            parent_id=f"r{index}",
            gateway="soak",
            model="tiny",
            prompt=pack(prompt),
            max_tokens=OUTPUT_MAX,
            sampling=Sampling(
                temperature=1.0, seed=rng.getrandbits(48), logit_bias={end: rng.uniform(*end_bias)}
            ),
        )


class Soak:
    """Runs all requests to their ends."""

    def __init__(
        self,
        engine: LeasedEngine,
        requests: Sequence[RequestSpec],
        progress: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._engine = engine
        self._size = engine.info.kv_block_tokens
        self._waiting = deque(Job(spec, len(spec.prompt) // 4) for spec in requests)
        self._there: dict[str, Job] = {}
        """In the order of their arrival."""
        self._free = engine.memory().kv_tokens_capacity // self._size
        self._progress = progress
        self.outcome = Outcome(requests=len(requests), blocks=self._free, block_tokens=self._size)

    def run(self) -> Outcome:
        """Until nobody is left."""
        outcome, began = self.outcome, time.perf_counter()
        shares: list[float] = []
        running = 0
        while self._waiting or self._there:
            self._renew()
            self._give_way()
            self._admit()
            running += len(self._there)
            used = self._used()
            if self._waiting:
                shares.append(used / outcome.blocks)
            self._step()
            self._used()
            outcome.steps += 1
            outcome.seconds = time.perf_counter() - began
            self._progress(outcome)
        outcome.running_mean = running / max(1, outcome.steps)
        outcome.full_mean = sum(shares) / max(1, len(shares))
        outcome.full_least = min(shares, default=0.0)
        outcome.blocks_in_use_at_the_end = self._engine.memory().kv_tokens_used // self._size
        return outcome

    def _used(self) -> int:
        """Blocks in use, which must be those of the leases; one that was just told to park may be
        gone before it is said."""
        used = self._engine.memory().kv_tokens_used // self._size
        parking = sum(
            job.blocks(job.until, self._size) for job in self._there.values() if job.parking
        )
        most = self.outcome.blocks - self._free
        self.outcome.wrong_predictions += used not in (most, most - parking)
        return used

    # -------------------------------------------------------------------- credit, and nothing else

    def _renew(self) -> None:
        """The oldest first: they are renewed while there is room."""
        for name, job in self._there.items():
            if job.parking or job.until - len(job.output) > MARGIN_TOKENS:
                continue
            until = job.until + LEASE_TOKENS
            more = job.blocks(until, self._size) - job.blocks(job.until, self._size)
            if more <= self._free:
                self._free -= more
                job.until, job.paused_steps = until, 0
                self._engine.renew(name, until)
            elif len(job.output) >= job.until:
                job.paused_steps += 1

    def _give_way(self) -> None:
        """If somebody has waited for long enough, the youngest parks."""
        if all(job.paused_steps < PATIENCE_STEPS for job in self._there.values()):
            return
        youngest = next(reversed(self._there))
        if not self._there[youngest].parking:
            self._there[youngest].parking = True
            self._engine.park(youngest)

    def _admit(self) -> None:
        """Whoever fits beside those that are there, and leaves them room to grow."""
        headroom = int(self.outcome.blocks * HEADROOM)
        if any(job.paused_steps for job in self._there.values()):
            return
        while self._waiting:
            job = self._waiting[0]
            until = len(job.output) + LEASE_TOKENS
            need = job.blocks(until, self._size)
            if need > self._free - (headroom if self._there else 0):
                return
            self._waiting.popleft()
            job.attempt, job.until, job.paused_steps = job.attempt + 1, until, 0
            try:
                self._engine.start(_order(job))
            except OutOfMemory:
                self.outcome.failed_allocations += 1
                self._waiting.append(job)
                return
            self._free -= need
            self._there[job.spec.request_id] = job

    # ------------------------------------------------------------------------------- what comes

    def _step(self) -> None:
        report = self._engine.step()
        for tokens in report.tokens:
            job = self._there[tokens.request_id]
            assert tokens.position == len(job.output), "a gap in the output"
            job.output += tokens.ids
            assert len(job.output) <= job.until, "beyond its credit"
            if tokens.finish_reason is not None:
                self._gone(job)
                self.outcome.finished += 1
                self.outcome.output_tokens += len(job.output)
                self.outcome.longest_output = max(self.outcome.longest_output, len(job.output))
        for end in report.left:
            job = self._there[end.request_id]
            self._gone(job)
            self.outcome.parked += not end.evicted
            self.outcome.failed_allocations += end.evicted
            job.parking = False
            self._waiting.appendleft(job)

    def _gone(self, job: Job) -> None:
        del self._there[job.spec.request_id]
        self._free += job.blocks(job.until, self._size)


def _order(job: Job) -> RunSlice:
    share = SliceOrder(
        spec=job.spec, attempt=job.attempt, tokens=pack(job.output), lease_tokens=LEASE_TOKENS
    )
    return RunSlice(
        epoch=1,
        worker="soak",
        batch_id=f"{job.spec.request_id}-{job.attempt}",
        form="leased",
        orders=(share,),
    )


def tiny_engine(folder: Path, engine: str, kv_tokens: int) -> LeasedEngine:
    """The engine on a tiny random Llama, which is written to the folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from services.worker.engines.registry import engine_maker
    from services.worker.settings import WorkerSettings

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        eos_token_id=258,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = WorkerSettings(
        model=str(folder), engine=engine, kv_tokens=kv_tokens, torch_threads=1, batch_size_max=0
    )
    made = engine_maker(engine)(settings)
    assert isinstance(made, LeasedEngine), f"engine {engine} runs no leases"
    return made


class Progress:
    """A line on stderr every few seconds."""

    def __init__(self) -> None:
        self._next_s = PROGRESS_EVERY_S

    def __call__(self, outcome: Outcome) -> None:
        if outcome.seconds >= self._next_s:
            self._next_s = outcome.seconds + PROGRESS_EVERY_S
            print(  # noqa: T201
                f"{outcome.finished}/{outcome.requests} finished, {outcome.steps} steps, "
                f"{outcome.parked} parked, {outcome.failed_allocations} failed, "
                f"{outcome.wrong_predictions} wrong, {outcome.seconds:.0f} s",
                file=sys.stderr,
            )


def sound(outcome: Outcome) -> bool:
    """No failed allocation, no leak, every prediction right, all finished, the pool kept full."""
    return (
        outcome.finished == outcome.requests
        and outcome.failed_allocations == 0
        and outcome.wrong_predictions == 0
        and outcome.blocks_in_use_at_the_end == 0
        and outcome.full_mean >= 0.95
    )


def main() -> None:
    """As the module says; the exit status is 0 if all was as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--engine", default="paged")
    parser.add_argument("--kv-tokens", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the outcome there")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        engine = tiny_engine(Path(folder), options.engine, options.kv_tokens)
        (end,) = engine.info.end_token_ids
        requests = list(drawn_requests(options.requests, end, options.seed))
        outcome = Soak(engine, requests, Progress()).run()
        engine.close()
    text = json.dumps({"engine": options.engine, "seed": options.seed, **asdict(outcome)}, indent=2)
    print(text)  # noqa: T201
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(0 if sound(outcome) else 1)


if __name__ == "__main__":
    main()
