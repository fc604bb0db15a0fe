"""The outermost layer of the app: request ids, counting, and the last net for crashes."""

import re
import secrets

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError
from services.gateway.metrics import GatewayMetrics
from services.gateway.responses import error_response

SAFE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
"""What a client may choose as an id: it goes into headers, logs and answers."""
OTHER_ROUTE = "other"
"""The label of all unknown paths: a label for each would grow without bound."""


class Edge:
    """Wraps the app. The request's id is in `scope["state"]["request_id"]`, and the mesh's name for
    it, the same unless the client chose one, in `call_id`; what the app puts into `more_headers`
    there goes into the answer's head."""

    def __init__(
        self, app: ASGIApp, metrics: GatewayMetrics, log: structlog.stdlib.BoundLogger
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call_id = secrets.token_hex(16)
        request_id = safe_id(Headers(scope=scope).get("x-request-id")) or call_id
        scope.setdefault("state", {}).update(request_id=request_id, call_id=call_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": request_id, **scope["state"].get("more_headers", {})}
                encoded = [(name.encode(), value.encode()) for name, value in more.items()]
                message["headers"] = [*message["headers"], *encoded]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            self._metrics.errors.labels("crash").inc()
            self._log.exception("request crashed", request_id=request_id)
            if status:
                raise  # the answer has begun: the server must cut it
            crash = ApiError(
                500,
                f"The gateway failed; report request {request_id}.",
                code="internal_error",
                kind="server_error",
            )
            await error_response(crash)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", OTHER_ROUTE)
            self._metrics.requests.labels(route, str(status or 499)).inc()


def safe_id(given: str | None) -> str | None:
    """The client's id if it is harmless."""
    return given if given and SAFE_ID.fullmatch(given) else None
