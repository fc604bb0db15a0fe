"""A whole mesh in a thread of this process: the real services, the demo model, real HTTP."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from services.mesh import Mesh, plan, serve_mesh
from services.mesh_settings import DEMO_MODEL, MeshSettings
from services.process import serve_one
from shared.bus.connect import forget_memory_broker

START_TIMEOUT_S = 90.0
"""Loading torch and the models; seconds on a quiet machine."""
STOP_TIMEOUT_S = 60.0


class MeshFailed(Exception):
    """The mesh did not start, or ended by itself."""


class LiveMesh:
    """A mesh that serves from the moment it is made until `stop`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.url = mesh.url
        self._ready = threading.Event()
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._standby: asyncio.Task[None] | None = None
        self.standby = CollectorRegistry()
        """The metrics of the scheduler that replaced the first one."""
        self._thread = threading.Thread(target=self._run, name="mesh", daemon=True)
        self._thread.start()
        self._ready.wait(START_TIMEOUT_S)
        if not self._ready.is_set() or self._error:
            self.stop()
            raise MeshFailed("the mesh did not get ready") from self._error

    def ask_to_stop(self) -> None:
        """As SIGTERM would; returns at once."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        """Drain and end. Raises MeshFailed if the mesh failed or does not end."""
        self.ask_to_stop()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise MeshFailed(f"the mesh did not stop within {STOP_TIMEOUT_S} s")
        if self._error:
            raise MeshFailed("the mesh failed") from self._error

    @property
    def alive(self) -> bool:
        """None of its services has failed; each takes the others with it."""
        return self._thread.is_alive() and self._error is None

    def kill_worker(self) -> None:
        """End one worker without a word: its queue is gone, and its beats."""

        def kill() -> None:
            workers = [task for task in asyncio.all_tasks() if task.get_name() == "worker"]
            workers[0].cancel()

        self._loop.call_soon_threadsafe(kill)

    def replace_scheduler(self) -> None:
        """A standby begins to wait, and the leader ends without a word."""

        async def replace() -> None:
            leader = next(t for t in asyncio.all_tasks() if t.get_name() == "scheduler")
            standby = serve_one(self.mesh.scheduler, asyncio.Event(), self.standby)
            self._standby = asyncio.create_task(standby, name="standby")
            leader.cancel()

        asyncio.run_coroutine_threadsafe(replace(), self._loop).result(START_TIMEOUT_S)

    def metric(self, name: str) -> float:
        """A metric as /metrics shows it, summed over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name
        )

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(serve_mesh(self.mesh, self._stop, self._ready.set))
            except BaseException as error:
                self._error = error
            finally:
                self._ready.set()


@contextlib.contextmanager
def live_mesh(
    bus: str = "",
    *,
    workers: int = 1,
    slice_tokens: int | None = None,
    policy: str | None = None,
    model: str | Path = DEMO_MODEL,
    adjust: Callable[[Mesh], Mesh] = lambda mesh: mesh,
    **more: Any,
) -> Iterator[LiveMesh]:
    """Serve on a free port. `bus` is an AMQP address, or empty for a fresh one in memory; `more`
    are further settings of `tranche serve`, `adjust` changes those of its services."""
    url = bus or f"memory://{uuid.uuid4().hex}"
    given = {"slice_tokens": slice_tokens, "policy": policy, **more}
    settings = MeshSettings.load(
        bus=url,
        workers=workers,
        model=str(model),
        port=_free_port(),
        **{name: value for name, value in given.items() if value is not None},
    )
    mesh = LiveMesh(adjust(_for_tests(plan(settings))))
    try:
        yield mesh
    finally:
        mesh.stop()
        if not bus:
            forget_memory_broker(url)


def _for_tests(mesh: Mesh) -> Mesh:
    """No history left behind, and one thread a worker: tests run side by side on few cores."""
    estimator = mesh.estimator.model_copy(update={"database": ":memory:"})
    workers = tuple(worker.model_copy(update={"torch_threads": 1}) for worker in mesh.workers)
    return dataclasses.replace(mesh, estimator=estimator, workers=workers)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
