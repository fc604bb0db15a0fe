"""The comparison itself: rounds in which every system is measured at every level, in turn.

All servers run from beginning to end; only the one that is measured is not frozen. Within a round
and level all get the same requests, one right after the other, in an order that changes by round.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from bench.peers.cell import Cell, Usage, make_cell
from bench.peers.clients import closed_loop
from bench.peers.processes import Reading, ServerFailed, Tree, read_counters
from bench.peers.systems import HOST, PROBE_S, START_S, Place, Server, System
from bench.peers.workload import Ask, asks

PROBE = Ask(" the of and to in", 5, 4)
QUIET_CORES = 0.1
QUIET_S = 0.3
QUIET_WAIT_S = 15.0
"""How long what is left of cut requests may still run before its server is frozen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    levels: tuple[int, ...]
    rounds: int
    seconds: float
    warm_up_s: float
    seed: int
    client_core: int


@dataclass(slots=True)
class Running:
    """Every system that started, and why the others did not."""

    place: Place
    servers: dict[str, Server] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Beside the figures, such as processes that left their core."""
    restarts: dict[str, int] = field(default_factory=dict)

    def start(self, system: System) -> None:
        """Start it, ask it once, freeze it; a failure is kept in `failed`."""
        tree = Tree(self.place.core, self.place.logs / system.name)
        try:
            server = system.launch(system, self.place, tree)
            asyncio.run(server.probe(PROBE, START_S))
        except Exception as error:  # whatever a foreign server does, the others are measured
            self.failed[system.name] = f"{type(error).__name__}: {error}"
            tree.stop()
            return
        except BaseException:
            tree.stop()
            raise
        off = tree.off_core()
        if off:
            self.notes[system.name] = f"not on the core alone: {', '.join(sorted(set(off)))}"
        tree.freeze()
        self.servers[system.name] = server

    def thawed(self, system: System) -> Server:
        """It, running and answering; started anew if it did not survive the freeze. Raises
        ServerFailed."""
        server = self.servers[system.name]
        server.tree.thaw()
        try:
            asyncio.run(server.probe(PROBE, PROBE_S))
        except ServerFailed:
            server.tree.stop()
            del self.servers[system.name]
            self.restarts[system.name] = self.restarts.get(system.name, 0) + 1
            self.start(system)
            if system.name not in self.servers:
                raise
            server = self.servers[system.name]
            server.tree.thaw()
        return server

    def stop(self) -> None:
        """End all."""
        for server in self.servers.values():
            server.tree.stop()


def cells_of(
    running: Running, systems: Sequence[System], plan: Plan, say: Callable[[str], None]
) -> Iterator[Cell]:
    """Measure cell after cell; a system that fails is left out from then on."""
    for number in range(1, plan.rounds + 1):
        for clients in plan.levels:
            order = [system for system in systems if system.name in running.servers]
            Random(f"{plan.seed} {number} {clients}").shuffle(order)
            for system in order:
                say(f"round {number}/{plan.rounds}, {clients} clients: {system.name}")
                try:
                    server = running.thawed(system)
                except ServerFailed as error:
                    running.failed[system.name] = str(error)
                    continue
                cell = asyncio.run(_measure(server, clients, number, plan))
                _settle(server.tree)
                server.tree.freeze()
                yield cell


async def _measure(server: Server, clients: int, number: int, plan: Plan) -> Cell:
    seed = (plan.seed * 1000 + number) * 1000 + clients
    readings: list[Reading] = []
    rss: list[float] = []

    def at_mark(which: int) -> None:
        readings.append(read_counters(server.tree))
        if which == 1:
            rss.append(server.tree.rss_mb())

    marks = (plan.warm_up_s, plan.warm_up_s + plan.seconds)
    requests = asks(seed)
    traces = await closed_loop(HOST, server.port, requests, server.body, clients, marks, at_mark)
    usage = usage_between(readings[0], readings[1], server.tree.core, plan.client_core)
    window = (readings[0].at_s, readings[1].at_s)
    usage = msgspec.structs.replace(usage, rss_mb=rss[0])
    return make_cell(server.name, clients, number, traces, window, usage)


def usage_between(begin: Reading, end: Reading, server_core: int, client_core: int) -> Usage:
    """What was spent between two readings."""
    seconds = end.at_s - begin.at_s
    tree = (end.tree_s - begin.tree_s) / seconds
    busy = [(b - a) / seconds for a, b in zip(begin.cores_s, end.cores_s, strict=True)]
    return Usage(
        server_cores=tree,
        foreign_cores=max(0.0, busy[server_core] - tree),
        client_core=busy[client_core],
    )


def _settle(tree: Tree) -> None:
    """Wait until what the cut requests have left is done."""
    deadline = time.monotonic() + QUIET_WAIT_S
    while time.monotonic() < deadline:
        before, began = tree.cpu_s(), time.monotonic()
        time.sleep(QUIET_S)
        if (tree.cpu_s() - before) / (time.monotonic() - began) < QUIET_CORES:
            return


def two_cores(wanted: int | None) -> tuple[int, int]:
    """(server's core, client's core); the same one twice if there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    server = allowed[-1] if wanted is None else wanted
    others = [core for core in allowed if core != server]
    return server, others[0] if others else server
