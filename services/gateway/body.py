"""The body of a request: bytes, JSON, and then the checked parameters. All that is wrong is 4xx."""

import asyncio
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import Request

from services.gateway.errors import ApiError, invalid
from services.gateway.parameters import Parameters

B = TypeVar("B", bound=Parameters)
SHOWN_MAX = 300
"""Characters of a validation message: it may quote the input."""
_decoder = msgspec.json.Decoder()


async def read_request(request: Request, kind: type[B], body_bytes_max: int, timeout_s: float) -> B:
    """The checked body. Raises ApiError (400, 408, 413, 415), ClientDisconnect."""
    _check_media(request)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, body_bytes_max)
    except TimeoutError as error:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise ApiError(408, message, code="body_timeout") from error
    content = _parsed(body)
    try:
        parameters = kind.model_validate(content)
    except ValidationError as error:
        raise _explained(error) from error
    parameters.check()
    return parameters


def _check_media(request: Request) -> None:
    """JSON, as it is."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            "The body must be JSON: send 'content-type: application/json'.",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            "The body must come as it is, not compressed: send no 'content-encoding'.",
            code="unsupported_media_type",
        )


async def _read(request: Request, body_bytes_max: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > body_bytes_max:
        raise _too_large(body_bytes_max)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > body_bytes_max:
            raise _too_large(body_bytes_max)
    return bytes(body)


def _too_large(body_bytes_max: int) -> ApiError:
    return ApiError(
        413, f"The body is larger than {body_bytes_max} bytes.", code="request_too_large"
    )


def _parsed(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise invalid("The body is empty; send a JSON object.", code="invalid_json")
    try:
        content = _decoder.decode(body)
    except RecursionError as error:
        raise invalid("The body is nested too deeply.", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(content, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    return content


def _explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in a sentence, without quoting the input."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = details[0]
    if first["loc"] and first["loc"][0] == "prompt" and first["type"] != "missing":
        return invalid(
            "'prompt' must be a string, a list of strings, a list of token ids, or a list of "
            "lists of token ids; no list may be empty, and at most 64 prompts are served.",
            "prompt",
        )
    place = ".".join(
        str(part)
        for part in first["loc"]
        if not (isinstance(part, str) and (part in UNION_PARTS or "[" in part))
    )
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    text = f"'{place}': {first['msg']}."
    return invalid(text[:SHOWN_MAX], place or None, code)


UNION_PARTS = frozenset({"str", "int", "float", "constrained-str"})
"""What pydantic puts into a location to name a branch of a union."""
