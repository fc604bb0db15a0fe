"""The schedule of faults: a pure function of a seed and a length.

A fault is a value: when, what, to whom, for how long, how strong. Most are followed by a quiet time
in which the mesh can recover, so that a recovery can be told from the next fault; some come right
on another's heels. A few kinds are heavy (the mesh may rest for two heartbeats of the broker):
a run has few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import msgspec

WORKERS = 3
SERVICES = ("worker", "leader", "standby", "estimator", "gateway-1", "gateway-2")
"""Roles; which scheduler leads is known when the fault comes."""
MORTAL = ("worker", "leader", "standby", "estimator", "gateway-2")
"""Who may be killed: the streams of the gateway under observation must not end with it."""
HEARTBEAT_S = 10.0
"""The measure of the bound for a silent leader. Ours are shorter (shared/bus/rabbit_line.py)."""
FIRST_S = 3.0
"""Some streams are under way by then."""
LAST_QUIET_S = 6.0
"""No fault begins in the last seconds: streams would end before they show anything."""
HEELS_SHARE = 0.15
"""So many faults are followed by the next one at once."""
HEELS_S = 1.5
HEAVY_EVERY_S = 75.0
"""One heavy fault for so much of a run; at least one."""
BROKER_RESTARTS_MAX = 3
JUMP_S = (30.0, 86_400.0)
"""How far a wall clock jumps, forth or back."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong."""

    number: int
    at_s: float
    """After the beginning of the storm."""
    kind: str
    role: str
    worker: int = 0
    """Which one, where the role is `worker`: 1 is the one that holds most then."""
    lasts_s: float = 0.0
    """How long it is kept up; 0: an instant."""
    restart_s: float = 0.0
    """What died is started again after this."""
    amount: float = 0.0
    """Seconds of delay or of a clock's jump, bytes per second, a share of messages."""
    one_line: bool = False
    """Only one of the service's connections, not all."""
    quiet_s: float = 0.0
    """No other fault comes for so long, unless one is on this one's heels."""

    def text(self) -> str:
        """For people."""
        who = f"worker (rank {self.worker})" if self.role == "worker" else self.role
        more = [f"{self.lasts_s:.1f} s"] if self.lasts_s else []
        more += [f"amount {self.amount:.3g}"] if self.amount else []
        more += ["one connection"] if self.one_line else []
        return f"{self.kind} {who}" + (f" ({', '.join(more)})" if more else "")


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table of faults."""

    name: str
    roles: Sequence[str]
    """A role that stands here twice is met twice as often."""
    quiet_s: float
    """After its end."""
    lasts_s: tuple[float, float] = (0.0, 0.0)
    amount: tuple[float, float] = (0.0, 0.0)
    heavy: bool = False


KINDS = (
    Kind("kill", (*MORTAL, "worker", "worker", "leader", "leader"), quiet_s=5.0),
    Kind("pause", SERVICES, quiet_s=2.5, lasts_s=(0.3, 1.2)),
    Kind("freeze", ("worker", "worker", "gateway-1", "gateway-2"), quiet_s=3.0, lasts_s=(3.0, 8.0)),
    Kind("freeze", ("standby", "estimator"), quiet_s=2.0, lasts_s=(3.0, 8.0)),
    Kind("freeze", ("leader",), quiet_s=4.0, lasts_s=(22.0, 28.0), heavy=True),
    Kind("terminate", MORTAL, quiet_s=5.0),
    Kind("drain", ("worker",), quiet_s=5.0),
    Kind("restart", ("broker",), quiet_s=22.0, heavy=True),
    Kind("cut", SERVICES, quiet_s=4.0),
    Kind("half-open", ("worker", "worker", "gateway-2"), quiet_s=5.0),
    Kind("half-open", ("standby", "estimator"), quiet_s=3.0),
    Kind("half-open", ("leader", "gateway-1"), quiet_s=33.0, heavy=True),
    Kind("delay", SERVICES, quiet_s=1.5, lasts_s=(2.0, 5.0), amount=(0.05, 0.4)),
    Kind("slow", SERVICES, quiet_s=2.0, lasts_s=(2.0, 5.0), amount=(2_000.0, 30_000.0)),
    Kind("duplicate", SERVICES, quiet_s=1.0, lasts_s=(3.0, 6.0), amount=(0.1, 0.9)),
    Kind("reorder", SERVICES, quiet_s=1.0, lasts_s=(3.0, 6.0), amount=(0.1, 0.6)),
    Kind("clock", SERVICES, quiet_s=2.0, lasts_s=(2.0, 5.0), amount=JUMP_S),
    Kind("disk-full", ("estimator",), quiet_s=1.0, lasts_s=(5.0, 12.0)),
)
"""What each of them does: bench/chaos/storm.py."""
INSTANT_RESTART_S = (0.2, 2.0)


def schedule(seed: int, seconds: float) -> tuple[Fault, ...]:
    """The faults of a run, in the order of their times."""
    rng = Random(f"faults {seed}")
    light, heavy = _decks(rng)
    heavies = max(1, int(seconds / HEAVY_EVERY_S))
    heavy_at = sorted(rng.uniform(0.1, 0.75) * seconds for _ in range(heavies))
    faults: list[Fault] = []
    at_s, end_s = FIRST_S, seconds - LAST_QUIET_S
    while at_s < end_s:
        if heavy_at and at_s >= heavy_at[0] and heavy:
            heavy_at.pop(0)
            kind, role = heavy.pop()
        else:
            if not light:
                light = _decks(rng)[0]
            kind, role = light.pop()
        fault = _fault(rng, len(faults), round(at_s, 2), kind, role)
        faults.append(fault)
        at_s += fault.quiet_s
        if not kind.heavy and rng.random() < HEELS_SHARE:
            at_s = fault.at_s + rng.uniform(0.0, HEELS_S)
    return tuple(faults)


def _decks(rng: Random) -> tuple[list[tuple[Kind, str]], list[tuple[Kind, str]]]:
    """Every kind with each of its roles, shuffled: the light ones and the heavy ones."""
    pairs = [(kind, role) for kind in KINDS for role in kind.roles]
    rng.shuffle(pairs)
    return [p for p in pairs if not p[0].heavy], [p for p in pairs if p[0].heavy]


def _fault(rng: Random, number: int, at_s: float, kind: Kind, role: str) -> Fault:
    lasts_s = rng.uniform(*kind.lasts_s)
    low, high = kind.amount
    amount = low * (high / low) ** rng.random() if low else 0.0
    if kind.name == "clock":
        amount *= rng.choice((-1, 1))
    mends = kind.name in ("kill", "terminate", "drain", "restart")
    return Fault(
        number=number,
        at_s=at_s,
        kind=kind.name,
        role=role,
        worker=rng.choice((1, 1, *range(1, WORKERS + 1))) if role == "worker" else 0,
        lasts_s=round(lasts_s, 2),
        restart_s=round(rng.uniform(*INSTANT_RESTART_S), 2) if mends else 0.0,
        amount=round(amount, 4),
        one_line=kind.name in ("cut", "half-open") and rng.random() < 0.4,
        quiet_s=round((lasts_s + kind.quiet_s) * rng.uniform(0.95, 1.25), 2),
    )
