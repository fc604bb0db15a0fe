"""The command line: what it knows, how fast it answers, and what it says to mistakes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.cli import COMMANDS, explain
from services.options import load_settings, pairs
from services.process import SERVICES, settings_class
from shared.bus.api import BusUnavailable
from shared.config import SetupError

ROOT = Path(__file__).parents[1]
HELP_LIMIT_S = 0.5
TIMEOUT_S = 60.0
USAGE_EXIT_CODE = 2
HEAVY = ("torch", "transformers", "pydantic", "aio_pika", "opentelemetry", "fastapi", "asyncio")


def tranche(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "services", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_help_is_there_in_half_a_second() -> None:
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        shown = tranche("--help")
        durations.append(time.perf_counter() - started)
        assert shown.returncode == 0
    assert all(name in shown.stdout for name in COMMANDS)
    assert min(durations) < HELP_LIMIT_S


def test_the_overview_loads_nothing_heavy() -> None:
    code = "import sys; from services.cli import app; app(''); print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(shown.stdout.split())


@pytest.mark.parametrize("service", SERVICES)
def test_help_of_a_service_shows_each_setting_with_variable_and_default(service: str) -> None:
    shown = tranche(service, "--help")
    assert shown.returncode == 0, shown.stderr
    for name in settings_class(service).model_fields:
        assert f"--{name.replace('_', '-')}" in shown.stdout
        assert f"TRANCHE_{service}_{name}".upper() in shown.stdout
    assert "default: memory://" in shown.stdout


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_says_what_it_means(service: str) -> None:
    fields = settings_class(service).model_fields
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize("service", [*SERVICES, "serve"])
def test_unknown_flags_and_variables_are_refused(service: str) -> None:
    flag = tranche(service, "--no-such-thing", "1")
    assert flag.returncode == USAGE_EXIT_CODE
    assert "--no-such-thing" in flag.stderr
    variable = f"TRANCHE_{service.upper()}_NO_SUCH_THING"
    environment = tranche(service, **{variable: "1"})
    assert environment.returncode == USAGE_EXIT_CODE
    assert variable in environment.stderr
    assert "Traceback" not in flag.stderr + environment.stderr


def test_an_unknown_command_is_refused() -> None:
    shown = tranche("no-such-command")
    assert shown.returncode == USAGE_EXIT_CODE
    assert "no-such-command" in shown.stderr


@pytest.mark.parametrize("variables", [{}, {"TRANCHE_WORKER_TORCH_THREADS": "many"}])
def test_a_wrong_value_names_flag_and_variable(variables: dict[str, str]) -> None:
    arguments = [] if variables else ["--torch-threads", "many"]
    shown = tranche("worker", *arguments, **variables)
    assert shown.returncode == USAGE_EXIT_CODE
    assert "--torch-threads (or TRANCHE_WORKER_TORCH_THREADS)" in shown.stderr
    assert "integer" in shown.stderr


def test_a_service_of_its_own_needs_a_broker() -> None:
    shown = tranche("worker")
    assert shown.returncode == 1
    assert shown.stderr.startswith("tranche: ")
    assert "--bus amqp://" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/no/such/folder"), ("/no/such/folder", "--model", "config.json")),
        (("--policy", "no-such-policy"), ("no-such-policy", "scls")),
        (("--engine", "no-such-engine"), ("no-such-engine", "padded")),
        (("--bus", "carrier-pigeon://x"), ("carrier-pigeon://x", "amqp://")),
        (("--set", "no-such-constant=1"), ("no-such-constant",)),
    ],
)
def test_mistakes_of_users_get_one_clear_line(
    arguments: tuple[str, ...], words: tuple[str, ...], free_port: int
) -> None:
    shown = tranche("serve", "--port", str(free_port), "--log-level", "error", *arguments)
    assert shown.returncode in (1, USAGE_EXIT_CODE)
    last = shown.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        shown = tranche("serve", "--port", port, "--log-level", "error")
    assert shown.returncode == 1
    assert port in shown.stderr
    assert "Traceback" not in shown.stderr


def test_debugging_shows_the_traceback() -> None:
    shown = tranche("serve", "--model", "/no/such/folder", "--log-level", "debug")
    assert "Traceback" in shown.stderr


def test_causes_inside_groups_are_named_once() -> None:
    bus = BusUnavailable("no broker at amqp://x")
    group = ExceptionGroup("a", [ExceptionGroup("b", [bus]), BusUnavailable(str(bus))])
    assert explain(group) == "no broker at amqp://x"
    assert explain(SetupError("do this")) == "do this"
    assert "KeyError" in explain(KeyError("x"))


def test_flags_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = settings_class("worker")
    monkeypatch.setenv("TRANCHE_WORKER_NAME", "from-environment")
    assert load_settings(kind, {"name": None}).model_dump()["name"] == "from-environment"
    assert load_settings(kind, {"name": "from-flag"}).model_dump()["name"] == "from-flag"


def test_pairs_of_name_and_value() -> None:
    assert pairs(["a=1", "b = x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(Exception, match="NAME=VALUE"):
        pairs(["a"])


def test_keys_are_made_and_shown_once() -> None:
    shown = tranche("keys", "alice")
    assert shown.returncode == 0, shown.stderr
    key = shown.stderr.split()[-1]
    assert shown.stdout.startswith("alice ")
    assert key not in shown.stdout
