"""One service as an operating-system process: its event loop, signals, bus and telemetry."""

import asyncio
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import uvloop
from prometheus_client import CollectorRegistry

from shared.bus.api import Bus
from shared.bus.identity import new_id
from shared.config import ServiceSettings, SetupError
from shared.telemetry import setup
from shared.telemetry.metered_bus import make_metered_bus
from shared.telemetry.setup import Telemetry

SERVICES = ("gateway", "scheduler", "estimator", "worker")
HARD_EXIT_CODE = 130
CLOSE_S = 20.0
"""After everything has ended its event loop may take this long to close."""
_importing = threading.Lock()
"""One at a time: large packages that import each other from two threads may see each other half
made."""


class Serve(Protocol):
    """What each services/<name>/service.py offers."""

    async def __call__(
        self, settings: ServiceSettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
    ) -> None: ...


def settings_class(service: str) -> type[ServiceSettings]:
    """The settings record of a service, loaded on demand."""
    module = importlib.import_module(f"services.{service}.settings")
    kind: type[ServiceSettings] = getattr(module, f"{service.capitalize()}Settings")
    return kind


def serve_function(service: str) -> Serve:
    """The serve() of a service; loading it may load torch."""
    with _importing:
        serve: Serve = importlib.import_module(f"services.{service}.service").serve
    return serve


def boot_id_of(settings: ServiceSettings) -> str:
    """The name that the settings give this service (or its kind), and a random part."""
    return new_id(getattr(settings, "name", "") or settings.service)


def run_service(settings: ServiceSettings) -> None:
    """Run one service of a mesh until a signal stops it."""
    if settings.bus.startswith("memory:"):
        raise SetupError(
            f"a {settings.service} of its own needs a broker that the others reach too: "
            "give --bus amqp://user:password@host/ (or run all in one process: tranche serve)"
        )
    run_until_signalled(lambda stop: serve_one(settings, stop))


async def serve_one(
    settings: ServiceSettings,
    stop: asyncio.Event,
    registry: CollectorRegistry | None = None,
) -> None:
    """Open a bus of its own for the service, serve until `stop` is set and drain.

    Raises BusUnavailable, SetupError, and what the service itself raises.
    """
    telemetry = setup.start(settings, boot_id_of(settings), registry)
    telemetry.log.info("settings", **settings.masked())
    try:
        serve = await asyncio.to_thread(serve_function, settings.service)
        async with open_bus(settings, telemetry, stop) as bus:
            if not stop.is_set():
                await serve(settings, bus, telemetry, stop)
        telemetry.log.info("stopped")
    finally:
        await asyncio.to_thread(setup.stop, telemetry)


@contextlib.asynccontextmanager
async def open_bus(
    settings: ServiceSettings, telemetry: Telemetry, stop: asyncio.Event
) -> AsyncIterator[Bus]:
    """A connected bus, closed at the end. Opening ends early when `stop` is set."""
    try:
        bus = make_metered_bus(
            settings.bus_address(), service=settings.service, registry=telemetry.registry
        )
    except ValueError as error:
        raise SetupError(f"--bus: {error}") from error
    opening = asyncio.ensure_future(bus.open())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
        yield bus
    finally:
        stopping.cancel()
        opening.cancel()
        await bus.close()


def run_until_signalled(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` on uvloop. SIGTERM and SIGINT set its stop event; a second one ends at once."""

    async def with_signals() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, stop)
        await main(stop)

    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        runner.run(with_signals())
    finally:
        # Seen twice in some thirty runs: uvloop waits in `close` for a handle that never ends.
        guard = threading.Timer(CLOSE_S, _leave_unclosed)
        guard.daemon = True
        guard.start()
        runner.close()
        guard.cancel()


def _leave_unclosed() -> None:
    print("tranche: the event loop does not close, leaving at once", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(HARD_EXIT_CODE)


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        print("tranche: second signal, leaving at once", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(HARD_EXIT_CODE)
    print("tranche: draining; a second signal ends at once", file=sys.stderr, flush=True)  # noqa: T201
    stop.set()
