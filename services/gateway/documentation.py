"""The OpenAPI document: bodies are read by hand (see `body`), so their schemas are added here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.requests import ChatRequest, CompletionRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}
REFERENCE = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STATUSES = {
    "400": "The request is wrong.",
    "401": "No valid API key.",
    "404": "No such model.",
    "405": "Wrong method.",
    "408": "The request's own deadline passed, or its stream was read too slowly.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "Too much work now, or a rate limit; see Retry-After and x-ratelimit headers.",
    "431": "The head is too large.",
    "500": "The output failed.",
    "503": "The mesh is not there now; see Retry-After.",
}


def describe(app: FastAPI) -> None:
    """Makes `/openapi.json` tell the bodies and errors."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in BODIES.values()], ref_template=REFERENCE
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.clear()  # FastAPI's own validation errors never occur
    schemas.update(definitions["$defs"], Error=ERROR)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] = _responses(path)
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}, {}]
            if path in BODIES:
                operation["requestBody"] = _body(BODIES[path].__name__)
                operation["parameters"] = [
                    _header("x-tranche-ttft-ms", "First token wanted within so many ms."),
                    _header("x-tranche-deadline-ms", "Whole answer wanted within so many ms."),
                ]
    _link(document["paths"])
    return document


def _link(paths: dict[str, Any]) -> None:
    """What an answer is good for next: tools follow these links from call to call."""
    listing, one = paths["/v1/models"]["get"], paths["/v1/models/{model_id}"]["get"]
    served, used = "$response.body#/data/0/id", "$response.body#/model"
    prompts: tuple[dict[str, Any], ...]
    prompts = ({"prompt": "ROMEO:"}, {"messages": [{"role": "user", "content": "Good morrow!"}]})
    links = {"model": _to(one, parameters={"model_id": served})}
    for (path, kind), prompt in zip(BODIES.items(), prompts, strict=True):
        generating = paths[path]["post"]
        body = {"model": served, "max_tokens": 8, **prompt}
        links[kind.__name__] = _to(generating, requestBody=body)
        back = {"model": _to(one, parameters={"model_id": used}), "models": _to(listing)}
        generating["responses"]["200"]["links"] = back
    listing["responses"]["200"]["links"] = links


def _to(operation: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {"operationId": operation["operationId"], **given}


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": REFERENCE.format(model=name)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _header(name: str, text: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
    return {"name": name, "in": "header", "description": text, "schema": schema}


def _responses(path: str) -> dict[str, Any]:
    good: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path == "/metrics":
        good = {"text/plain": {"schema": {"type": "string"}}}
    if path in BODIES:
        good["text/event-stream"] = {"schema": {}}  # events; the last one is [DONE]
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": good}}
    if path == "/ready":
        responses["503"] = {"description": "Not ready.", "content": good}
    elif path.startswith("/v1/"):
        for status, text in STATUSES.items():
            if path in BODIES or status in ("401", "404", "405", "431"):
                responses[status] = {"description": text, "content": error}
    return responses
