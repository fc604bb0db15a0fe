"""The operations port of a service without REST: /health, /ready and /metrics.

`EmbeddedServer` is uvicorn inside a loop that somebody else runs; the gateway uses it too.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

CONCURRENCY_MAX = 64
"""Probes and scrapes at once; more get 503. A scrape takes milliseconds, so this is plenty."""
SHUTDOWN_S = 2
"""How long open scrapes may go on once the service stops."""


class EmbeddedServer(uvicorn.Server):
    """uvicorn that leaves the process's signals alone: the service decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield

    async def serve_until(self, stop: asyncio.Event, sockets: list[socket.socket]) -> None:
        """Serve these bound sockets until `stop` is set, then finish open answers."""
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(self.serve(sockets))
            stopping = tasks.create_task(stop.wait())
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError that says which address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error


async def serve_ops(
    host: str,
    port: int,
    registry: CollectorRegistry,
    ready: Callable[[], bool],
    stop: asyncio.Event,
) -> None:
    """Serve the operations port until `stop` is set; return at once if `port` is 0.

    Raises OSError if the address is taken.
    """
    if port == 0:
        return
    config = uvicorn.Config(
        ops_app(registry, ready),
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=CONCURRENCY_MAX,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    with listen(host, port) as bound:
        await EmbeddedServer(config).serve_until(stop, [bound])


def ops_app(registry: CollectorRegistry, ready: Callable[[], bool]) -> Starlette:
    """The three routes; `ready` says whether work is accepted right now."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readiness(_: Request) -> Response:
        is_ready = ready()
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    async def metrics(_: Request) -> Response:
        return metrics_response(registry)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", readiness),
            Route("/metrics", metrics),
        ]
    )


def metrics_response(registry: CollectorRegistry) -> Response:
    """The registry in Prometheus's plain text format, whatever the scraper would accept.

    Asked for OpenMetrics as Prometheus 2 does, prometheus-client writes `vllm:name` as `vllm_name`.
    """
    headers = {"content-type": CONTENT_TYPE_PLAIN_0_0_4}
    return Response(generate_latest(registry), headers=headers)
