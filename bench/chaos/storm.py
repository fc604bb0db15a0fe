"""The storm: does the schedule's faults to the processes and their lines, each at its time.

What each kind is, honestly:

- kill, terminate: SIGKILL, SIGTERM; pause, freeze: SIGSTOP, and SIGCONT after a time.
- drain: `DrainWorker` is published to the worker, as an operator's order.
- restart: the broker gets SIGKILL with all its children and is started again on its data.
- cut: RST to both ends. half-open: bytes are swallowed both ways, until an end notices by itself.
- delay, slow: bytes are late by a constant, or come at so many per second, both ways.
- duplicate, reorder: a proxy that knows AMQP's frames gives deliveries to the service twice, or
  later than others that the broker sent after them (bench/chaos/frames.py).
- clock: `time.time` of the service jumps, and back at the end (bench/chaos/levers.py).
- disk-full: SQLite gets no new pages.
"""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

from bench.chaos.judge import Done
from bench.chaos.processes import Processes, Service
from bench.chaos.schedule import Fault
from shared.bus.api import BusError
from shared.bus.connect import make_bus
from shared.bus.identity import public_id
from shared.bus.topology import addresses_of
from shared.messages import DrainWorker
from tests.rabbitmq import Broker

SEARCH_S = 4.0
"""For somebody in the fault's role; then it is void."""
DRAIN_SAID_S = 5.0
QUEUES = "/api/queues/%2F"


class Storm:
    """One run's faults. `tell` gets a line for each."""

    def __init__(self, processes: Processes, tell: Callable[[str], None]) -> None:
        self._processes = processes
        self._tell = tell
        self._mending: set[asyncio.Task[None]] = set()
        self.done: list[Done] = []

    async def run(self, faults: Sequence[Fault]) -> None:
        """Each at its time; returns after the last one began."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at_s - loop.time()))
            await self._strike(fault)

    async def calm(self) -> None:
        """Every fault that lasts is over now."""
        for task in tuple(self._mending):
            task.cancel()
        await asyncio.gather(*self._mending, return_exceptions=True)

    async def _strike(self, fault: Fault) -> None:
        loop = asyncio.get_running_loop()
        service: Service | None = None
        if fault.role != "broker":
            deadline = loop.time() + SEARCH_S
            service = await self._processes.find(fault.role, fault.worker)
            while service is None and loop.time() < deadline:
                await asyncio.sleep(0.2)
                service = await self._processes.find(fault.role, fault.worker)
        who = "broker" if fault.role == "broker" else service.name if service else ""
        done = Done(fault=fault, at=loop.time(), until=loop.time() + fault.lasts_s, who=who)
        done.spare = service is None or self._processes.spare(service)
        self.done.append(done)
        self._tell(f"#{fault.number} {fault.text()}: {who or 'nobody is there'}")
        if fault.role == "broker":
            await self._restart_broker(fault, done)
        elif service is not None:
            await self._befall(fault, service, done)

    async def _restart_broker(self, fault: Fault, done: Done) -> None:
        await self._processes.with_broker(Broker.kill)
        await asyncio.sleep(fault.restart_s)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._processes.with_broker(Broker.start)
        done.until = loop.time()
        done.said = f"{done.until - done.at:.1f} s, of it {done.until - began:.1f} s its start"
        self._tell(f"#{fault.number} broker is back: {done.said}")

    async def _befall(self, fault: Fault, service: Service, done: Done) -> None:
        line = service.line
        match fault.kind:
            case "kill":
                service.expect_end(fault.restart_s)
                service.signal(signal.SIGKILL)
            case "terminate":
                service.expect_end(fault.restart_s)
                service.signal(signal.SIGTERM)
            case "drain":
                await self._drain(fault, service, done)
            case "pause" | "freeze":
                service.signal(signal.SIGSTOP)
                self._later(fault, lambda: service.signal(signal.SIGCONT))
            case "cut":
                done.said = f"{line.cut(one=fault.one_line)} connections"
            case "half-open":
                done.said = f"{line.half_open(one=fault.one_line)} connections"
            case "delay":
                line.delay_s = fault.amount
                self._later(fault, line.heal)
            case "slow":
                line.bytes_per_s = fault.amount
                self._later(fault, line.heal)
            case "duplicate":
                line.mischief.duplicate = fault.amount
                self._later(fault, line.heal)
            case "reorder":
                line.mischief.reorder = fault.amount
                self._later(fault, line.heal)
            case "clock":
                service.levers.set(ahead_s=fault.amount)
                self._later(fault, lambda: service.levers.set(ahead_s=0.0))
            case "disk-full":
                service.levers.set(disk_full=True)
                self._later(fault, lambda: service.levers.set(disk_full=False))
            case _:
                raise AssertionError(f"nobody does {fault.kind}")

    async def _drain(self, fault: Fault, service: Service, done: Done) -> None:
        boot_id = await self._whole_id(service.boot_id())
        epoch = max((await self._processes.epochs()).values(), default=0)
        bus = make_bus(self._processes.broker.url, service="chaos")
        order = DrainWorker(epoch=epoch, worker=boot_id)
        service.expect_end(fault.restart_s)
        try:
            await bus.open(DRAIN_SAID_S)
            await bus.publish(addresses_of(order)[0], order, deadline_s=DRAIN_SAID_S)
        except BusError as error:
            done.said = f"not said: {error}"
        finally:
            with suppress(BusError):
                await bus.close()

    async def _whole_id(self, shown: str) -> str:
        """Logs cut off the secret part of an id; the name of the worker's queue has it."""
        try:
            listed = await self._processes.with_broker(
                lambda broker: broker.management.call("GET", QUEUES)
            )
        except OSError:
            return shown
        assert isinstance(listed, list)
        names = [str(queue["name"]) for queue in listed]
        ids = [name.removeprefix("tranche.worker.") for name in names]
        return next((each for each in ids if public_id(each) == shown), shown)

    def _later(self, fault: Fault, mend: Callable[[], None]) -> None:
        """`mend` after the fault's time, or when the storm is called off."""

        async def wait() -> None:
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                mend()

        task = asyncio.create_task(wait())
        self._mending.add(task)
        task.add_done_callback(self._mending.discard)
