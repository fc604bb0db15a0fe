"""Process trees on one core: started, frozen while another is measured, thawed, measured, ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
STOP_S = 20.0


class ServerFailed(Exception):
    """A server did not start or ended; the text says which and where its log is."""


@dataclass(slots=True)
class Tree:
    """The processes of one system: those started here and all that they started."""

    core: int
    folder: Path
    """Where the logs go."""
    roots: dict[str, psutil.Popen] = field(default_factory=dict)
    """By name, in the order of starting."""

    def spawn(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Start `command` on the core, one thread asked for, its output in `folder`/`name`.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = os.sched_getaffinity(0)
        with (self.folder / f"{name}.log").open("wb") as log:
            # A child inherits the affinity of the thread that starts it.
            os.sched_setaffinity(0, {self.core})
            try:
                self.roots[name] = psutil.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | ONE_THREAD | OFFLINE | (env or {}),
                    start_new_session=True,
                )
            finally:
                os.sched_setaffinity(0, before)

    def check(self) -> None:
        """Raises ServerFailed if one that was started has ended."""
        for name, process in self.roots.items():
            if process.poll() is not None:
                raise ServerFailed(f"{name} ended; see {self.folder / name}.log")

    def processes(self) -> list[psutil.Process]:
        """All of them now, parents before children."""
        found = []
        for root in self.roots.values():
            with suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found

    def freeze(self) -> None:
        """SIGSTOP to all: not a cycle of the core goes to them until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._signal(signal.SIGCONT)

    def off_core(self) -> list[str]:
        """Names of processes with a thread that may run on another core."""
        off = []
        for process in self.processes():
            with suppress(psutil.Error, OSError):
                for thread in process.threads():
                    if os.sched_getaffinity(thread.id) != {self.core}:
                        off.append(f"{process.name()} ({process.pid})")
                        break
        return off

    def cpu_s(self) -> float:
        """CPU time used so far by all that live, user and system."""
        used = 0.0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def rss_mb(self) -> float:
        """Resident memory now, summed (what two share counts twice)."""
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 1e6

    def stop(self) -> None:
        """SIGTERM in reverse order of starting, SIGKILL after a while; nobody survives."""
        self.thaw()
        everybody = self.processes()
        for process in reversed(list(self.roots.values())):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(list(self.roots.values()), timeout=STOP_S)
        for process in [*alive, *everybody]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everybody, timeout=STOP_S)
        self.roots.clear()

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(number)


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU counters at one moment."""

    at_s: float
    tree_s: float
    cores_s: tuple[float, ...]
    """Per core: busy or stolen seconds since boot."""


def read_counters(tree: Tree) -> Reading:
    """The counters now; the tree's first, as that takes longest."""
    tree_s = tree.cpu_s()
    cores = psutil.cpu_times(percpu=True)
    busy = tuple(
        sum(core) - core.idle - core.iowait - core.guest - core.guest_nice for core in cores
    )
    return Reading(time.monotonic(), tree_s, busy)


BURNER = """
import os
parent = os.getppid()
os.nice(19)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def start_burner(core: int) -> psutil.Popen:
    """An equal background: a process that takes what is left of `core` at the lowest priority, and
    ends with its parent."""
    burner = psutil.Popen([sys.executable, "-c", BURNER], stdin=subprocess.DEVNULL)
    os.sched_setaffinity(burner.pid, {core})
    return burner


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
