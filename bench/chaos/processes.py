"""The services as processes: started, watched, started again after what kills them, ended.

Every service has a line of its own to the broker, levers of its own, and a log for each of its
lives. Who ends without having been told to is a finding.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from bench.chaos.levers import Levers
from bench.chaos.line import Line
from bench.chaos.questions import MODEL
from bench.chaos.schedule import WORKERS
from bench.mesh import free_ports
from tests.rabbitmq import Broker, make_broker

T = TypeVar("T")

WATCH_S = 0.05
RESTART_S = 1.0
"""After an end that nobody caused."""
STOP_S = 25.0
ASK_S = 1.0
"""For a service's own port; a frozen one does not answer."""
SLICE_TOKENS = 16
"""Short leases: a stream has several of them, and faults meet renewals."""
KV_TOKENS = 2_560
"""Of a worker: with one or two of them gone, memory is scarce."""


@dataclass(slots=True)
class Service:
    """One service through all its lives."""

    name: str
    command: list[str]
    line: Line
    levers_file: Path
    logs: Path
    port: int
    """Of its HTTP interface."""
    environment: dict[str, str]
    levers: Levers = field(init=False)
    process: "subprocess.Popen[bytes] | None" = None
    lives: int = 0
    ends_expected: bool = False
    restart_s: float = RESTART_S
    frozen: bool = False
    up: bool = False
    """It said that it is ready, in this life."""

    def __post_init__(self) -> None:
        self.levers = Levers(self.levers_file)

    @property
    def log(self) -> Path:
        """Of the present life."""
        return self.logs / f"{self.name}.{self.lives}.log"

    @property
    def alive(self) -> bool:
        """The process exists."""
        return self.process is not None and self.process.poll() is None

    @property
    def url(self) -> str:
        """Of its HTTP interface."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """A new life."""
        self.lives += 1
        self.ends_expected = self.frozen = self.up = False
        self.restart_s = RESTART_S
        journal = ["--journal", f"{self.log}.journal"] if "scheduler" in self.command else []
        levers = ["-m", "bench.chaos.levers", str(self.levers_file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own
                [sys.executable, *levers, *self.command, *journal],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    def signal(self, number: signal.Signals) -> None:
        """To the process, if it is there."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.frozen = number == signal.SIGSTOP

    def expect_end(self, restart_s: float) -> None:
        """It is told to end: no finding."""
        self.ends_expected, self.restart_s = True, restart_s

    def boot_id(self) -> str:
        """What it calls itself in this life; empty if it has not said so."""
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError, AttributeError):
                found = json.loads(line).get("boot_id")
                if found:
                    return str(found)
        return ""


