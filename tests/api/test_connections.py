"""Clients that send too much, too slowly or not at all, over raw sockets; and TLS."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from services.gateway.connection import ConnectionLimits, GuardedProtocol
from services.gateway.metrics import GatewayMetrics
from services.gateway.service import check_tls
from services.gateway.settings import GatewaySettings
from shared.config import SetupError
from shared.telemetry.ops import EmbeddedServer, listen
from tests.api.conftest import DEMO_MODEL, staged
from tests.bus.place import eventually

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = b'{"model": "demo_model", "prompt": "ROMEO:", "max_tokens": 3}'
WAIT_S = 10.0


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def drip(self, data: bytes, pause_s: float) -> bytes:
        """Send byte by byte until the other side hangs up; what it said."""
        ending = asyncio.create_task(self.to_the_end())
        for place in range(len(data)):
            await self.send(data[place : place + 1])
            done, _ = await asyncio.wait([ending], timeout=pause_s)
            if done:
                break
        return await ending

    async def to_the_end(self) -> bytes:
        """All that it says until it hangs up."""
        said = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WAIT_S):
                while data := await self._reader.read(65_536):
                    said += data
        return said

    async def answer(self) -> bytes:
        """The head of its next answer, and its body."""
        async with asyncio.timeout(WAIT_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            return head + await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


class Server:
    """uvicorn with the guard and a small app: 200 to a body of at most 1,024 bytes, else 413, and
    404 to /nowhere without a look at the body."""

    def __init__(self, **limits: float) -> None:
        self.registry = CollectorRegistry()
        usual: dict[str, Any] = {
            "header_bytes_max": 4_096,
            "headers_max": 50,
            "header_timeout_s": 5.0,
            "body_bytes_max": 1_024,
            "body_timeout_s": 5.0,
            "connections_max": 20,
        }
        metrics = GatewayMetrics.of(self.registry)
        self.limits = ConnectionLimits(**(usual | limits), metrics=metrics)
        self.pause_s = 0.0
        """Before an answer."""
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        config = uvicorn.Config(
            self._app,
            http=partial(GuardedProtocol, self.limits),  # type: ignore[arg-type]
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
        )
        stop = asyncio.Event()
        with listen("127.0.0.1", 0) as bound:
            self.port = bound.getsockname()[1]
            server = EmbeddedServer(config)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(server.serve_until(stop, [bound]))
                await eventually(lambda: server.started)
                yield self
                stop.set()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, status = 0, 404 if scope["path"] == "/nowhere" else 200
        while status == 200:
            message = await receive()
            size += len(message.get("body", b""))
            status = 413 if size > 1_024 else 200
            if not message.get("more_body"):
                break
        await asyncio.sleep(self.pause_s)
        length = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": status, "headers": length})
        await send({"type": "http.response.body", "body": b"ok"})

    def refused(self, kind: str) -> float:
        """How often."""
        labels = {"kind": kind}
        return self.registry.get_sample_value("tranche_gateway_errors_total", labels) or 0.0


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", server.port))
    try:
        yield client
    finally:
        client.close()


def request(body: bytes = BODY) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


async def served(client: Client) -> None:
    """One request and its answer."""
    await client.send(request())
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with Server(header_timeout_s=0.2).running() as server, client_of(server) as client:
        assert await client.to_the_end() == b""
        assert server.refused("head_timeout") == 1


async def test_a_head_that_drips_is_not_waited_for() -> None:
    async with Server(header_timeout_s=0.3).running() as server:
        async with client_of(server) as client:
            said = await client.drip(HEAD + b"x-padding: " + b"a" * 10_000, 0.02)
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"head_timeout"' in said
        async with client_of(server) as client:  # behind a request that was served
            await served(client)
            assert (await client.drip(HEAD * 100, 0.02)).startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_drips_is_not_waited_for() -> None:
    async with Server(body_timeout_s=0.2).running() as server:
        for path, status in ((b"/v1/completions", b"408"), (b"/nowhere", b"404")):
            async with client_of(server) as client:
                head = HEAD.replace(b"/v1/completions", path)
                await client.send(head + b"content-length: 1000\r\n\r\n")
                said = await client.drip(b" " * 1_000, 0.02)
                assert said.startswith(b"HTTP/1.1 " + status)
                assert said.count(b"HTTP/1.1") == 1, "nothing behind an answer that was given"
        assert server.refused("body_timeout") == 2


async def test_slow_answers_are_not_hurried() -> None:
    async with Server(header_timeout_s=0.2, body_timeout_s=0.1).running() as server:
        server.pause_s = 0.5
        async with client_of(server) as client:
            await served(client)
            await client.send(request() + request())  # one behind the other
            for _ in range(2):
                assert (await client.answer()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"x-padding: " + b"a" * 5_000 + b"\r\n\r\n",
        HEAD + b"".join(b"x-%d: a\r\n" % number for number in range(60)) + b"\r\n",
        HEAD + b"x: " * 3_000,
        b"GET /" + b"a" * 5_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 5_000,
    ],
    ids=["one long header", "many headers", "never ending", "a long address", "and no end of it"],
)
async def test_a_head_that_is_too_large(head: bytes) -> None:
    async with Server().running() as server:
        async with client_of(server) as client:
            await client.send(head)
            said = await client.to_the_end()
            assert said.startswith(b"HTTP/1.1 431 ")
            assert said.count(b"HTTP/1.1") == 1
        async with client_of(server) as client:
            await served(client)


async def test_a_body_without_end() -> None:
    """Chunks beyond the limit are answered; trailers and more chunks end the connection."""
    chunk = b"400\r\n" + b" " * 1_024 + b"\r\n"
    async with Server(header_bytes_max=1_024).running() as server:
        async with client_of(server) as client:
            await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk + b"1\r\n \r\n")
            assert (await client.answer()).startswith(b"HTTP/1.1 413 ")
            await client.send(chunk * 3)
            assert await client.to_the_end() == b""
        async with client_of(server) as client:
            await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nx-trailer: ")
            await client.send(b"a" * 5_000)
            assert (await client.to_the_end()).startswith(b"HTTP/1.1 413 ")


async def test_connections_are_counted() -> None:
    async with Server(connections_max=5).running() as server:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                client = await stack.enter_async_context(client_of(server))
                await served(client)
            async with client_of(server) as sixth:
                said = await sixth.to_the_end()
                assert said.startswith(b"HTTP/1.1 503 ")
                assert b"retry-after: " in said
            await served(client)
        await eventually(lambda: not server.limits.open)
        async with client_of(server) as later:
            await served(later)


# ------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and gateway.pem with gateway.key for localhost."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own = authority.issue_cert("localhost")
    own.private_key_pem.write_to_path(folder / "gateway.key")
    for number, part in enumerate(own.cert_chain_pems):
        part.write_to_path(folder / "gateway.pem", append=number > 0)
    return folder


async def test_clients_over_tls(certificates: Path) -> None:
    """And that the gateway's settings reach the guard."""
    files = {
        "tls_cert_file": str(certificates / "gateway.pem"),
        "tls_key_file": str(certificates / "gateway.key"),
    }
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    body = {"model": "demo_model", "prompt": "ROMEO:", "max_tokens": 5}
    async with staged(verify=trusting, header_bytes_max=4_096, **files) as stage:
        url = str(stage.client.base_url)
        assert url.startswith("https://localhost")
        answer = await stage.client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 5
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get(f"{url}/health")
            with pytest.raises(httpx.TransportError):
                await stranger.get(url.replace("https:", "http:") + "/health")
        async with httpx.AsyncClient(verify=trusting) as other_name:
            with pytest.raises(httpx.ConnectError, match=r"mismatch|not valid"):
                await other_name.get(f"{url.replace('localhost', '127.0.0.1')}/health")
        padding = {"x-padding": "a" * 5_000}
        large = await stage.client.get("/health", headers=padding)
        assert large.status_code == 431
        assert large.json()["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"tls_cert_file": "nowhere.pem"}, "No such file"),
        ({"tls_cert_file": "gateway.pem"}, "in the same file"),
        ({"tls_cert_file": "gateway.pem", "tls_key_file": "ca.pem"}, "ca.pem"),
        ({"tls_key_file": "gateway.key"}, "needs --tls-cert-file"),
    ],
)
def test_certificates_that_cannot_be_used(
    certificates: Path, files: dict[str, str], part: str
) -> None:
    paths = {name: str(certificates / file) for name, file in files.items()}
    with pytest.raises(SetupError, match=part):
        check_tls(GatewaySettings.model_validate({"model": str(DEMO_MODEL), **paths}))
