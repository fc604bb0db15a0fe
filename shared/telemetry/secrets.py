"""What must never stand in a log: passwords in addresses, authorization headers, API keys, and the
secret parts of ids."""

import re
from collections.abc import Mapping
from typing import Any

from shared.bus.identity import public_id

HIDDEN = "***"
DEPTH_MAX = 6
"""Nested values below this are shown as a whole, masked, not walked: logs are flat."""

SECRET_NAMES = re.compile(
    r"(?i)(?:^|[_-])(?:authorization|password|passwd|secret|cookie|api[_-]?keys?|access[_-]?token)$"
)
_URL_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s]*@")
_NAMED = re.compile(
    r"(?i)\b((?:[a-z0-9]+[-_])*"
    r"(?:authorization|api[_-]?keys?|cookie|password|passwd|secret|access[_-]?token))"
    r"(['\"]?\s*[:=,]\s*(?:b(?=['\"]))?['\"]?)"
    r"(?:(?:bearer|basic|token)\s+)?[^\s'\",;)}]+"
)
_BEARER = re.compile(r"(?i)\b(bearer)\s+[a-z0-9._~+/=-]{6,}")
_API_KEY = re.compile(r"\b(?:sk|tr)-[A-Za-z0-9_-]{8,}")


def mask(value: Any, depth: int = DEPTH_MAX) -> Any:
    """The value without secrets: strings, and mappings and sequences of them."""
    match value:
        case str():
            return mask_text(value)
        case bytes():
            return mask_text(repr(value))
        case None | bool() | int() | float():
            return value
        case Mapping() if depth:
            return {
                key: HIDDEN if _is_secret(key, inner) else mask(inner, depth - 1)
                for key, inner in value.items()
            }
        case list() | tuple() | set() | frozenset() if depth:
            return [mask(inner, depth - 1) for inner in value]
        case _:
            return mask_text(str(value))


def mask_text(text: str) -> str:
    """The text with its passwords, authorization headers and API keys replaced by ***, and ids
    without their secret part."""
    text = _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _NAMED.sub(rf"\1\2{HIDDEN}", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _API_KEY.sub(HIDDEN, text)
    return public_id(text)


def _is_secret(name: object, value: object) -> bool:
    """A secret's name; a number or an empty value under it tells nothing."""
    is_text = isinstance(value, (str, bytes)) and bool(value)
    return is_text and isinstance(name, str) and SECRET_NAMES.search(name) is not None
