"""A core, and workers that use up every lease at each turn."""

from collections import Counter

from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Park,
    RunSlice,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from sim.gaps import Gaps
from sim.leader import Step
from tests.core.seam import Bench, beat_of, submit

PROMPT_MAX, SLICE = 60, 8
LEASE = SLICE + SLICE // 4
"""A lease, and what is left of the last one when it is asked for."""
OUTPUT_WEIGHT = 2.0


class Mill:
    """Some workers, all alike."""

    def __init__(
        self,
        policy: str,
        workers: int,
        places: int,
        capacity: int,
        output_max: int = 40,
        **more: object,
    ) -> None:
        constants = Constants(
            slice_tokens=SLICE,
            waiting_max=10_000,
            running_max=places,
            **more,  # type: ignore[arg-type]
        )
        self.bench = Bench(policy, constants)
        self.capacity, self.output_max = capacity, output_max
        self.leases: dict[str, dict[str, tuple[SliceOrder, int]]] = {}
        self.made: Counter[str] = Counter()
        self.outputs: dict[str, int] = {}
        self.parks: list[str] = []
        self.parked: set[str] = set()
        self.placed: list[str] = []
        self.said: list[SchedulerCommand] = []
        self.sent = 0
        for number in range(workers):
            self.leases[f"w{number}"] = {}
            self.say(beat_of(f"w{number}", forms=("leased",), capacity=capacity))

    def say(self, event: SchedulerEvent) -> None:
        self.take(self.bench.say(event))

    def send(self, tenant: str, prompt: int, output: int) -> str:
        self.sent += 1
        name = f"{tenant}-{self.sent}"
        self.outputs[name] = output
        prompt_ids = tokens.pack(range(prompt))
        self.say(submit(name, tenant=tenant, prompt=prompt_ids, max_tokens=self.output_max))
        return name

    def take(self, commands: list[SchedulerCommand]) -> None:
        self.said += commands
        for command in commands:
            if isinstance(command, RunSlice):
                held = self.leases[command.worker]
                for order in command.orders:
                    name = order.spec.request_id
                    held[name] = (order, self.made[name] + order.lease_tokens)
                    self.placed.append(name)
                for renewal in command.renewals:
                    held[renewal.request_id] = (held[renewal.request_id][0], renewal.until)
            elif isinstance(command, Park):
                self.parks.append(command.request_id)
                self.parked.add(command.request_id)

    def turn(self, worker: str, most: int = SLICE + SLICE) -> None:
        """At most so many tokens each, as far as the leases go."""
        held, results = self.leases[worker], []
        for name, (order, until) in list(held.items()):
            begin = self.made[name]
            end = max(begin, min(self.outputs[name], until, begin + most))
            self.made[name] = end
            ended, parked = end >= self.outputs[name], name in self.parked
            results.append(
                SliceResult(
                    request_id=name,
                    attempt=order.attempt,
                    position=begin,
                    tokens=tokens.pack(range(begin, end)),
                    finish_reason="stop" if ended else None,
                    resident=not (ended or parked),
                )
            )
            if ended or parked:
                del held[name]
                self.parked.discard(name)
        self.bench.now += 0.001
        self.say(
            SliceDone(
                epoch=1,
                worker=worker,
                batch_id="",
                form="leased",
                results=tuple(results),
                timings=SliceTimings(),
                memory=WorkerMemory(kv_tokens_capacity=self.capacity),
            )
        )

    def given(self, tenant: str) -> float:
        return self.bench.core.books.lines.central.given(tenant)

    def waiting(self, tenant: str) -> int:
        pool = self.bench.core.books.requests.pool.values()
        return sum(request.spec.tenant == tenant for request in pool)


class Ledger(Mill):
    """A mill that asserts after each word to the core that nobody is too far ahead."""

    def __init__(
        self, *which: object, weights: dict[str, float], held_prompts: float, **more: object
    ) -> None:
        """Ahead by so many prompts, leases apart."""
        told = ",".join(f"{name}={weight}" for name, weight in weights.items())
        more = {**more, "tenant_weights": told}
        shape = Constants(slice_tokens=SLICE, lead_prompts=held_prompts)
        self.gaps = Gaps(shape, self.given, weights=weights)
        super().__init__(*which, **more)  # type: ignore[arg-type]

    def say(self, event: SchedulerEvent) -> None:
        heard = len(self.said)
        super().say(event)
        self.gaps.append(Step(self.bench.now, event, self.said[heard:]))
        assert self.gaps.lead_worst <= 1 + 1e-9, f"{self.gaps.lead} ahead of one that waits"
        assert self.gaps.gap_worst <= 1 + 1e-9, f"{self.gaps.gap} more than one that waits"