class Processes:
    """All services and the broker."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.broker: Broker = make_broker()
        self.services: dict[str, Service] = {}
        self.findings: list[str] = []
        self._seed = str(seed)
        self._broker_thread = ThreadPoolExecutor(1, "broker")
        self._watching: asyncio.Task[None] | None = None
        self._stopped = False
        self._restarts: set[asyncio.Task[None]] = set()
        self.database = folder / "history.sqlite"

    async def start(self) -> None:
        """The broker, then everything else; returns at once after that."""
        await self.with_broker(Broker.start)
        ports = free_ports(WORKERS + 5)
        commands = self._commands(ports)
        for (name, command), port in zip(commands.items(), ports, strict=True):
            line = Line(name, self.broker.port, self._seed)
            await line.open()
            bus = f"amqp://guest:guest@127.0.0.1:{line.port}/%2F"
            self.services[name] = Service(
                name=name,
                command=[command[0], "--bus", bus, *command[1:]],
                line=line,
                levers_file=self.folder / f"{name}.levers",
                logs=self.folder,
                port=port,
                environment=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            self.services[name].start()
        self._watching = asyncio.create_task(self._watch())

    def _commands(self, ports: Sequence[int]) -> dict[str, list[str]]:
        commands: dict[str, list[str]] = {}
        taken = iter(ports)
        for number in (1, 2):
            commands[f"gateway-{number}"] = [
                *("gateway", "--model", str(MODEL), "--port", str(next(taken)))
            ]
        for number in (1, 2):
            commands[f"scheduler-{number}"] = [
                *("scheduler", "--slice-tokens", str(SLICE_TOKENS)),
                *("--ops-port", str(next(taken))),
            ]
        commands["estimator"] = [
            *("estimator", "--database", str(self.database), "--ops-port", str(next(taken)))
        ]
        for number in range(1, WORKERS + 1):
            commands[f"worker-{number}"] = [
                *("worker", "--model", str(MODEL), "--name", f"w{number}", "--engine", "paged"),
                *("--dtype", "float32", "--torch-threads", "1", "--kv-tokens", str(KV_TOKENS)),
                *("--ops-port", str(next(taken))),
            ]
        return commands

    async def stop(self) -> None:
        """Everything ends, also what is stuck; the broker last. Once is enough."""
        if self._stopped:
            return
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
        for task in tuple(self._restarts):
            task.cancel()
        for service in self.services.values():
            service.signal(signal.SIGCONT)
            service.signal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + STOP_S
        while any(s.alive for s in self.services.values()) and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)
        for service in self.services.values():
            if service.alive:
                self.findings.append(f"{service.name} did not end by SIGTERM; see {service.log}")
                service.signal(signal.SIGKILL)
            if service.process is not None:
                await asyncio.to_thread(service.process.wait)
            await service.line.close()
        await self.with_broker(Broker.close)
        self._broker_thread.shutdown()

    async def with_broker(self, work: Callable[[Broker], T]) -> T:
        """Something that takes its time, one after the other, also if the waiting is given up."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._broker_thread, work, self.broker)

    # --------------------------------------------------------------------------- who is who

    async def find(self, role: str, worker: int) -> Service | None:
        """Who has this role and is well; None if nobody is. Workers count from 1 in the order of
        the KV that they hold now: a fault of an idle one shows nothing."""
        if role in ("leader", "standby"):
            leader = await self.leader()
            if leader is None:
                return None
            standby = next(
                s for n, s in self.services.items() if n.startswith("scheduler") and s is not leader
            )
            found = leader if role == "leader" else standby
            return found if self._well(found) else None
        if role == "worker":
            ones = [s for n, s in self.services.items() if n.startswith(role) and self._well(s)]
            used = await self._gauges(ones, "tranche_kv_used_tokens")
            ones.sort(key=lambda one: -used.get(one.name, 0.0))
            return ones[min(worker, len(ones)) - 1] if ones else None
        service = self.services[role]
        return service if self._well(service) else None

    async def leader(self) -> Service | None:
        """The scheduler with the highest epoch, by its own account."""
        epochs = await self.epochs()
        best = max(epochs, key=lambda name: epochs[name], default="")
        return self.services[best] if best and epochs[best] > 0 else None

    async def epochs(self) -> dict[str, int]:
        """What each scheduler that answers says of its epoch; 0: it stands by."""
        ones = [self.services[name] for name in ("scheduler-1", "scheduler-2")]
        said = await self._gauges([s for s in ones if s.alive and not s.frozen], "tranche_epoch")
        return {name: int(value) for name, value in said.items()}

    @staticmethod
    async def _gauges(services: Sequence[Service], name: str) -> dict[str, float]:
        """A metric of each that answers, summed over its labels."""
        found: dict[str, float] = {}
        async with httpx.AsyncClient(timeout=ASK_S) as client:
            for service in services:
                with suppress(httpx.HTTPError):
                    lines = (await client.get(f"{service.url}/metrics")).text.splitlines()
                    words = [
                        line.split() for line in lines if line.startswith((name + " ", name + "{"))
                    ]
                    found[service.name] = sum(float(each[-1]) for each in words)
        return found

    def spare(self, befallen: Service) -> bool:
        """Somebody else of its kind is well."""
        kind = befallen.name.partition("-")[0]
        others = (s for n, s in self.services.items() if n.startswith(kind) and s is not befallen)
        return any(self._well(other) for other in others)

    @staticmethod
    def _well(service: Service) -> bool:
        return service.alive and service.up and not service.frozen and not service.ends_expected

    # ------------------------------------------------------------------------------ watching

    async def _watch(self) -> None:
        """Notices ends, starts again, and notices who is ready."""
        loop = asyncio.get_running_loop()
        asked_at = 0.0
        async with httpx.AsyncClient(timeout=ASK_S) as client:
            while True:
                for service in self.services.values():
                    if service.process is not None and not service.alive:
                        self._on_end(service)
                if loop.time() - asked_at > 0.5:
                    asked_at = loop.time()
                    await self._ask_ready(client)
                await asyncio.sleep(WATCH_S)

    async def _ask_ready(self, client: httpx.AsyncClient) -> None:
        for service in self.services.values():
            if service.alive and not service.up and not service.frozen:
                with suppress(httpx.HTTPError):
                    answer = await client.get(f"{service.url}/ready")
                    service.up = answer.status_code == httpx.codes.OK

    def _on_end(self, service: Service) -> None:
        assert service.process is not None
        code = service.process.returncode
        service.up = False
        if not service.ends_expected:
            self.findings.append(f"{service.name} ended by itself ({code}); see {service.log}")
        restart_s = service.restart_s
        service.process = None

        async def again() -> None:
            await asyncio.sleep(restart_s)
            service.start()

        task = asyncio.create_task(again())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def until_ready(self, timeout_s: float, *, at_start: bool = False) -> bool:
        """Everybody is up; False after the time, at a start also if somebody ended by itself."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while loop.time() < deadline and not (at_start and self.findings):
            if all(service.alive and service.up for service in self.services.values()):
                return True
            await asyncio.sleep(0.1)
        return False
