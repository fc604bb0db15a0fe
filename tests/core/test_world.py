"""The core in a mesh with faults: nothing is lost, doubled or spliced, and everything ends."""

from random import Random

import pytest

from services.scheduler.core.presets import PRESETS
from services.scheduler.core.settings import Constants
from tests.core.world import STORM, World

LIVE = Constants(
    slice_tokens=16,
    interval_floor_s=0.003,
    interval_s=0.1,
    gather_s=0.003,
    spread_batches=True,
    round_on_idle=True,
    overdue_s=8.0,
)


def make_world(policy: str, seed: int, workers: int = 3, constants: Constants = LIVE) -> World:
    world = World(policy, seed, constants)
    for _ in range(workers):
        world.add_worker()
    world.add_gateway()
    world.run(0.1)
    return world


def submit_some(world: World, count: int, spread_s: float = 2.0) -> None:
    rng = world.net.rng
    for gateway in list(world.gateways.values()):
        for number in range(count):
            length = 1 + int(rng.expovariate(1 / 40))
            prompt = rng.randint(1, 200)
            world.run(rng.random() * spread_s / count)
            gateway.submit(f"{gateway.boot}-{number}", prompt, length, 120)


@pytest.mark.parametrize("policy", PRESETS)
def test_all_requests_are_served(policy: str) -> None:
    world = make_world(policy, 1)
    submit_some(world, 60)
    world.run_until_done(120)
    world.check_drained()
    assert len(world.finished) == 60
    for request_id, ends in world.finished.items():
        truth = world.truth[request_id]
        expected = ("stop", truth) if truth <= 120 else ("length", 120)
        assert [(end.reason, end.output_tokens) for end in ends] == [expected]


def make_trouble(world: World, rng: Random) -> None:
    """One misfortune."""
    workers, gateways = list(world.workers.values()), list(world.gateways.values())
    kind = rng.choice(("worker", "join", "quiet", "leave", "leader", "cancel", "stop", "muted"))
    if kind == "worker" and workers:
        rng.choice(workers).die()
    elif kind == "join" and len(workers) < 5:
        world.add_worker(capacity=rng.choice((600, 2000)), batch_size_max=rng.choice((0, 4)))
    elif kind == "quiet" and workers:
        rng.choice(workers).quiet_until = world.net.now + 4
    elif kind == "leave" and workers:
        rng.choice(workers).leave()
    elif kind == "leader":
        world.kill_scheduler(rng.uniform(0.05, 3))
    elif kind == "muted":
        rng.choice(gateways).quiet_until = world.net.now + 6
    else:
        open_now = [(g, x) for g in gateways for x in g.ledgers.values() if not x.ended]
        if open_now:
            gateway, ledger = rng.choice(open_now)
            gateway.stop(ledger) if kind == "stop" else gateway.cancel(ledger)


@pytest.mark.parametrize(
    "policy", ["sls", "so", "lb", "scls", "past-future", "vllm", "tgi", "sal+larry"]
)
@pytest.mark.parametrize("seed", range(8))
def test_storm(policy: str, seed: int) -> None:
    world = make_world(policy, seed)
    world.add_gateway()
    rng = Random(seed)
    world.net.faults = STORM
    for number in range(12):
        gateway = rng.choice(list(world.gateways.values()))
        for part in range(4):
            length = 1 + int(rng.expovariate(1 / 40))
            gateway.submit(f"{number}-{part}", rng.randint(1, 200), length, 120)
        world.run(rng.uniform(0.1, 1.5))
        make_trouble(world, rng)
    world.add_worker()
    world.run_until_done(400)
    world.check_drained()
