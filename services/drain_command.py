"""`tranche drain WORKER`: its leases end, its requests move, it leaves; we wait for that."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console

from services.drain import Ending, Progress, drain as drain_worker, listen
from services.options import load_settings
from shared.bus.api import Bus
from shared.bus.connect import make_bus
from shared.bus.identity import new_id
from shared.config import CommandSettings, LogLevel, SetupError, mask_url, settings_config
from shared.telemetry.logs import configure_logs

STAYS_EXIT_CODE = 3
VANISHED_EXIT_CODE = 4
TOLD_EVERY_S = 5.0
"""Where there is no terminal, progress is a line every so often."""
EMBEDDED = (
    "drain needs the broker of the mesh, and a bus in memory is reached by nobody outside its "
    "process. A mesh of `make serve` or `tranche serve` without --bus has no other: stop it whole "
    "(Ctrl-C finishes what runs), or start it with --bus amqp://user:password@host/. For a mesh "
    "over RabbitMQ give --bus, or set TRANCHE_DRAIN_BUS"
)


class DrainSettings(CommandSettings):
    """Where the mesh is."""

    service: ClassVar[str] = "drain"
    model_config = settings_config("drain")

    log_level: LogLevel = "warning"
    """debug, info, warning or error; debug shows tracebacks."""


def drain(
    worker: Annotated[
        str,
        typer.Argument(help="A worker's --name, or the beginning of its id as logs show it."),
    ],
    bus: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="amqp:// or amqps:// address of an account that may administer the mesh's "
            "broker, such as tranche-admin. [TRANCHE_DRAIN_BUS]",
        ),
    ] = None,
    bus_password_file: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A file with the broker's password, for an address that names the user only. "
            "[TRANCHE_DRAIN_BUS_PASSWORD_FILE]",
        ),
    ] = None,
    bus_ca_file: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="For amqps://: certificates (PEM) of who vouches for the broker. "
            "[TRANCHE_DRAIN_BUS_CA_FILE]",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="How long to wait for it to leave. The order stands."
        ),
    ] = 120.0,
    log_level: Annotated[
        str | None, typer.Option(metavar="TEXT", help="debug shows tracebacks.")
    ] = None,
) -> None:
    """Exit codes: 0 it has left; 1 it was not told (no broker, or no such worker); 2 usage; 3 it
    still drains when the time is over; 4 it is gone without a goodbye (its requests go on).

    Raises SetupError, BusError.
    """
    given: dict[str, Any] = {
        "bus": bus,
        "bus_password_file": bus_password_file,
        "bus_ca_file": bus_ca_file,
        "log_level": log_level,
    }
    settings = load_settings(DrainSettings, given)
    if settings.bus.startswith("memory:"):
        raise SetupError(EMBEDDED)
    configure_logs("drain", new_id("drain"), settings.log_level, "console")
    began = time.monotonic()
    ending, name = asyncio.run(_drain(settings, worker, timeout))
    seconds = time.monotonic() - began
    match ending:
        case Ending.LEFT:
            typer.echo(f"{name} has left after {seconds:.1f} s")
        case Ending.STAYS:
            typer.echo(
                f"{name} has not left within {timeout:g} s; it takes nothing new and leaves when "
                "what it runs has ended. The same command goes on waiting.",
                err=True,
            )
            raise typer.Exit(STAYS_EXIT_CODE)
        case Ending.VANISHED:
            typer.echo(
                f"{name} is gone after {seconds:.1f} s, without a goodbye: it ended in another "
                "way. What it ran goes on elsewhere, from the tokens that were sent.",
                err=True,
            )
            raise typer.Exit(VANISHED_EXIT_CODE)


async def _drain(settings: DrainSettings, wanted: str, timeout_s: float) -> tuple[Ending, str]:
    bus = _bus(settings)
    try:
        with _progress(f"listening for workers at {mask_url(settings.bus)}") as tell:
            await bus.open(min(30.0, max(1.0, timeout_s)))
            roll = await listen(bus)
            worker = roll.find(wanted)
            for warning in roll.warnings(worker):
                typer.echo(f"tranche: {warning}", err=True)
            ending = await drain_worker(bus, roll, worker, timeout_s, tell)
        return ending, roll.progress(worker).worker
    finally:
        await bus.close()


def _bus(settings: DrainSettings) -> Bus:
    try:
        return make_bus(settings.bus_address(), service=settings.service)
    except ValueError as error:
        raise SetupError(f"--bus: {error}") from error


@contextmanager
def _progress(begin: str) -> Iterator[Callable[[Progress], None]]:
    """Shows, on stderr, what a worker still has: in place on a terminal, else now and then."""
    console = Console(stderr=True, highlight=False)
    began = told_at = time.monotonic()
    draining = False

    with console.status(begin) as status:

        def tell(now: Progress) -> None:
            nonlocal told_at, draining
            seconds = time.monotonic() - began
            text = f"{now.worker} {'drains' if now.draining else 'is told'}: {_left(now)}"
            status.update(f"{text}, {seconds:.0f} s")
            news = now.draining != draining or time.monotonic() >= told_at + TOLD_EVERY_S
            if news and not console.is_terminal:
                told_at, draining = time.monotonic(), now.draining
                console.print(f"{seconds:5.1f} s  {text}", markup=False)

        yield tell


def _left(now: Progress) -> str:
    return f"{now.requests} requests when last listed, {now.kv_tokens} KV tokens in use"
