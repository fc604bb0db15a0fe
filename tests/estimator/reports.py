"""Reports of finished requests for tests."""

from typing import Any

from shared.messages import Finished


def report(number: int, output_tokens: int = 10, **changes: Any) -> Finished:
    """The number names the request."""
    values: dict[str, Any] = {
        "epoch": 1,
        "request_id": f"r{number}",
        "model": "demo",
        "prompt_tokens": 5,
        "output_tokens": output_tokens,
        "max_tokens": 100,
        "reason": "stop",
        **changes,
    }
    return Finished(**values)
