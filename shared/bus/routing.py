"""Topic routing as AMQP defines it: keys are words between dots; `*` is one, `#` any number."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Target = TypeVar("Target", bound=Hashable)

ROUTES_CACHED_MAX = 10_000
"""Remembered (exchange, key) pairs; past it the memory starts anew. One key per service boot."""


def matches(pattern: str, routing_key: str) -> bool:
    """Whether a binding's pattern covers the key."""
    return _matches(pattern.split("."), routing_key.split(".") if routing_key else [""])


def _matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[skip:]) for skip in range(len(words) + 1))
    if not words or pattern[0] not in ("*", words[0]):
        return False
    return _matches(pattern[1:], words[1:])


class RoutingTable(Generic[Target]):
    """Which targets get what is published to an exchange under a key. Each at most once."""

    def __init__(self) -> None:
        self._bindings: dict[tuple[str, str, Target], None] = {}
        self._routes: dict[tuple[str, str], tuple[Target, ...]] = {}

    def bind(self, exchange: str, pattern: str, target: Target) -> None:
        """Let what matches flow to the target; a repeat changes nothing."""
        self._bindings[exchange, pattern, target] = None
        self._routes.clear()

    def remove(self, target: Target) -> None:
        """Forget all bindings of the target."""
        self._bindings = {b: None for b in self._bindings if b[2] != target}
        self._routes.clear()

    def route(self, exchange: str, routing_key: str) -> tuple[Target, ...]:
        """The targets in the order of their first matching binding."""
        known = self._routes.get((exchange, routing_key))
        if known is not None:
            return known
        if len(self._routes) >= ROUTES_CACHED_MAX:
            self._routes.clear()
        found = dict.fromkeys(
            target
            for bound, pattern, target in self._bindings
            if bound == exchange and matches(pattern, routing_key)
        )
        self._routes[exchange, routing_key] = tuple(found)
        return tuple(found)
