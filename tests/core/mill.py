"""A core, workers that use up every lease at each turn, and what each tenant was given by its
words alone: prompts when they are first placed, output when it is reported."""

from collections import Counter

from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Finished,
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

    def __init__(self, *which: object, weights: dict[str, float], **more: object) -> None:
        self.weights = weights
        self.service: dict[str, float] = dict.fromkeys(weights, 0.0)
        self.standing: dict[str, str] = {}
        """Request to "waits" or "runs"."""
        self.prompts: dict[str, int] = {}
        self.prompt_max = 0
        self.running_max: Counter[str] = Counter()
        self.least: dict[tuple[str, str], float] = {}
        """How far the one was ahead of the other, at least, since both wait."""
        self.used = 0.0
        """The largest lead seen over its bound."""
        told = ",".join(f"{name}={weight}" for name, weight in weights.items())
        super().__init__(*which, tenant_weights=told, **more)  # type: ignore[arg-type]

    def send(self, tenant: str, prompt: int, output: int) -> str:
        name = f"{tenant}-{self.sent + 1}"
        self.standing[name], self.prompts[name] = "waits", prompt
        return super().send(tenant, prompt, output)

    def say(self, event: SchedulerEvent) -> None:
        if isinstance(event, SliceDone):
            for result in event.results:
                tenant = result.request_id.split("-")[0]
                price = OUTPUT_WEIGHT * tokens.count(result.tokens) / self.weights[tenant]
                self.service[tenant] += price
                if not result.resident:
                    self.standing[result.request_id] = "waits"
        super().say(event)
        self.check()

    def take(self, commands: list[SchedulerCommand]) -> None:
        super().take(commands)
        for command in commands:
            if isinstance(command, Finished):
                del self.standing[command.request_id]
            elif isinstance(command, RunSlice):
                for order in command.orders:
                    self.began(order.spec.request_id)

    def began(self, name: str) -> None:
        self.standing[name] = "runs"
        tenant, prompt = name.split("-")[0], self.prompts.pop(name, 0)
        self.prompt_max = max(self.prompt_max, prompt)
        self.service[tenant] += prompt / self.weights[tenant]
        running = sum(where == "runs" for n, where in self.standing.items() if n[0] == tenant)
        self.running_max[tenant] = max(self.running_max[tenant], running)

    def bound(self, tenant: str) -> float:
        """U of `leads`: a prompt, and a lease for each that runs."""
        leases = OUTPUT_WEIGHT * LEASE * self.running_max[tenant]
        return (self.prompt_max + leases) / self.weights[tenant]

    def check(self) -> None:
        waiting = sorted({n.split("-")[0] for n, where in self.standing.items() if where[0] == "w"})
        pairs = {(a, b) for a in waiting for b in waiting if a != b}
        self.least = {pair: least for pair, least in self.least.items() if pair in pairs}
        for one, other in sorted(pairs):
            lead = self.bench.core.books.lines.central.lead(one, other)
            bound = self.bound(one)
            assert lead <= bound + 1e-6, f"{one} is {lead} ahead of {other}, and {bound} allowed"
            self.used = max(self.used, lead / max(1.0, bound))
            apart = self.service[one] - self.service[other]
            least = self.least[one, other] = min(apart, self.least.get((one, other), apart))
            both = bound + self.bound(other)
            assert apart - least <= both + 1e-6, f"{one}: {apart - least} of {both}, {other} waits"
