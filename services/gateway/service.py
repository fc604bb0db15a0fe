"""The gateway's shell: loads the tokenizer, joins the mesh, serves HTTP, drains at the end."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from starlette.types import ASGIApp

from services.gateway.admission import Admission
from services.gateway.app import Api, make_app
from services.gateway.edge import Edge
from services.gateway.keys import read_keys
from services.gateway.link import MeshLink
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import ModelText, load_model_text
from shared.bus.api import Bus
from shared.config import SetupError
from shared.telemetry.ops import EmbeddedServer, listen
from shared.telemetry.setup import Telemetry

HEADER_BYTES_MAX = 65_536
"""Of one request; uvicorn answers 400 beyond."""
CONNECTIONS_PER_REQUEST = 4
CONNECTIONS_BESIDE = 256
"""Connections beyond the open requests: idle ones, probes, scrapes, refusals. Beyond them uvicorn
answers a plain 503 without our headers, so this limit is far above the one of open requests."""
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
    model = await asyncio.to_thread(load_model_text, settings.model, settings.served_name())
    link = MeshLink(settings, bus, telemetry)
    admission = Admission(settings, link)
    with ThreadPoolExecutor(settings.tokenizer_threads, "tokenizer") as threads:
        api = Api(settings, telemetry, link, admission, model, keys, threads)
        app = Edge(make_app(api), api.metrics, telemetry.log)
        await _serve_app(settings, app, link, admission, telemetry, stop, model)


async def _serve_app(
    settings: GatewaySettings,
    app: ASGIApp,
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
            server = EmbeddedServer(_uvicorn_config(settings, app))
            serving = tasks.create_task(server.serve_until(http_over, [bound]), name="http")
            host, port = bound.getsockname()[:2]
            telemetry.log.info("listening", host=host, port=port, model=model.name)
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


def _uvicorn_config(settings: GatewaySettings, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        limit_concurrency=settings.open_requests_max * CONNECTIONS_PER_REQUEST + CONNECTIONS_BESIDE,
        timeout_keep_alive=settings.keep_alive_connection_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
