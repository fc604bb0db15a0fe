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
    left_by_class: Callable[[Request], float] | None = None
    """Expected output that is still to be made, by the survival function of its class."""
    mean_volume: Callable[[], float] = lambda: 1e5
    """Of the requests that came lately: input x output + output^2 / 2, as expected."""

    def left_tokens(self, request: Request) -> float:
        """Expected output that is still to be made, by the request's class where that is known."""
        if self.left_by_class is not None:
            return self.left_by_class(request)
        return self.remaining_tokens(request)

    def remaining_tokens(self, request: Request) -> float:
        """Expected output that is still to be made."""
        return max(0.0, self.output_tokens(request) - request.output_tokens)
