"""The command line: what it knows, how fast it answers, and what it says to mistakes."""

import asyncio
import re
import resource
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cli import COMMANDS, explain, main
from services.mesh import plan
from services.mesh_settings import MeshSettings
from services.options import load_settings, pairs
from services.process import SERVICES, settings_class
from services.scheduler.core.presets import PRESETS
from services.worker.engines.registry import ENGINES
from shared.bus.api import BusUnavailable
from shared.config import SetupError

ROOT = Path(__file__).parents[1]
HELP_LIMIT_S = 0.5
USAGE_EXIT_CODE = 2
HEAVY = ("torch", "transformers", "pydantic", "aio_pika", "opentelemetry", "fastapi", "asyncio")


@dataclass(frozen=True)
class Shown:
    """What a command left behind."""

    code: int
    out: str
    err: str


Tranche = Callable[..., Shown]


@pytest.fixture
def tranche(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tranche:
    """Runs a command in this process, with variables as keywords. On asyncio's own event loop:
    uvloop's has been seen not to close, which a process of its own survives and this one does not.
    """
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("services.process.uvloop.new_event_loop", asyncio.new_event_loop)

    def run(*arguments: str, **variables: str) -> Shown:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ending:
                main(list(arguments))
        shown = capsys.readouterr()
        return Shown(int(ending.value.code or 0), shown.out, shown.err)

    return run


def cpu_seconds_of_children() -> float:
    """Wall time would say more of what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    durations = []
    for _ in range(3):
        started = cpu_seconds_of_children()
        shown = subprocess.run(
            [sys.executable, "-m", "services", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        durations.append(cpu_seconds_of_children() - started)
    assert all(name in shown.stdout for name in COMMANDS)
    assert min(durations) < HELP_LIMIT_S


def test_the_overview_loads_nothing_heavy() -> None:
    code = "import sys; from services.cli import app; app(''); print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(shown.stdout.split())


def test_the_version_is_that_of_the_project(tranche: Tranche) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shown = tranche("--version")
    assert shown.code == 0, shown.err
    assert shown.out == f"tranche {project['version']}\n"


def test_the_help_of_serve_names_all_policies_and_engines(tranche: Tranche) -> None:
    words = set(re.findall(r"[\w+-]+", tranche("serve", "--help").out))
    assert {*PRESETS, *ENGINES} <= words


def test_bench_shows_its_help(tranche: Tranche) -> None:
    shown = tranche("bench", "--help")
    assert shown.code == 0, shown.err
    assert "--trace" in shown.out


@pytest.mark.parametrize("service", SERVICES)
def test_help_of_a_service_shows_each_setting_with_variable_and_default(
    service: str, tranche: Tranche
) -> None:
    shown = tranche(service, "--help")
    assert shown.code == 0, shown.err
    for name in settings_class(service).model_fields:
        assert f"--{name.replace('_', '-')}" in shown.out
        assert f"TRANCHE_{service}_{name}".upper() in shown.out
    assert "default: memory://" in shown.out


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_says_what_it_means(service: str) -> None:
    fields = settings_class(service).model_fields
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize("service", [*SERVICES, "serve"])
def test_unknown_flags_and_variables_are_refused(service: str, tranche: Tranche) -> None:
    flag = tranche(service, "--no-such-thing", "1")
    assert flag.code == USAGE_EXIT_CODE
    assert "--no-such-thing" in flag.err
    variable = f"TRANCHE_{service.upper()}_NO_SUCH_THING"
    environment = tranche(service, **{variable: "1"})
    assert environment.code == USAGE_EXIT_CODE
    assert variable in environment.err
    assert "Traceback" not in flag.err + environment.err


def test_an_unknown_command_is_refused(tranche: Tranche) -> None:
    shown = tranche("no-such-command")
    assert shown.code == USAGE_EXIT_CODE
    assert "no-such-command" in shown.err


@pytest.mark.parametrize("variables", [{}, {"TRANCHE_WORKER_TORCH_THREADS": "many"}])
def test_a_wrong_value_names_flag_and_variable(variables: dict[str, str], tranche: Tranche) -> None:
    arguments = [] if variables else ["--torch-threads", "many"]
    shown = tranche("worker", *arguments, **variables)
    assert shown.code == USAGE_EXIT_CODE
    assert "--torch-threads (or TRANCHE_WORKER_TORCH_THREADS)" in shown.err
    assert "integer" in shown.err


def test_a_service_of_its_own_needs_a_broker(tranche: Tranche) -> None:
    shown = tranche("worker")
    assert shown.code == 1
    assert shown.err.startswith("tranche: ")
    assert "--bus amqp://" in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/no/such/folder"), ("/no/such/folder", "--model", "config.json")),
        (("--policy", "no-such-policy"), ("no-such-policy", "scls")),
        (("--engine", "no-such-engine"), ("no-such-engine", "padded")),
        (
            ("--engine", "padded", "--policy", "past-future"),
            ("past-future", "leased", "padded", "--engine paged", "--policy", "scls"),
        ),
        (("--engine", "simulated", "--profile", "abacus"), ("--profile", "abacus", "a100")),
        (("--engine", "simulated", "--simulated-lengths", "no.csv"), ("no.csv", "output_tokens")),
        (("--engine", "simulated", "--policy", "oracle"), ("oracle", "simulat")),
        (("--bus", "carrier-pigeon://x"), ("carrier-pigeon://x", "amqp://")),
        (("--set", "no-such-constant=1"), ("no-such-constant",)),
    ],
)
def test_mistakes_of_users_get_one_clear_line(
    arguments: tuple[str, ...], words: tuple[str, ...], free_port: int, tranche: Tranche
) -> None:
    shown = tranche("serve", "--port", str(free_port), "--log-level", "error", *arguments)
    assert shown.code in (1, USAGE_EXIT_CODE)
    last = shown.err.strip().splitlines()[-1]
    assert all(word in last for word in words), shown.err
    assert "Traceback" not in shown.err


def test_a_taken_port_is_named(tranche: Tranche) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        shown = tranche("serve", "--port", port, "--log-level", "error")
    assert shown.code == 1
    assert port in shown.err
    assert "Traceback" not in shown.err


def test_debugging_shows_the_traceback(tranche: Tranche) -> None:
    shown = tranche("serve", "--model", "/no/such/folder", "--log-level", "debug")
    assert "Traceback" in shown.err


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


def test_keys_are_made_and_shown_once(tranche: Tranche) -> None:
    shown = tranche("keys", "alice")
    assert shown.code == 0, shown.err
    key = shown.err.split()[-1]
    assert shown.out.startswith("alice ")
    assert key not in shown.out


def test_what_only_the_simulated_engine_takes_is_refused_without_it(tranche: Tranche) -> None:
    shown = tranche("serve", "--profile", "llama-2-13b-a100", "--log-level", "error")
    assert shown.code != 0
    assert "--profile: only the engine simulated takes that" in shown.err
    assert "add --engine simulated" in shown.err


def test_invented_lengths_do_not_enter_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANCHE_ESTIMATOR_DATABASE", raising=False)
    pretended = MeshSettings(engine="simulated", policy="past-future", port=8123)
    assert plan(pretended).estimator.database_path() == ":memory:"
    assert plan(MeshSettings(port=8123)).estimator.database_path() != ":memory:"


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (8, 1, 7), (8, 3, 2)]
)
def test_workers_leave_a_core_to_the_services(
    cores: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANCHE_WORKER_TORCH_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    mesh = plan(MeshSettings(port=8123, workers=workers))
    assert [worker.torch_threads for worker in mesh.workers] == [threads] * workers
