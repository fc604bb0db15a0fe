"""The gateway's shell: loads the tokenizer, joins the mesh, serves HTTP, drains at the end."""

import asyncio
import contextlib
import resource
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from services.gateway.admission import Admission
from services.gateway.app import Api, make_app
from services.gateway.connection import ConnectionLimits, GuardedProtocol
from services.gateway.edge import Edge
from services.gateway.keys import read_keys
from services.gateway.link import MeshLink
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import ModelText, load_model_text
from shared.bus.api import Bus
from shared.config import SetupError
from shared.telemetry.ops import EmbeddedServer, listen
from shared.telemetry.setup import Telemetry

FILES_BESIDE = 256
"""Open files of the process that are no client's connection."""
LAST_WORDS_S = 3
"""After the drain, cut streams get so long to take their last event."""
DRAIN_POLL_S = 0.05


async def serve(
    settings: GatewaySettings, bus: Bus, telemetry: Telemetry, stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then let open answers finish for `drain_s`, and return.

    Raises SetupError (model or key file), OSError (address taken), BusUnavailable.
    """
    if not settings.model:
        raise SetupError("the gateway needs --model: the folder or hub id that the workers serve")
    keys = read_keys(settings.api_keys_file)
    check_tls(settings)
    allow_open_files(settings.connections_max + FILES_BESIDE)
    model = await asyncio.to_thread(load_model_text, settings.model, settings.served_name())
    link = MeshLink(settings, bus, telemetry)
    admission = Admission(settings, link, keys.limits if keys else None)
    with ThreadPoolExecutor(settings.tokenizer_threads, "tokenizer") as threads:
        api = Api(settings, telemetry, link, admission, model, keys, threads)
        app = Edge(make_app(api), api.metrics, telemetry.log)
        config = uvicorn_config(settings, app, api.metrics)
        await _serve_app(settings, config, link, admission, telemetry, stop, model)


async def _serve_app(
    settings: GatewaySettings,
    config: uvicorn.Config,
    link: MeshLink,
    admission: Admission,
    telemetry: Telemetry,
    stop: asyncio.Event,
    model: ModelText,
) -> None:
    """HTTP ends before the mesh link does, so that the last answers can be finished."""
    http_over, link_over = asyncio.Event(), asyncio.Event()
    with listen(settings.host, settings.port) as bound:
        async with asyncio.TaskGroup() as tasks:
            linked = tasks.create_task(link.run(link_over), name="link")
            server = EmbeddedServer(config)
            serving = tasks.create_task(server.serve_until(http_over, [bound]), name="http")
            host, port = bound.getsockname()[:2]
            tls = bool(settings.tls_cert_file)
            telemetry.log.info("listening", host=host, port=port, tls=tls, model=model.name)
            await stop.wait()
            admission.draining = True
            await _drain(admission, settings.drain_s)
            link.abandon()
            http_over.set()
            await serving
            link_over.set()
            await linked


async def _drain(admission: Admission, drain_s: float) -> None:
    """Until no answer is open, within the limit."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    while admission.open_choices and loop.time() < deadline:  # noqa: ASYNC110 - rare and short
        await asyncio.sleep(DRAIN_POLL_S)


def uvicorn_config(
    settings: GatewaySettings, app: ASGIApp, metrics: GatewayMetrics
) -> uvicorn.Config:
    """How uvicorn serves the app."""
    limits = ConnectionLimits(
        header_bytes_max=settings.header_bytes_max,
        headers_max=settings.headers_max,
        header_timeout_s=settings.header_timeout_s,
        body_bytes_max=settings.body_bytes_max,
        body_timeout_s=settings.body_timeout_s,
        connections_max=settings.connections_max,
        metrics=metrics,
    )
    return uvicorn.Config(
        app,
        http=partial(GuardedProtocol, limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=settings.keep_alive_connection_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=settings.tls_cert_file or None,
        ssl_keyfile=settings.tls_key_file or None,
    )


def check_tls(settings: GatewaySettings) -> None:
    """Whether certificate and key can be used. Raises SetupError."""
    if not settings.tls_cert_file:
        if settings.tls_key_file:
            raise SetupError("--tls-key-file needs --tls-cert-file")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(
            settings.tls_cert_file, settings.tls_key_file or None, password=lambda: b""
        )
    except (OSError, ssl.SSLError) as error:
        raise SetupError(
            f"cannot use the TLS certificate {settings.tls_cert_file} with the key "
            f"{settings.tls_key_file or 'in the same file'}: {error}"
        ) from error


def allow_open_files(wanted: int) -> None:
    """Raise this process's own limit as far as it may be raised; the default is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
