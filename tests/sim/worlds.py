"""Small set-ups for tests of the simulator."""

from collections.abc import Sequence
from random import Random
from typing import Any

from services.scheduler.core.presets import preset_named
from shared.profiles import CostProfile, load_profile
from sim.checker import Facts, Violation
from sim.checkers import judge
from sim.items import Item, Workload
from sim.run import Keep, Outcome, run
from sim.setup import Setup

PROFILE = "llama-2-13b-a100"
QUICK = {"interval_floor_s": 0.1, "interval_s": 0.5}
"""Of closed presets: rounds as often as a live mesh has them."""
SEEN = Keep(messages=True)


def profile() -> CostProfile:
    """A model of the size that the papers used."""
    return load_profile(PROFILE)


def items(count: int, rate: float = 5.0, seed: int = 1, output_max: int = 300) -> tuple[Item, ...]:
    """Requests with random lengths, most of them short, at random times."""
    rng, now, made = Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        prompt = 1 + min(1500, int(rng.expovariate(1 / 250)))
        output = 1 + min(output_max - 1, int(rng.expovariate(1 / 90)))
        made.append(Item(now, prompt, output))
    return tuple(made)


def setup(policy: str, requests: Sequence[Item] | None = None, **changes: Any) -> Setup:
    """Two workers and a short load, with rounds often enough for it."""
    clients = changes.pop("clients", None)
    closed = preset_named(policy).form == "closed"
    constants = {**(QUICK if closed else {}), **changes.pop("constants", {})}
    given: dict[str, Any] = {"workers": 2, "profile": profile(), "constants": constants}
    workload = Workload("toy", tuple(requests or items(60)), clients)
    return Setup(policy=policy, workload=workload, **(given | changes))


def lengths(outcome: Outcome, requests: Sequence[Item]) -> dict[str, int]:
    """The truth about every sending of an open loop."""
    assert len(outcome.records) == len(requests)
    return {f"r{number}": item.output_tokens for number, item in enumerate(requests)}


def judged(given: Setup, **facts: Any) -> tuple[Outcome, list[Violation]]:
    """Run it, and judge what was said."""
    outcome = run(given, keep=SEEN)
    truth = lengths(outcome, given.workload.items)
    return outcome, judge(outcome.messages, Facts(truth, **facts))
