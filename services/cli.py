"""The `tranche` command: which commands there are, and how a failure is told to the user.

The one module that may reach everything, on demand: only the chosen command is loaded, so that
`tranche --help` answers at once and a gateway never loads a worker's libraries.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

DISTRIBUTION = "tranche"
FAILURE_EXIT_CODE = 1


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what the overview says of it, and how to get its function."""

    summary: str
    load: Callable[[], Callable[..., None]]


def main(arguments: list[str] | None = None) -> None:
    """The entry point of the console script. Ends the process, as commands do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments[0] if arguments else "")(arguments, prog_name="tranche")
    except Exception as error:
        print(f"tranche: {explain(error)}", file=sys.stderr)  # noqa: T201
        if debugging(arguments):
            traceback.print_exception(error)
        sys.exit(FAILURE_EXIT_CODE)


def app(chosen: str) -> typer.Typer:
    """The command line with the `chosen` command loaded and the others by name only."""
    commands = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Tranche serves large language models slice by slice.",
    )
    commands.callback()(_before_any_command)
    for name, command in COMMANDS.items():
        function = command.load() if name == chosen else _named_only
        commands.command(name, help=command.summary)(function)
    return commands


def explain(error: BaseException) -> str:
    """One line for the user: the cause, without a traceback."""
    causes = list(_leaves(error))
    said = dict.fromkeys(" ".join(str(cause).split()) or repr(cause) for cause in causes)
    text = "; ".join(said)
    expected = all(isinstance(cause, _expected_errors()) for cause in causes)
    return (
        text if expected else f"{type(causes[0]).__name__}: {text} (--log-level debug shows more)"
    )


def debugging(arguments: list[str]) -> bool:
    """Whether the user asked for tracebacks."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    flags = "--log-level=debug" in arguments or ("--log-level", "debug") in pairs
    name = arguments[0] if arguments else ""
    return flags or os.environ.get(f"TRANCHE_{name.upper()}_LOG_LEVEL") == "debug"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _expected_errors() -> tuple[type[BaseException], ...]:
    from shared.bus.api import BusError
    from shared.config import SetupError

    return (SetupError, BusError, OSError)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tranche {installed_version(DISTRIBUTION)}")
        raise typer.Exit


def _before_any_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version),
    ] = False,
) -> None:
    """Nothing: the option alone does its work."""


def _named_only() -> None:
    raise AssertionError("only the chosen command is ever called")


def _service(name: str) -> Callable[..., None]:
    from services.options import command_of
    from services.process import run_service, settings_class

    return command_of(settings_class(name), run_service, COMMANDS[name].summary)


def _serve() -> Callable[..., None]:
    from services.mesh import run_mesh
    from services.mesh_settings import MeshSettings
    from services.options import command_of

    return command_of(MeshSettings, run_mesh, COMMANDS["serve"].summary)


def _bench() -> Callable[..., None]:
    with _extra("bench"):
        from bench.cli import bench

        return bench


def _simulate() -> Callable[..., None]:
    with _extra("sim"):
        from sim.cli import simulate

        return simulate


def _plan() -> Callable[..., None]:
    with _extra("sim"):
        from sim.plan_cli import plan

        return plan


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """A command that lacks a package says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        from shared.config import SetupError

        raise SetupError(
            f"{error}; this needs: .venv/bin/pip install -c constraints.txt -e '.[{name}]'"
        ) from error


def _replay() -> Callable[..., None]:
    from services.replay_command import replay

    return replay


def _drain() -> Callable[..., None]:
    from services.drain_command import drain

    return drain


def _calibrate() -> Callable[..., None]:
    with _extra("sim"):
        from services.calibrate_command import calibrate

        return calibrate


def _keys() -> Callable[..., None]:
    from services.gateway.keys import make_key

    def keys(
        tenant: Annotated[str, typer.Argument(help="Whose requests the key stands for.")],
    ) -> None:
        key, line = make_key(tenant)
        typer.echo(f"key, shown only now: {key}", err=True)
        typer.echo(line)

    return keys


def _accounts() -> Callable[..., None]:
    from services.accounts_command import accounts

    return accounts


COMMANDS = {
    "serve": Command("The whole mesh on this machine, in one process.", _serve),
    "gateway": Command("The REST interface of a mesh.", lambda: _service("gateway")),
    "scheduler": Command("Decides which worker runs which slice.", lambda: _service("scheduler")),
    "estimator": Command("Learns how long outputs get.", lambda: _service("estimator")),
    "worker": Command("Holds the model and runs slices.", lambda: _service("worker")),
    "bench": Command("A workload against a live OpenAI-compatible server.", _bench),
    "simulate": Command("Policies against a workload, in virtual time.", _simulate),
    "plan": Command("The fewest workers that meet objectives.", _plan),
    "drain": Command("Tells a worker of a mesh to leave, and waits until it has.", _drain),
    "replay": Command("A recorded scheduler journal: are the decisions the same?", _replay),
    "calibrate": Command("A cost profile, from a table or a worker.", _calibrate),
    "accounts": Command("Passwords and rights of the services at the broker.", _accounts),
    "keys": Command("Make an API key and its line for the gateway's key file.", _keys),
}
