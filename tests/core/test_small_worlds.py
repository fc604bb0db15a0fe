"""Every small world: two workers, three requests, and one fault of each kind at every message.

The undisturbed run says how many messages there are; then each of them in turn is lost, repeated,
overtaken, or is the moment at which a process dies. The world checks safety at every message; in
the end everything has ended and the books are empty.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.core.test_world import LIVE
from tests.core.world import CALM, MENDED, World

CONSTANTS = replace(LIVE, slice_tokens=4, overdue_s=3.0)
CAPACITY = 44
"""Tokens of a worker: leased requests have to be parked, closed ones do not fit together."""
REQUESTS = ((20, 12), (24, 14), (14, 15))
"""(prompt, true output) of each; the limit is 16."""
LIMIT = 16
SETTLE_S = 12.0
POLICIES = ("scls", "aggressive", "vllm")

Fault = Callable[[World], None]


def small(policy: str) -> World:
    world = World(policy, 0, CONSTANTS)
    world.add_worker(CAPACITY)
    world.add_worker(CAPACITY)
    world.add_gateway()
    world.run(0.01)
    return world


def submit(world: World) -> None:
    (gateway,) = world.gateways.values()
    for number, (prompt, output) in enumerate(REQUESTS):
        gateway.submit(f"r{number}", prompt, output, LIMIT)


def first_worker_dies(world: World) -> None:
    """Another comes a second later."""
    next(iter(world.workers.values())).die()
    world.net.after(1.0, lambda: world.add_worker(CAPACITY) and None)


def first_worker_hangs(world: World) -> None:
    """It is silent until it is given up, and then speaks again."""
    next(iter(world.workers.values())).quiet_until = world.net.now + 3.0


def first_worker_leaves(world: World) -> None:
    next(iter(world.workers.values())).leave()


def leader_dies(world: World) -> None:
    world.kill_scheduler(0.3)


def leader_restarts_at_once(world: World) -> None:
    world.kill_scheduler(0.0)


def gateway_is_mute(world: World) -> None:
    (gateway,) = world.gateways.values()
    gateway.quiet_until = world.net.now + 5.0


def _first_open(world: World, act: str) -> None:
    (gateway,) = world.gateways.values()
    ledger = next((x for x in gateway.ledgers.values() if not x.ended), None)
    if ledger is not None:
        getattr(gateway, act)(ledger)


def client_cancels(world: World) -> None:
    _first_open(world, "cancel")


def client_has_its_stop(world: World) -> None:
    _first_open(world, "stop")


PROCESS_FAULTS: tuple[Fault, ...] = (
    first_worker_dies,
    first_worker_hangs,
    first_worker_leaves,
    leader_dies,
    leader_restarts_at_once,
    gateway_is_mute,
    client_cancels,
    client_has_its_stop,
)


class Tap:
    """Counts the messages of a world, and does something at one of them."""

    def __init__(self, world: World, at: int, fate: str, fault: Fault | None = None) -> None:
        self.world, self.at, self.fate, self.fault = world, at, fate, fault
        self.count = 0
        self.inner = world.net.carry
        world.net.carry = self.carry  # type: ignore[method-assign]

    def carry(self, message: object, deliver: Callable[[object], None]) -> None:
        mine = self.count == self.at
        self.count += 1
        if not mine:
            self.inner(message, deliver)
        elif self.fault is not None:
            self.inner(message, deliver)
            self.world.net.after(0.0, lambda: self.fault and self.fault(self.world))
        elif self.fate == "lost" and isinstance(message, MENDED):
            return
        elif self.fate == "late":
            self.world.net.after(2.0, lambda: self.inner(message, deliver))
        else:
            self.inner(message, deliver)
            self.world.net.after(0.7, lambda: self.inner(message, deliver))


def lived_through(policy: str, at: int, fate: str, fault: Fault | None = None) -> int:
    """One world; how many messages it had until all was served."""
    world = small(policy)
    tap = Tap(world, at, fate, fault)
    submit(world)
    world.net.faults = CALM
    world.run_until_done(120)
    served = tap.count
    world.check_drained(SETTLE_S)
    return served


def messages_of(policy: str) -> int:
    """Of the undisturbed run."""
    return lived_through(policy, -1, "")


@pytest.mark.parametrize("fate", ["lost", "repeated", "late"])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_message_may_have_any_fate(policy: str, fate: str) -> None:
    for at in range(messages_of(policy)):
        lived_through(policy, at, fate)


@pytest.mark.parametrize("fault", PROCESS_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_anybody_may_fail_at_any_message(policy: str, fault: Fault) -> None:
    for at in range(messages_of(policy)):
        lived_through(policy, at, "", fault)


def test_the_worlds_are_not_idle() -> None:
    """They have enough messages, and in a leased one a request loses its place."""
    assert all(messages_of(policy) > 25 for policy in POLICIES)
    world = small("aggressive")
    submit(world)
    world.run_until_done(60)
    assert world.core is not None
    assert world.core.books.evictions > 0
