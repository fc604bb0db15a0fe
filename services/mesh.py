"""`tranche serve`: all four services in one process and one event loop.

Every service is the same as in a mesh of its own: it has its own bus (in memory, where messages
are encoded all the same, or RabbitMQ), and knows the others only through messages. At the end the
gateway drains first, while there are still workers for the requests it holds; then the rest.
"""

import asyncio
import importlib
import os
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from services.estimator.settings import EstimatorSettings
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import import_tokenizers
from services.mesh_settings import MeshSettings
from services.options import Settings, complaints
from services.process import run_until_signalled, serve_one
from services.scheduler.core.presets import PRESETS, USUAL_POLICY, Preset
from services.scheduler.settings import SchedulerSettings
from services.worker.engines.registry import FORMS, engine_maker
from services.worker.settings import WorkerSettings
from shared.config import ServiceSettings, SetupError
from shared.model_name import names_folder
from shared.telemetry.ops import listen

READY_POLL_S = 0.05
READY_TIMEOUT_S = 1.0
WORKER_READY_METRIC = "tranche_kv_capacity_tokens"
"""A worker reports it once its model is loaded."""
SIMULATED_ONLY = ("profile", "simulated_lengths", "simulated_speed")
"""Settings of the worker that mean something to one engine only."""
LOCAL_HOSTS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104
"""Where a server is reached from its own machine, when it listens everywhere."""
USUAL_POLICIES = (USUAL_POLICY, "scls")
USUAL_ENGINES = ("paged", "padded")
"""The first that goes with an engine's, or a policy's, form of slices."""
SERVICES_CORES = 1
"""Left to gateway, scheduler, estimator and whatever else the machine runs. Threads for arithmetic
wait for each other by spinning: with one on each of two cores, a program that took one of them made
requests of 0.2 s last 4 to 13 s; one thread in all took 0.18 s then, and 0.13 instead of 0.23 on a
quiet machine [T]."""
KV_SHARE_OF_ALL = 0.5
"""Of the free memory, for the KV of all workers of this process, where they are many."""

LOADING = (
    "Tranche starts: loading the model {model}; this takes a few seconds, "
    "large models and the first start, which compiles kernels, longer."
)
BANNER = """
Tranche is ready after {seconds:.1f} s:  {url}
  model {model}   policy {policy}   engine {engine}   workers {workers}   bus {bus}

Try it:
  curl -N {url}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "prompt": "ROMEO:\\n", "max_tokens": 200, \
"seed": 1, "stream": true}}'

Ctrl-C ends it, after the requests that run.
"""
PRETENDED = """
The engine is simulated: text comes at the pace of profile {profile} and means nothing; output
lengths are from {lengths}, and are not written to the history of real ones.
"""
MEMORY = ":memory:"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The settings of every service of one mesh."""

    estimator: EstimatorSettings
    scheduler: SchedulerSettings
    workers: tuple[WorkerSettings, ...]
    gateway: GatewaySettings

    @property
    def url(self) -> str:
        """The gateway's base URL, from this machine."""
        host = LOCAL_HOSTS.get(self.gateway.host, self.gateway.host)
        scheme = "https" if self.gateway.tls_cert_file else "http"
        return f"{scheme}://{host}:{self.gateway.port}"


def run_mesh(settings: MeshSettings) -> None:
    """Serve until a signal. Raises SetupError, BusUnavailable, OSError."""
    mesh = plan(settings)
    listen(mesh.gateway.host, mesh.gateway.port).close()  # better now than after loading models
    started = time.monotonic()
    print(LOADING.format(model=mesh.workers[0].served_name()), file=sys.stderr, flush=True)  # noqa: T201

    def announce() -> None:
        print(banner(mesh, time.monotonic() - started), file=sys.stderr, flush=True)  # noqa: T201

    run_until_signalled(lambda stop: serve_mesh(mesh, stop, announce))


