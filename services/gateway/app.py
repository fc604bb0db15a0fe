"""The REST interface: routes, and the way of a generating request from body to answer."""

import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from opentelemetry.trace import Span
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from services.gateway.admission import Admission
from services.gateway.answers import Writer
from services.gateway.body import read_request
from services.gateway.calls import Call, Endpoint
from services.gateway.documentation import describe
from services.gateway.edge import safe_id
from services.gateway.errors import ApiError, invalid, unknown_model
from services.gateway.keys import OPEN_TENANT, KeyRing
from services.gateway.link import MeshLink
from services.gateway.metrics import GatewayMetrics
from services.gateway.orders import Wishes, add_choices
from services.gateway.prompts import Prompt, chat_prompt, completion_prompts
from services.gateway.requests import ChatRequest, CompletionRequest
from services.gateway.responses import CallResponse, error_response
from services.gateway.scores import TokenTexts
from services.gateway.settings import GatewaySettings
from services.gateway.spans import close_root, open_root
from services.gateway.tokenizer import ModelText
from shared.telemetry.ops import metrics_response
from shared.telemetry.setup import Telemetry
from shared.telemetry.tracing import traceparent_of

MILLISECONDS_DIGITS_MAX = 9
PATH_SHOWN_MAX = 200
HEADER_SHOWN_MAX = 80
ID_PREFIXES: dict[Endpoint, str] = {"completions": "cmpl-", "chat": "chatcmpl-"}


