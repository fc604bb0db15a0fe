"""`python -m bench.scheduler_cost`: seconds of CPU per call of the scheduler's core.

A core with many workers and a long queue lives through busy seconds: workers report leases or
batches, requests end and new ones come, beats come twice a second, and the clock's deadlines are
kept. Nothing is simulated but the messages; every call is timed alone. Before every round of
closed batches the pool is filled up, so that each has the whole queue before it. The figures are
the mean per call, the slowest calls, and how the mean grows with the length of the queue.

Garbage is collected by the rules of the scheduler's process (`services/scheduler/garbage.py`),
within the timed calls.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.scheduler_growth import growth_page
from services.scheduler.core.policies.pacing import PACINGS
from services.scheduler.core.presets import PRESETS, Preset, preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from services.scheduler.garbage import spare_full_collections
from shared import tokens
from shared.messages import (
    Elected,
    GatewayBeat,
    Park,
    RequestSpec,
    RunSlice,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    SliceResult,
    SliceTimings,
    Submit,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)

RESULTS = Path(__file__).parent / "results"
KV_TOKENS = 16_384
BLOCK_TOKENS = 16
SLOW_S = 0.05
"""No single call may take longer."""
EVENT_GAP_S = 0.0005
"""Between two reports: a thousand workers, each heard of twice a second."""
ROUND_S = 0.5
"""Between rounds by the clock: in it the workers end about what a round gives them."""
BATCHES_DEALT = 2
"""Given to a worker by policies that deal ahead: the pool is long only where their queues are
full, and full queues of the usual length would take half a million requests to fill."""
LEASES_REPORTED = 3
"""Progress reports in a message, beside one end."""
PROMPTS = tuple(tokens.pack([0] * size) for size in (16, 60, 120, 250, 500, 1000, 2000))


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy's calls cost; seconds of CPU of this process."""

    policy: str
    waiting: int
    workers: int
    calls: int
    mean_s: float
    p99_s: float
    slowest_s: float
    over_limit: int
    placed: int
    """Requests placed meanwhile: a core that does nothing is quick."""
    rounds: int = 0
    """Rounds of closed batches that began meanwhile."""
    waiting_least: int = 0
    """The shortest queue that a round found; of leased policies, that any report found."""
    round_s_max: float = 0.0
    """All calls of the longest round together."""