async def serve_mesh(mesh: Mesh, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
    """Run the whole mesh until `stop` is set, then drain it.

    `on_ready` is called as soon as the gateway answers and every worker has its model. Raises what
    a service raises, in an ExceptionGroup.
    """
    await asyncio.to_thread(_import_all, mesh)
    registry = CollectorRegistry()
    stop_backstage = asyncio.Event()
    backstage: tuple[ServiceSettings, ...] = (mesh.estimator, mesh.scheduler, *mesh.workers)
    async with asyncio.TaskGroup() as tasks:
        for settings in backstage:
            tasks.create_task(serve_one(settings, stop_backstage, registry), name=settings.service)
        serving = tasks.create_task(serve_one(mesh.gateway, stop, registry), name="gateway")
        announcing = tasks.create_task(_announce(mesh, registry, on_ready), name="announce")
        await asyncio.wait((serving,))
        announcing.cancel()
        stop_backstage.set()


def _import_all(mesh: Mesh) -> None:
    """Import what services would import at the same time in threads of their own: transformers
    fills its modules on demand, and two threads can meet in one that is half full."""
    for engine in {worker.engine for worker in mesh.workers} - {"simulated"}:
        if engine in FORMS:
            importlib.import_module(f"services.worker.engines.{engine}")
    import_tokenizers()


def plan(settings: MeshSettings) -> Mesh:
    """The settings of all services: what `tranche serve` was told, then their own environment.

    Raises SetupError.
    """
    told = settings.model_dump(include=settings.model_fields_set, exclude_none=True)
    common: dict[str, Any] = {
        "bus": settings.bus,
        "log_level": settings.log_level,
        "log_format": told.get("log_format", "console" if sys.stderr.isatty() else "json"),
        **_some(told, "bus_password_file", "bus_ca_file", "otlp_endpoint", "trace_sample_ratio"),
    }
    model = checked_model(settings.model)
    history: dict[str, Any] = {}
    of_worker = ("engine", "torch_threads", "kv_memory_share", *SIMULATED_ONLY)
    threads = max(1, ((os.cpu_count() or 1) - SERVICES_CORES) // settings.workers)
    if "TRANCHE_WORKER_TORCH_THREADS" not in os.environ:
        told["torch_threads"] = threads
    _match(told)
    engine = str(told.get("engine") or os.environ.get("TRANCHE_WORKER_ENGINE", ""))
    if settings.workers > 2 and "TRANCHE_WORKER_KV_MEMORY_SHARE" not in os.environ:
        told["kv_memory_share"] = KV_SHARE_OF_ALL / settings.workers
    pretended = engine == "simulated"
    if not pretended and (unused := _some(told, *SIMULATED_ONLY)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise SetupError(f"{flags}: only the engine simulated takes that; add --engine simulated")
    if pretended and "TRANCHE_ESTIMATOR_DATABASE" not in os.environ:
        history["database"] = MEMORY  # invented lengths are nothing for a real mesh to learn from
    mesh = Mesh(
        estimator=_load(EstimatorSettings, **common, **history),
        scheduler=_load(
            SchedulerSettings, **common, **_some(told, "policy", "slice_tokens", "set")
        ),
        workers=tuple(
            _load(
                WorkerSettings,
                **common,
                **_some(told, *of_worker),
                model=model,
                name=f"worker-{n}",
            )
            for n in range(1, settings.workers + 1)
        ),
        gateway=_load(GatewaySettings, **common, **_some(told, "host", "port"), model=model),
    )
    check_forms(mesh.scheduler.preset(), mesh.workers[0].engine)
    return mesh


def _match(told: dict[str, Any]) -> None:
    """Where only the policy or only the engine was chosen: the usual one of the other kind that
    goes with it."""
    policy = told.get("policy") or os.environ.get("TRANCHE_SCHEDULER_POLICY")
    engine = told.get("engine") or os.environ.get("TRANCHE_WORKER_ENGINE")
    if engine in FORMS and not policy:
        told["policy"] = next(p for p in USUAL_POLICIES if PRESETS[p].form in FORMS[engine])
    name = str(policy or "").partition("+")[0]
    preset = PRESETS.get(str(policy or "")) or PRESETS.get(name)
    if preset is not None and not engine:
        told["engine"] = next(e for e in USUAL_ENGINES if preset.form in FORMS[e])


def check_forms(preset: Preset, engine: str) -> None:
    """Whether this engine runs the slices of this policy. Raises SetupError with advice, and
    UnknownEngine."""
    engine_maker(engine)
    forms = FORMS.get(engine, ("closed", "leased"))
    if preset.form in forms:
        return
    live = {name: row.form for name, row in PRESETS.items() if not row.needs_truth}
    policies = ", ".join(name for name, form in live.items() if form in forms)
    engines = ", ".join(name for name, runs in FORMS.items() if preset.form in runs)
    raise SetupError(
        f"policy {preset.name} runs {preset.form} slices, and engine {engine} only "
        f"{' and '.join(forms)} ones; choose --engine {engines}, or --policy {policies}"
    )


def _load(kind: type[Settings], **values: Any) -> Settings:
    try:
        return kind.load(**values)
    except ValidationError as error:
        raise SetupError(complaints(kind, error)) from error


def checked_model(model: str) -> str:
    """The model, if it is a hub id or a folder that holds one. Raises SetupError."""
    if not names_folder(model):
        return model
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise SetupError(
            f"there is no model in {folder}: --model takes a folder with config.json, "
            "tokenizer and weights, or an id at the Hugging Face hub"
        )
    return str(folder)


def banner(mesh: Mesh, seconds: float) -> str:
    """What people read when the mesh is ready."""
    worker = mesh.workers[0]
    note = ""
    if worker.engine == "simulated":
        note = PRETENDED.format(profile=worker.profile, lengths=worker.simulated_lengths)
    return note + BANNER.format(
        url=mesh.url,
        seconds=seconds,
        model=mesh.workers[0].served_name(),
        policy=mesh.scheduler.policy,
        engine=mesh.workers[0].engine,
        workers=len(mesh.workers),
        bus=mesh.gateway.masked()["bus"],
    )


async def _announce(mesh: Mesh, registry: CollectorRegistry, on_ready: Callable[[], None]) -> None:
    names = [worker.name for worker in mesh.workers]
    while not (  # noqa: ASYNC110 - asked from outside, as a client would
        all(registry.get_sample_value(WORKER_READY_METRIC, {"worker": name}) for name in names)
        and await asyncio.to_thread(_is_ready, mesh.url)
    ):
        await asyncio.sleep(READY_POLL_S)
    on_ready()


_our_own = ssl.create_default_context()
"""For asking this very process, whose certificate may name any other host."""
_our_own.check_hostname = False
_our_own.verify_mode = ssl.CERT_NONE


def _is_ready(url: str) -> bool:
    try:
        with (
            urllib.request.urlopen(  # noqa: S310
                f"{url}/ready",
                timeout=READY_TIMEOUT_S,
                context=_our_own if url[:6] == "https:" else None,
            ) as answer
        ):
            return bool(answer.status == 200)
    except OSError:
        return False


def _some(told: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: told[name] for name in names if name in told}
