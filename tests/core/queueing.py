"""Queues for tests: requests, and estimates that know something of them."""

from services.scheduler.core.policies.estimates import Estimates
from services.scheduler.core.policies.order import Queue
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request
from shared import tokens
from tests.core.seam import spec_of

# Powers of two, so that sums come out the same in whatever order they are made.
PREFILL_TOKEN_S, TOKEN_S = 1 / 1024, 1 / 16
CONSTANTS = Constants(
    mlfq_quantum_s=1 / 8, mlfq_levels=5, mlfq_idle_s=3.0, srpt_ageing_tokens_per_s=16.0
)


def expected_output(request: Request) -> float:
    """A prediction that knows something: long prompts have long answers."""
    return float(max(request.output_tokens + 8, request.prompt_tokens // 4))


ESTIMATES = Estimates(
    output_tokens=expected_output,
    prefill_s=lambda request: request.input_tokens * PREFILL_TOKEN_S,
    token_s=lambda: TOKEN_S,
)


def work_s(request: Request) -> float:
    return request.input_tokens * PREFILL_TOKEN_S


def request_of(number: int, prompt_tokens: int = 64, made: int = 0, **changes: object) -> Request:
    spec_names = ("tenant", "priority", "ttft_deadline_ms", "deadline_ms")
    spec = {name: changes.pop(name) for name in spec_names if name in changes}
    changes.setdefault("since", changes.get("arrived_at", 0.0))
    return Request(
        spec=spec_of(f"r{number}", **spec),
        number=number,
        prompt_tokens=prompt_tokens,
        tokens=tokens.pack(range(made)),
        **changes,  # type: ignore[arg-type]
    )


def make(name: str, **changes: object) -> Queue:
    values = {field: getattr(CONSTANTS, field) for field in CONSTANTS.__slots__}
    return QUEUES[name](Constants(**{**values, **changes}), ESTIMATES)


def served(queue: Queue, now: float) -> list[int]:
    """Numbers in the order in which they are next, if time stands still."""
    numbers = []
    while (head := queue.head(now)) is not None:
        numbers.append(head.number)
        queue.remove(head)
    assert len(queue) == 0
    return numbers