@dataclass(slots=True)
class Api:
    """What the routes work with."""

    settings: GatewaySettings
    telemetry: Telemetry
    link: MeshLink
    admission: Admission
    model: ModelText
    keys: KeyRing | None
    threads: ThreadPoolExecutor
    texts: TokenTexts = field(init=False)
    metrics: GatewayMetrics = field(init=False)
    fingerprint: str = field(init=False)
    started: int = field(init=False)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.model)
        self.metrics = GatewayMetrics.of(self.telemetry.registry)
        model = f"{self.model.name}/{self.model.vocabulary_size}/{product_version()}"
        self.fingerprint = "fp_" + hashlib.sha256(model.encode()).hexdigest()[:10]
        self.started = int(time.time())

    @property
    def context_tokens_max(self) -> int:
        """The model's limit, or the workers' if theirs is smaller; 0: not known."""
        limits = (self.model.context_tokens_max, self.link.context_tokens_max)
        return min((limit for limit in limits if limit), default=0)

    def tenant_of(self, request: Request) -> str:
        """Raises ApiError (401) without a valid key."""
        if self.keys is None:
            return OPEN_TENANT
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        tenant = self.keys.tenant_of(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(
                401,
                "The API key is missing or unknown; send 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                kind="authentication_error",
            )
        return tenant

    async def generate(
        self, request: Request, kind: type[CompletionRequest | ChatRequest]
    ) -> Response:
        """From a request to its answer. Raises ApiError, ClientDisconnect."""
        received_at, received_s = self.link.now(), time.time()
        tenant = self.tenant_of(request)
        body = await read_request(
            request, kind, self.settings.body_bytes_max, self.settings.body_timeout_s
        )
        if body.model != self.model.name:
            raise unknown_model(body.model, self.model.name)
        wishes = wishes_of(request)
        self.admission.check_ready()
        prompts = await self._prompts(body)
        call = self._call(request, body, tenant, received_at, wishes)
        span = open_root(self.telemetry.tracer, request, call.endpoint, body, received_s)
        call.trace = traceparent_of(span)
        try:
            add_choices(
                call,
                body,
                prompts,
                self.model,
                gateway=self.telemetry.boot_id,
                context_tokens_max=self.context_tokens_max,
                drawn_seed=secrets.randbits(63),
                wishes=wishes,
            )
            try:
                self.admission.enter(call)
            finally:
                request.state.more_headers = self.admission.rate_headers(tenant)
        except ApiError as error:
            close_root(span, call, error.status, received_s, time.time())
            raise
        self.metrics.accepted(call, body.n)
        self.metrics.open_streams.inc(int(body.stream))
        return CallResponse(
            call,
            Writer(call, body, self.texts, self.fingerprint),
            self.link,
            stream=body.stream,
            keepalive_s=self.settings.keepalive_s,
            write_timeout_s=self.settings.write_timeout_s,
            on_end=lambda call, status: self._ended(
                call, status, span, received_s, stream=body.stream
            ),
        )

    async def _prompts(self, body: CompletionRequest | ChatRequest) -> list[Prompt]:
        if isinstance(body, ChatRequest):
            return [await chat_prompt(body, self.model, self.threads, self.context_tokens_max)]
        return await completion_prompts(body, self.model, self.threads, self.context_tokens_max)

    def _call(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        tenant: str,
        received_at: float,
        wishes: Wishes,
    ) -> Call:
        call_id = request.state.call_id
        endpoint: Endpoint = "chat" if isinstance(body, ChatRequest) else "completions"
        life_s = self.settings.request_timeout_s
        if wishes.deadline_ms is not None:
            life_s = min(life_s, wishes.deadline_ms / 1_000)
        return Call(
            call_id=call_id,
            answer_id=ID_PREFIXES[endpoint] + (safe_id(body.request_id) or call_id),
            http_id=request.state.request_id,
            endpoint=endpoint,
            model=self.model.name,
            tenant=tenant,
            created=int(time.time()),
            received_at=received_at,
            expires_at=received_at + life_s,
        )

    def _ended(
        self, call: Call, status: int, span: Span, received_s: float, *, stream: bool
    ) -> None:
        self.admission.leave(call)
        self.metrics.open_streams.dec(int(stream))
        if status == 499:
            self.metrics.disconnected.inc()
        for choice in call.choices:
            if choice.error is not None:
                self.metrics.errors.labels(choice.error.code).inc()
                reason = choice.error.code
            else:
                reason = choice.transcript.finish_reason or "cancelled"
            self.metrics.ended(call, choice, reason)
        self.metrics.alias.call_ended(call)
        close_root(span, call, status, received_s, time.time())
        self.telemetry.log.info(
            "request",
            request_id=call.call_id,
            http_request_id=call.http_id,
            trace=call.trace,
            endpoint=call.endpoint,
            tenant=call.tenant,
            status=status,
            stream=stream,
            choices=len(call.choices),
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            duration_s=round(self.link.now() - call.received_at, 6),
        )


def make_app(api: Api) -> FastAPI:
    """The app, without its `Edge`."""
    app = FastAPI(
        title="Tranche",
        version=product_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    async def completions(request: Request) -> Response:
        return await api.generate(request, CompletionRequest)

    async def chat_completions(request: Request) -> Response:
        return await api.generate(request, ChatRequest)

    async def models(request: Request) -> Response:
        api.tenant_of(request)
        return JSONResponse({"object": "list", "data": [_model_card(api)]})

    async def model(request: Request, model_id: str) -> Response:
        api.tenant_of(request)
        if model_id != api.model.name:
            raise unknown_model(model_id, api.model.name)
        return JSONResponse(_model_card(api))

    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def ready() -> Response:
        obstacle = api.admission.obstacle
        if obstacle is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": obstacle.message}, obstacle.status)

    async def metrics() -> Response:
        return metrics_response(api.telemetry.registry)

    async def version_of() -> Response:
        return JSONResponse({"version": product_version()})

    app.post("/v1/completions", name="Complete a text")(completions)
    app.post("/v1/chat/completions", name="Answer a conversation")(chat_completions)
    app.get("/v1/models", name="Served models")(models)
    app.get("/v1/models/{model_id:path}", name="One model")(model)
    app.get("/health", name="Alive")(health)
    app.get("/ready", name="Accepting requests")(ready)
    app.get("/metrics", name="Prometheus metrics")(metrics)
    app.get("/version", name="Version")(version_of)
    _handle_errors(app, api.metrics)
    describe(app)
    return app


def wishes_of(request: Request) -> Wishes:
    """What the x-tranche headers say. Raises ApiError, also for one that nobody knows: its author
    would think that it counts."""
    known = {"x-tranche-ttft-ms", "x-tranche-deadline-ms"}
    for name in request.headers:
        if name.startswith("x-tranche-") and name not in known:
            advice = "a request may have " + " and ".join(sorted(known))
            raise invalid(f"The header '{name[:HEADER_SHOWN_MAX]}' is not known; {advice}.")
    return Wishes(
        ttft_deadline_ms=_milliseconds(request, "x-tranche-ttft-ms"),
        deadline_ms=_milliseconds(request, "x-tranche-deadline-ms"),
    )


def product_version() -> str:
    """Of the installed distribution."""
    try:
        return version("tranche")
    except PackageNotFoundError:
        return "0"


def _milliseconds(request: Request, header: str) -> int | None:
    texts = request.headers.getlist(header)
    if not texts:
        return None
    if len(texts) > 1:
        raise invalid(f"The header '{header}' is there {len(texts)} times; send it once.", header)
    text = texts[0].strip(" \t")
    if not re.fullmatch(rf"[1-9][0-9]{{0,{MILLISECONDS_DIGITS_MAX - 1}}}", text):
        most = 10**MILLISECONDS_DIGITS_MAX - 1
        asked = f"must be a whole number of milliseconds, from 1 to {most}"
        raise invalid(f"The header '{header}' {asked}.", header)
    return int(text)


def _model_card(api: Api) -> dict[str, Any]:
    return {
        "id": api.model.name,
        "object": "model",
        "created": api.started,
        "owned_by": "tranche",
        "root": api.model.name,
        "max_model_len": api.context_tokens_max or None,
    }


def _handle_errors(app: FastAPI, metrics: GatewayMetrics) -> None:
    """All errors in OpenAI's shape."""

    async def on_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        metrics.errors.labels(error.code).inc()
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
        return error_response(error, headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "http_error")
        metrics.errors.labels(code).inc()
        asked = f"{request.method} {request.url.path[:PATH_SHOWN_MAX]}"
        message = f"{error.detail}: {asked}; /openapi.json lists what is here."
        plain = ApiError(error.status_code, message, code=code)
        return error_response(plain, dict(error.headers or {}))

    async def on_disconnect(_: Request, error: Exception) -> Response:
        metrics.disconnected.inc()
        return Response(status_code=499)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: on_api_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