@dataclass(slots=True)
class _Mesh:
    """The core and what its workers would say."""

    preset: Preset
    rng: Random
    core: Scheduler
    now: float = 0.0
    sent: int = 0
    placed: int = 0
    seconds: list[float] = field(default_factory=list)
    leases: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Worker to request to (attempt, position, until)."""
    batches: dict[str, list[RunSlice]] = field(default_factory=dict)
    parks: list[Park] = field(default_factory=list)
    queue: int = 0
    """How many are to wait when a round begins."""
    rounds: int = 0
    round_s: float = 0.0
    """Of the round that is being made, so far."""
    round_s_max: float = 0.0
    waiting_least: int = 1 << 62

    def say(self, event: SchedulerEvent | None) -> None:
        """One timed call."""
        core, book = self.core, self.core.books.rounds
        making, last_at, pool = book.making, book.last_at, len(core.books.requests.pool)
        began = time.process_time()
        commands = core.wake(self.now) if event is None else core.handle(event, self.now)
        seconds = time.process_time() - began
        self.seconds.append(seconds)
        if making is None and (book.making is not None or book.last_at != last_at):
            self.rounds += 1
            self.round_s = 0.0
            self.waiting_least = min(self.waiting_least, pool)
        self.round_s += seconds
        if making is not None or book.making is not None:
            self.round_s_max = max(self.round_s_max, self.round_s)
        for command in commands:
            self._obey(command)

    @property
    def timed(self) -> bool:
        """Rounds of closed batches come by the clock, not by what workers say."""
        return self.preset.form == "closed" and not PACINGS[self.preset.pacing].deals

    def round_is_near(self) -> bool:
        """Whoever is to be in the next round has to be there now."""
        book = self.core.books.rounds
        return book.making is None and self.now + EVENT_GAP_S >= book.last_at + ROUND_S

    def fill_up(self) -> None:
        """As many wait as are to."""
        while len(self.core.books.requests.pool) < self.queue:
            self.submit()

    def pass_time(self, seconds: float) -> None:
        """Keep the deadlines on the way."""
        end = self.now + seconds
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.say(None)
        self.now = end
        parks, self.parks = self.parks, []
        for park in parks:
            self._parked(park)

    def submit(self) -> None:
        """One more request."""
        self.sent += 1
        spec = RequestSpec(
            request_id=f"r{self.sent}",
            parent_id="",
            gateway="g",
            model="m",
            tenant=f"t{self.sent % 16}",
            prompt=self.rng.choice(PROMPTS),
            max_tokens=1024,
            ttft_deadline_ms=self.rng.choice((None, 2000, 10_000)),
        )
        self.say(Submit(spec=spec))

    def beat(self, name: str) -> None:
        """A worker's sign of life."""
        info = WorkerInfo(
            worker=name,
            name=name,
            engine="bench",
            forms=(self.preset.form,),
            model="m",
            context_tokens_max=KV_TOKENS,
            kv_block_tokens=BLOCK_TOKENS if self.preset.form == "leased" else 1,
        )
        self.say(WorkerBeat(info=info, memory=WorkerMemory(kv_tokens_capacity=KV_TOKENS)))

    def report(self, name: str) -> None:
        """A worker's next report."""
        if self.preset.form == "closed":
            self._batch_ends(name)
        else:
            self._leases_go_on(name)

    def _obey(self, command: SchedulerCommand) -> None:
        if isinstance(command, Park):
            self.parks.append(command)
        if not isinstance(command, RunSlice):
            return
        self.placed += len(command.orders)
        if command.form == "closed":
            self.batches.setdefault(command.worker, []).append(command)
            return
        held = self.leases.setdefault(command.worker, {})
        for order in command.orders:
            made = tokens.count(order.tokens)
            held[order.spec.request_id] = (order.attempt, made, made + order.lease_tokens)
        for renewal in command.renewals:
            if renewal.request_id in held:
                attempt, made, _ = held[renewal.request_id]
                held[renewal.request_id] = (attempt, made, renewal.until)

    def _parked(self, park: Park) -> None:
        lease = self.leases.get(park.worker, {}).pop(park.request_id, None)
        if lease is not None:
            attempt, made, _ = lease
            result = SliceResult(request_id=park.request_id, attempt=attempt, position=made)
            self.say(self._done(park.worker, "", (result,)))

    def _leases_go_on(self, name: str) -> None:
        held = self.leases.get(name, {})
        chosen = self.rng.sample(sorted(held), min(len(held), LEASES_REPORTED + 1))
        results = []
        for place, request_id in enumerate(chosen):
            attempt, made, until = held[request_id]
            ends = place == 0
            upto = until if ends else max(made, until - 1)
            results.append(
                SliceResult(
                    request_id=request_id,
                    attempt=attempt,
                    position=made,
                    tokens=tokens.pack([0] * (upto - made)),
                    finish_reason="stop" if ends else None,
                    resident=not ends,
                )
            )
            if ends:
                del held[request_id]
            else:
                held[request_id] = (attempt, upto, until)
        if results:
            self.say(self._done(name, "", tuple(results)))

    def _batch_ends(self, name: str) -> None:
        waiting = self.batches.get(name)
        if not waiting:
            return
        batch = waiting.pop(0)
        results = tuple(
            SliceResult(
                request_id=order.spec.request_id,
                attempt=order.attempt,
                position=tokens.count(order.tokens),
                tokens=tokens.pack([0] * order.lease_tokens),
                finish_reason="stop" if self.rng.random() < 0.3 else None,
            )
            for order in batch.orders
        )
        self.say(self._done(name, batch.batch_id, results, batch))

    def _done(
        self,
        name: str,
        batch_id: str,
        results: tuple[SliceResult, ...],
        batch: RunSlice | None = None,
    ) -> SliceDone:
        timings = SliceTimings()
        if batch is not None:
            longest = max(
                tokens.count(o.spec.prompt) + tokens.count(o.tokens) for o in batch.orders
            )
            timings = SliceTimings(
                prefill_s=1e-4 * len(batch.orders) * longest + 0.02,
                decode_s=0.03 * batch.iterations,
                iterations=batch.iterations,
                input_tokens_max=longest,
                batch_size=len(batch.orders),
            )
        return SliceDone(
            epoch=1,
            worker=name,
            batch_id=batch_id,
            form=self.preset.form,
            results=results,
            timings=timings,
            memory=WorkerMemory(kv_tokens_capacity=KV_TOKENS),
        )


