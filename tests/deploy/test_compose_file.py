"""The compose file and the Dockerfile, as far as they can be judged without an engine."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from services.process import settings_class

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILES = (
    "docker-compose.yml",
    "deploy/compose.gpu.yml",
    "deploy/compose.tls.yml",
    "deploy/compose_test/compose.yml",
)
MESH = ("gateway", "scheduler", "estimator", "worker")
OPEN_FILES_MAX = 20_000
"""A common hard limit on small machines; an engine refuses to start a container that asks more."""


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


COMPOSE = load("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def run_tool(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_follow_the_compose_specification() -> None:
    run_tool("check_jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE_FILES)


def test_yaml_is_tidy() -> None:
    files = [*COMPOSE_FILES, "deploy/prometheus", "deploy/grafana"]
    run_tool("yamllint", "-s", *files)


def test_the_mesh_is_complete() -> None:
    assert COMPOSE["name"] == "tranche"
    observability = {name for name, service in SERVICES.items() if "profiles" in service}
    assert {*MESH, "rabbitmq", "accounts"} == SERVICES.keys() - observability
    assert observability == {"jaeger", "prometheus", "grafana"}
    assert all(SERVICES[name]["profiles"] == ["observability"] for name in observability)


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"accounts"}))
def test_every_service_is_watched_limited_and_stopped_gently(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"].endswith("s")
    limits = service["deploy"]["resources"]["limits"]
    assert limits["cpus"]
    assert limits["memory"]
    assert service["logging"]["options"]["max-size"]
    assert "no-new-privileges:true" in service["security_opt"]
    open_files = service.get("ulimits", {}).get("nofile", 0)
    hard = open_files["hard"] if isinstance(open_files, dict) else open_files
    assert hard <= OPEN_FILES_MAX


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", MESH)
def test_services_of_the_mesh_run_the_documented_command(name: str) -> None:
    service = SERVICES[name]
    assert service["command"][:3] == ["tranche", name, "--bus"]
    assert service["command"][3] == f"amqp://tranche-{name}@rabbitmq:5672/"
    assert service["depends_on"]["rabbitmq"]["condition"] == "service_healthy"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_every_service_sees_its_own_password_only() -> None:
    assert SERVICES["accounts"]["network_mode"] == "none"
    roles = (*MESH, "admin", "broker")
    assert set(SERVICES["accounts"]["volumes"]) == {f"accounts-{r}:/accounts/{r}" for r in roles}
    for name, service in SERVICES.items():
        if name == "accounts":
            continue
        mounted = {v for v in service.get("volumes", []) if v.startswith("accounts-")}
        wanted = {f"accounts-{name}:/account:ro"} if name in MESH else set()
        assert mounted == ({"accounts-broker:/accounts:ro"} if name == "rabbitmq" else wanted)
    assert "RABBITMQ_DEFAULT_PASS" not in (ROOT / "docker-compose.yml").read_text()


def test_tls_is_for_every_service() -> None:
    services = load("deploy/compose.tls.yml")["services"]
    for name in MESH:
        assert services[name]["command"][3] == f"amqps://tranche-{name}@rabbitmq:5671/"
        assert services[name]["environment"][f"TRANCHE_{name.upper()}_BUS_CA_FILE"] == "/tls/ca.pem"


def test_workers_can_be_scaled() -> None:
    assert "container_name" not in SERVICES["worker"]
    assert "ports" not in SERVICES["worker"]


@pytest.mark.parametrize("name", MESH)
def test_settings_in_the_compose_file_exist(name: str) -> None:
    """A setting that nobody knows would stop the service at its start."""
    from services.process import settings_class

    fields = settings_class(name).model_fields
    prefix = f"TRANCHE_{name.upper()}_"
    for file in COMPOSE_FILES:
        for variable in load(file)["services"].get(name, {}).get("environment", {}):
            assert variable.startswith(prefix), variable
            assert variable.removeprefix(prefix).lower() in fields, variable


def test_variables_of_the_compose_file_are_settings_or_none_of_a_service() -> None:
    """`.env` reaches the services too: TRANCHE_WORKER_CPUS would be an unknown setting."""
    prefixes = tuple(f"TRANCHE_{name.upper()}_" for name in MESH)
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "deploy/compose.gpu.yml").read_text()
    names = {part.split(":-")[0].split("}")[0] for part in text.split("${")[1:]}
    assert "TRANCHE_CPUS_WORKER" in names
    settings = {
        f"TRANCHE_{service}_{field}".upper()
        for service in MESH
        for field in settings_class(service).model_fields
    }
    assert "TRANCHE_WORKER_ENGINE" in names
    assert {name for name in names if name.startswith(prefixes)} <= settings


def stages() -> dict[str, list[str]]:
    """The Dockerfile's stages with their instructions."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (ROOT / "deploy/Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            current = found.setdefault(line.split(" AS ")[1], [])
        current.append(line)
    return found


@pytest.mark.parametrize("target", ["services", "cpu", "gpu"])
def test_images_do_not_run_as_root(target: str) -> None:
    users = [line for line in stages()[target] if line.startswith("USER ")]
    assert users == ["USER 10001"]  # a number: Kubernetes can tell that it is not root


def test_images_for_workers_differ_in_torch_only() -> None:
    cpu, gpu = ([line for line in stages()[name][1:] if line] for name in ("cpu", "gpu"))
    assert cpu == gpu
    assert not any("download.pytorch.org" in line for line in stages()["gpu-packages"])
    assert any("download.pytorch.org/whl/cpu" in line for line in stages()["cpu-packages"])


def test_the_dockerfile_needs_no_buildkit() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert "RUN --" not in text
    assert "<<" not in text
    assert "# syntax" not in text
