"""Estimates: what policies may ask about a request's future."""

from collections.abc import Callable
from dataclasses import dataclass

from services.scheduler.core.state import Request


@dataclass(frozen=True, slots=True)
class Estimates:
    """Finite answers, never negative, from the length model and the fitted costs."""

    output_tokens: Callable[[Request], float]
    """Expected output in all, given that it is more than the request has made so far."""
    prefill_s: Callable[[Request], float]
    """Seconds that the prefill of its input (prompt and output so far) takes, alone."""
    token_s: Callable[[], float]
    """Seconds between two output tokens of a running request, at present."""

    def remaining_tokens(self, request: Request) -> float:
        """Expected output that is still to be made."""
        return max(0.0, self.output_tokens(request) - request.output_tokens)
