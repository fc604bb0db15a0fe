"""Faults: what each kind of misfortune does to a world."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from sim.storm.plan import KINDS, Fault

if TYPE_CHECKING:
    from sim.storm.gateway import Gateway
    from sim.storm.process import Process
    from sim.storm.scheduler import SchedulerProcess
    from sim.storm.storm import Storm
    from sim.storm.worker import StormWorker

Some = TypeVar("Some", bound="Process")
WORKERS_MAX, GATEWAYS_MAX = 5, 4
CLOSED_AFTER_S = 4.0
"""The broker closes the line of a process that was stopped for so long: two heartbeats, shorter
than the real ones so that a storm need not last for minutes."""
SLOW = 12.0
"""Times the usual time of an iteration."""
BACK_S = 1.5
"""Until a dead process is started anew."""


def perform(storm: "Storm", fault: Fault) -> bool:
    """Let it happen; False if there is nobody whom it could meet."""
    assert fault.kind in KINDS
    return _ACTIONS[fault.kind](storm, fault)


def _one_of(some: list[Some], fault: Fault) -> Some | None:
    return some[fault.luck % len(some)] if some else None


def _freeze(storm: "Storm", process: "Process", seconds: float) -> None:
    process.freeze()
    storm.world.after(seconds, process.thaw)
    if seconds > CLOSED_AFTER_S:
        storm.world.after(CLOSED_AFTER_S, storm.broker.cut, process, seconds - CLOSED_AFTER_S + 0.2)


# --------------------------------------------------------------------------------------- workers


def _worker(act: Callable[["Storm", "StormWorker", Fault], None]) -> Callable[..., bool]:
    def action(storm: "Storm", fault: Fault) -> bool:
        worker = _one_of([w for w in storm.workers if not w.frozen], fault)
        if worker is not None:
            act(storm, worker, fault)
        return worker is not None

    return action


def _kill_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    worker.die()
    storm.world.after(BACK_S * fault.lasts_s / 3, storm.add_worker)


def _lose_host(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    worker.die(noticed_s=fault.lasts_s)
    storm.world.after(BACK_S, storm.add_worker)


def _stop_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    storm.excuse(worker)
    _freeze(storm, worker, 1.5 * fault.lasts_s)


def _slow_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    worker.slow = SLOW

    def well() -> None:
        worker.slow = 1.0

    storm.world.after(fault.lasts_s, well)


def _cut_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    storm.excuse(worker)
    storm.broker.cut(worker)


def _half_open_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    storm.excuse(worker)
    storm.broker.silence(worker, fault.lasts_s)


def _slow_line(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    worker.line.slow_s = fault.lasts_s / 8

    def well() -> None:
        worker.line.slow_s = 0.0

    storm.world.after(fault.lasts_s, well)


def _drain_worker(storm: "Storm", worker: "StormWorker", fault: Fault) -> None:
    worker.drain()
    storm.world.after(BACK_S, storm.add_worker)


def _join_worker(storm: "Storm", fault: Fault) -> bool:
    if len(storm.workers) >= WORKERS_MAX:
        return False
    storm.add_worker()
    return True


# ------------------------------------------------------------------------------------ schedulers


def _leader(act: Callable[["Storm", "SchedulerProcess", Fault], None]) -> Callable[..., bool]:
    def action(storm: "Storm", fault: Fault) -> bool:
        leader = storm.leader
        if leader is None or leader.frozen:
            return False
        storm.excuse_all()
        act(storm, leader, fault)
        return True

    return action


def _kill_leader(storm: "Storm", leader: "SchedulerProcess", fault: Fault) -> None:
    leader.die(noticed_s=fault.lasts_s / 2 if fault.luck % 3 == 0 else 0.0)
    storm.world.after(BACK_S, storm.add_scheduler)


def _kill_standby(storm: "Storm", fault: Fault) -> bool:
    leader = storm.leader
    standby = _one_of([s for s in storm.schedulers if s is not leader], fault)
    if standby is None:
        return False
    standby.die()
    storm.world.after(BACK_S, storm.add_scheduler)
    return True


def _stop_leader(storm: "Storm", leader: "SchedulerProcess", fault: Fault) -> None:
    _freeze(storm, leader, 1.5 * fault.lasts_s)


def _zombie(storm: "Storm", leader: "SchedulerProcess", fault: Fault) -> None:
    storm.broker.deafen(leader, fault.lasts_s)


def _cut_leader(storm: "Storm", leader: "SchedulerProcess", fault: Fault) -> None:
    storm.broker.cut(leader)


def _half_open_leader(storm: "Storm", leader: "SchedulerProcess", fault: Fault) -> None:
    storm.broker.silence(leader, fault.lasts_s)


# ----------------------------------------------------------------------------- gateways and others


def _gateway(act: Callable[["Storm", "Gateway", Fault], None]) -> Callable[..., bool]:
    def action(storm: "Storm", fault: Fault) -> bool:
        gateway = _one_of([g for g in storm.gateways if not g.frozen], fault)
        if gateway is not None:
            act(storm, gateway, fault)
        return gateway is not None

    return action


def _kill_gateway(storm: "Storm", gateway: "Gateway", fault: Fault) -> None:
    gateway.die(noticed_s=fault.lasts_s if fault.luck % 3 == 0 else 0.0)
    storm.world.after(BACK_S, storm.add_gateway)


def _stop_gateway(storm: "Storm", gateway: "Gateway", fault: Fault) -> None:
    _freeze(storm, gateway, 1.5 * fault.lasts_s)


def _cut_gateway(storm: "Storm", gateway: "Gateway", fault: Fault) -> None:
    storm.broker.cut(gateway)


def _half_open_gateway(storm: "Storm", gateway: "Gateway", fault: Fault) -> None:
    storm.broker.silence(gateway, fault.lasts_s)


def _leave_gateway(storm: "Storm", gateway: "Gateway", fault: Fault) -> None:
    gateway.leave()
    storm.world.after(0.2, storm.add_gateway)


def _join_gateway(storm: "Storm", fault: Fault) -> bool:
    if len(storm.gateways) >= GATEWAYS_MAX:
        return False
    storm.add_gateway()
    return True


def _kill_estimator(storm: "Storm", fault: Fault) -> bool:
    if storm.estimator is None:
        return False
    storm.estimator.die()
    storm.world.after(BACK_S, storm.add_estimator)
    return True


def _restart_broker(storm: "Storm", fault: Fault) -> bool:
    if not storm.broker.up:
        return False
    storm.excuse_all()
    storm.broker.restart(fault.lasts_s / 3, list(storm.processes))
    return True


def _jump_clock(storm: "Storm", fault: Fault) -> bool:
    process = _one_of(storm.processes, fault)
    if process is None:
        return False
    process.jump(2.0 * fault.lasts_s)
    return True


_ACTIONS: dict[str, Callable[["Storm", Fault], bool]] = {
    "worker killed": _worker(_kill_worker),
    "worker's host lost": _worker(_lose_host),
    "worker stopped": _worker(_stop_worker),
    "worker slow": _worker(_slow_worker),
    "worker's line cut": _worker(_cut_worker),
    "worker's line half open": _worker(_half_open_worker),
    "worker's line slow": _worker(_slow_line),
    "worker drained": _worker(_drain_worker),
    "worker joins": _join_worker,
    "leader killed": _leader(_kill_leader),
    "leader stopped": _leader(_stop_leader),
    "leader is a zombie": _leader(_zombie),
    "leader's line cut": _leader(_cut_leader),
    "leader's line half open": _leader(_half_open_leader),
    "standby killed": _kill_standby,
    "estimator killed": _kill_estimator,
    "gateway killed": _gateway(_kill_gateway),
    "gateway stopped": _gateway(_stop_gateway),
    "gateway's line cut": _gateway(_cut_gateway),
    "gateway's line half open": _gateway(_half_open_gateway),
    "gateway leaves": _gateway(_leave_gateway),
    "gateway joins": _join_gateway,
    "broker restarts": _restart_broker,
    "clock jumps": _jump_clock,
}
