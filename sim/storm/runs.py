"""Many storms: chunks of seeds for parallel processes, and what is told of all of them together."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from time import process_time

import msgspec

from shared.costs import load_solver
from sim.checker import Violation
from sim.storm.plan import plan_of
from sim.storm.storm import Outcome, Storm

CHUNK = 50
"""Worlds of one task."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Seeds from `first` to `last`, both run."""

    first: int
    last: int


class Failed(msgspec.Struct, frozen=True):
    """A world in which a promise was broken."""

    seed: int
    policy: str
    violations: list[str]


@dataclass(slots=True)
class Tally:
    """Of one chunk."""

    cpu_s: list[float] = field(default_factory=list)
    calm_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    """Share of the allowed time, of the two above the larger."""
    faults: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    harsh: int = 0
    epochs: int = 0
    events: int = 0
    short: int = 0
    failed: list[Failed] = field(default_factory=list)


class Summary(msgspec.Struct):
    """The result of a run, as it is stored. Times in seconds; quantiles over worlds."""

    worlds: int
    first_seed: int
    last_seed: int
    harsh_worlds: int
    """Worlds whose broker also loses, repeats and reorders."""
    failed: list[Failed]
    cpu_s: dict[str, float]
    """Of this machine's processor, per world."""
    calm_s: dict[str, float]
    """From the end of the storm to the end of the last request."""
    waited_s: dict[str, float]
    """The longest that a request made no progress although it could have been served."""
    allowed_share: dict[str, float]
    """The larger of the two as a share of what was allowed in its world."""
    faults: dict[str, int]
    messages: dict[str, int]
    """What befell messages."""
    requests: dict[str, int]
    """By outcome."""
    policies: dict[str, int]
    elections: int
    events: int
    short_of_memory: int
    """Refusals and evictions for memory after words to a worker were lost, in all worlds."""


def chunks(first: int, worlds: int) -> list[Chunk]:
    """Tasks of about `CHUNK` worlds."""
    assert worlds > 0
    end = first + worlds
    return [Chunk(seed, min(seed + CHUNK, end) - 1) for seed in range(first, end, CHUNK)]


def run_chunk(chunk: Chunk, progress: Callable[[int, int], None]) -> Tally:
    """One task. What is loaded only once is loaded before the first world's time is taken."""
    load_solver()
    tally = Tally()
    total = chunk.last - chunk.first + 1
    for seed in range(chunk.first, chunk.last + 1):
        began = process_time()
        outcome = run_one(seed)
        _count(tally, outcome, process_time() - began)
        progress(seed - chunk.first + 1, total)
    return tally


def run_one(seed: int) -> Outcome:
    """One world. A core that fails an assertion has broken a promise, too."""
    storm = Storm(plan_of(seed))
    try:
        return storm.run()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        storm.judge.violations.append(Violation(storm.world.now, "crash", what))
        return Outcome(seed, storm.plan.policy, storm.plan.harsh, storm.judge.violations)


def _count(tally: Tally, outcome: Outcome, cpu_s: float) -> None:
    tally.cpu_s.append(cpu_s)
    tally.calm_s.append(outcome.calm_s)
    tally.waited_s.append(outcome.waited_s)
    most_s = max(outcome.calm_s, outcome.waited_s)
    tally.used.append(most_s / outcome.allowed_s if outcome.allowed_s else 0.0)
    tally.faults += outcome.faults
    tally.messages += outcome.messages
    tally.requests += outcome.requests
    tally.policies[outcome.policy] += 1
    tally.harsh += outcome.harsh
    tally.epochs += outcome.epochs
    tally.events += outcome.events
    tally.short += outcome.short
    if outcome.violations:
        told = [f"{v.at:.3f} s, {v.rule}: {v.detail}" for v in outcome.violations]
        tally.failed.append(Failed(outcome.seed, outcome.policy, told))


def summed(first: int, tallies: Sequence[Tally]) -> Summary:
    """All chunks together."""
    worlds = sum(len(tally.cpu_s) for tally in tallies)
    return Summary(
        worlds=worlds,
        first_seed=first,
        last_seed=first + worlds - 1,
        harsh_worlds=sum(tally.harsh for tally in tallies),
        failed=[failed for tally in tallies for failed in tally.failed],
        cpu_s=_quantiles(seconds for tally in tallies for seconds in tally.cpu_s),
        calm_s=_quantiles(seconds for tally in tallies for seconds in tally.calm_s),
        waited_s=_quantiles(seconds for tally in tallies for seconds in tally.waited_s),
        allowed_share=_quantiles(share for tally in tallies for share in tally.used),
        faults=_all(tally.faults for tally in tallies),
        messages=_all(tally.messages for tally in tallies),
        requests=_all(tally.requests for tally in tallies),
        policies=_all(tally.policies for tally in tallies),
        elections=sum(tally.epochs for tally in tallies),
        events=sum(tally.events for tally in tallies),
        short_of_memory=sum(tally.short for tally in tallies),
    )


def _all(counters: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total += counter
    return dict(sorted(total.items()))


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)

    def quantile(share: float) -> float:
        return round(ordered[max(0, ceil(share * len(ordered)) - 1)], 4)

    mean = round(sum(ordered) / len(ordered), 4)
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"mean": mean} | {name: quantile(share) for name, share in names.items()}
