"""Refusals in OpenAI's shape, with the headers that its clients obey.

`{"error": {"message", "type", "param", "code"}}`. A refusal that passes carries Retry-After (whole
seconds) and retry-after-ms; one that does not carries x-should-retry: false.
"""

import math
from typing import Any

import msgspec

from services.gateway.core.quota import Shortage
from shared.messages import Rejected

RETRY_AFTER_MAX_S = 120.0
"""OpenAI's client gives up on longer ones."""
UNAVAILABLE_RETRY_S = 2.0
"""While there is no scheduler: about the time a standby needs to take over."""
PROMPT_PARAMS = {"completions": "prompt", "chat": "messages"}
"""The parameter that holds the prompt, by endpoint."""
NO_WORKER = "no_worker"
"""The code of what nobody is there to serve."""


class ApiError(Exception):
    """Something that becomes an HTTP answer, or an error event in a stream that has begun."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON."""
        return msgspec.json.encode(self.content())

    def content(self) -> dict[str, Any]:
        """The body as a value."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Whether, and when, to try again."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        wait_s = min(max(self.retry_after_s, 0.0), RETRY_AFTER_MAX_S)
        seconds = max(1, math.ceil(wait_s))
        return {"retry-after": str(seconds), "retry-after-ms": str(max(1, round(wait_s * 1_000)))}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request will never be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, advice: str = "") -> ApiError:
    """400: a parameter that would change the answer's meaning, and that nobody here honours."""
    message = f"'{param}' is not supported by this server"
    return invalid(f"{message}; {advice or 'leave it out'}.", param, "unsupported_parameter")


def too_long(
    prompt_tokens: int, max_tokens: int | None, context_tokens_max: int, param: str
) -> ApiError:
    """400: prompt and output do not fit the context."""
    asked = f"{prompt_tokens} tokens in the prompt"
    if max_tokens is not None:
        asked += f" and {max_tokens} for the completion"
    return invalid(
        f"This model's maximum context length is {context_tokens_max} tokens. You requested "
        f"{asked}. Shorten the prompt or ask for fewer tokens.",
        param,
        "context_length_exceeded",
    )


def unknown_model(name: str, served: str) -> ApiError:
    """404."""
    return ApiError(
        404,
        f"The model {name!r} does not exist here. This server serves {served!r}.",
        param="model",
        code="model_not_found",
        kind="not_found_error",
    )


def busy(message: str, retry_after_s: float) -> ApiError:
    """429: too much work; it passes."""
    return ApiError(
        429, message, code="overloaded", kind="rate_limit_error", retry_after_s=retry_after_s
    )


def rate_limited(tenant: str, shortage: Shortage) -> ApiError:
    """429: the tenant's quota of this minute is used up; or the request is larger than all of it,
    and trying again will not help."""
    advice = "Ask for fewer tokens."
    if shortage.wait_s is not None:
        advice = f"Try again in {shortage.wait_s:.1f} s."
    return ApiError(
        429,
        f"The rate limit of {tenant} is reached, {shortage.kind} per minute: limit "
        f"{shortage.limit}, used {shortage.used}, requested {shortage.asked}. {advice}",
        code="rate_limit_exceeded",
        kind=shortage.kind,
        retry_after_s=shortage.wait_s,
    )


def unavailable(
    message: str, retry_after_s: float = UNAVAILABLE_RETRY_S, code: str = "unavailable"
) -> ApiError:
    """503: a part of the mesh is away; it passes."""
    return ApiError(503, message, code=code, kind="server_error", retry_after_s=retry_after_s)


def overdue(message: str) -> ApiError:
    """408: the time that the client gave, or that any request may take, is over."""
    return ApiError(408, message, code="deadline_exceeded", kind="timeout_error")


def too_slow_here(start_s: float, passed_s: float, within_s: float) -> ApiError:
    """429: the mesh would be in time, but the request was too long on its way through this gateway;
    it passes."""
    return _unreachable(
        f"the first token is expected {start_s:.2f} s after the request was received, "
        f"{passed_s:.2f} s of which it was on its way; {within_s:.2f} s are allowed",
        passed_s,
    )


def _unreachable(detail: str, retry_after_s: float | None) -> ApiError:
    return ApiError(
        429,
        f"The request's time limit cannot be met now ({detail}).",
        code="deadline_unreachable",
        kind="rate_limit_error",
        retry_after_s=retry_after_s,
    )


def failed(message: str) -> ApiError:
    """500: the mesh could not make the output."""
    return ApiError(500, message, code="generation_failed", kind="server_error")


def slow_reader(characters: int) -> ApiError:
    """The client does not read its stream; this is the last event."""
    message = f"More than {characters} characters waited to be read; the request was cancelled."
    return ApiError(408, message, code="slow_reader")


def rejected(rejection: Rejected, param: str) -> ApiError:
    """What a scheduler's refusal means to a client. `param` holds the prompt."""
    retry_after_s = rejection.retry_after_s
    detail = f" ({rejection.detail})" if rejection.detail else ""
    match rejection.reason:
        case "queue_full":
            wait_s = UNAVAILABLE_RETRY_S if retry_after_s is None else retry_after_s
            return busy(f"The server's queue is full{detail}. Try again later.", wait_s)
        case "no_worker":
            wait_s = UNAVAILABLE_RETRY_S if retry_after_s is None else retry_after_s
            message = f"No worker is there to serve this model{detail}."
            return unavailable(message, wait_s, NO_WORKER)
        case "deadline":
            return _unreachable(rejection.detail or "no reason is known", retry_after_s)
        case "too_long":
            return invalid(
                f"Prompt and completion fit no worker's memory{detail}. Shorten the prompt or "
                "ask for fewer tokens.",
                param,
                "context_length_exceeded",
            )
        case "unknown_model":
            return ApiError(
                404,
                f"No worker serves this model{detail}.",
                param="model",
                code="model_not_found",
                kind="not_found_error",
            )