def measure(policy: str, waiting: int, workers: int, events: int, seed: int = 0) -> Cost:
    """One policy's cost with this many waiting requests and workers, over so many reports."""
    mesh = _made(policy, waiting, workers, seed)
    names = [f"w{number}" for number in range(workers)]
    mesh.seconds.clear()
    mesh.placed = mesh.rounds = 0
    mesh.round_s_max, mesh.waiting_least = 0.0, 1 << 62
    for number in range(events):
        if not mesh.timed or mesh.round_is_near():
            mesh.fill_up()
        if mesh.preset.form == "leased":
            mesh.waiting_least = min(mesh.waiting_least, len(mesh.core.books.requests.pool))
        mesh.report(names[number % workers])
        mesh.pass_time(EVENT_GAP_S)
        if number % 2 == 0:
            mesh.beat(names[(number // 2) % workers])
        if number % 1000 == 0:
            mesh.say(GatewayBeat(gateway="g"))
    ordered = sorted(mesh.seconds)
    return Cost(
        policy=policy,
        waiting=waiting,
        workers=workers,
        calls=len(ordered),
        mean_s=sum(ordered) / len(ordered),
        p99_s=ordered[int(len(ordered) * 0.99)],
        slowest_s=ordered[-1],
        over_limit=sum(seconds > SLOW_S for seconds in ordered),
        placed=mesh.placed,
        rounds=mesh.rounds,
        waiting_least=mesh.waiting_least,
        round_s_max=mesh.round_s_max,
    )


def _made(policy: str, waiting: int, workers: int, seed: int) -> _Mesh:
    """A full mesh: every worker has work, and the queue is as long as asked."""
    preset = preset_named(policy)
    deals = preset.form == "closed" and PACINGS[preset.pacing].deals
    constants = preset.with_constants(
        batches_max=BATCHES_DEALT if deals else Constants().batches_max,
        waiting_max=1_000_000,
        interval_share=0.0,
        interval_floor_s=ROUND_S,
        interval_s=ROUND_S,
        worker_timeout_s=1e9,
    )
    truth = (lambda request_id: 200) if preset.needs_truth else None
    mesh = _Mesh(preset, Random(seed), Scheduler(preset, constants, truth))
    mesh.say(Elected(epoch=1))
    for number in range(workers):
        mesh.beat(f"w{number}")
    for _ in range(100 * workers + 2 * waiting):
        if len(mesh.core.books.requests.pool) >= waiting and mesh.placed:
            break
        mesh.submit()
        if not mesh.timed:
            mesh.pass_time(EVENT_GAP_S)
        elif mesh.sent >= waiting:
            mesh.pass_time(ROUND_S)
            break
    mesh.queue = waiting
    return mesh


def main(
    policy: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: every preset.")
    ] = None,
    waiting: Annotated[int, typer.Option(help="Requests that wait.")] = 10_000,
    workers: Annotated[int, typer.Option(help="Workers of the mesh.")] = 1_000,
    events: Annotated[int, typer.Option(help="Reports of workers.")] = 4_000,
    growth: Annotated[bool, typer.Option(help="Also with shorter queues, and a plot.")] = False,
    results: Path = RESULTS,
) -> None:
    """Time every call of the core; exit code 1 if a limit is missed."""
    spare_full_collections()
    console = Console()
    costs: list[Cost] = []
    runs = list(_runs(policy or list(PRESETS), waiting, growth=growth))
    for name, queue in track(runs, description="policies", console=console):
        costs.append(measure(name, queue, workers, events))
        cost = costs[-1]
        console.print(f"{name} {queue:,}: {1e3 * cost.mean_s:.3f}, {1e3 * cost.slowest_s:.1f} ms")
    console.print(_table(costs))
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"scheduler-cost-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
    console.print(f"figures: {file}")
    if growth:
        plot = file.with_suffix(".html")
        plot.write_text(growth_page(costs))
        console.print(f"plot: {plot}")
    missed = [cost.policy for cost in costs if cost.over_limit or cost.mean_s > 1e-3]
    if missed:
        console.print(f"over 1 ms in the mean, or over 50 ms in a call: {', '.join(missed)}")
        raise typer.Exit(1)


def _runs(policies: Sequence[str], waiting: int, *, growth: bool) -> Iterator[tuple[str, int]]:
    """(policy, queue length) pairs."""
    for name in policies:
        yield name, waiting
        if growth:
            yield from ((name, waiting // part) for part in (2, 4, 8, 16))


def _table(costs: Sequence[Cost]) -> Table:
    table = Table(title="CPU of the scheduler's core per call, in milliseconds")
    for column in ("policy", "waiting", "workers", "calls", "mean", "p99", "slowest", "placed"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for cost in costs:
        milliseconds = (cost.mean_s, cost.p99_s, cost.slowest_s)
        table.add_row(
            cost.policy,
            f"{cost.waiting:,}",
            f"{cost.workers:,}",
            f"{cost.calls:,}",
            *(f"{1000 * value:.3f}" for value in milliseconds),
            f"{cost.placed:,}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
