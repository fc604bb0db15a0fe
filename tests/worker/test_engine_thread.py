"""The engine's thread: what it tells together, and what at once."""

import queue
from itertools import chain

import msgspec

from services.worker.core.events import EngineStepped
from services.worker.engines.api import EngineError, EngineInfo, StepReport, StepTokens
from services.worker.loop import EngineReady, EngineThread, Report
from shared.messages import RunSlice, Sampling, WorkerMemory
from tests.worker.orders import make_batch, make_order, make_spec

PATIENCE_S = 20.0
TOKENS = 40


class OneRow:
    """A leased engine: one token of one request per step, as quick as may be, until it pauses."""

    info = EngineInfo(
        engine="one", forms=("leased",), model="m", context_tokens_max=100, vocabulary_size=9
    )

    def __init__(self) -> None:
        self.left = 0

    @property
    def busy(self) -> bool:
        return self.left > 0

    def start(self, order: RunSlice) -> None:
        if order.batch_id == "warm-up":
            raise EngineError("no need")
        self.left = TOKENS

    def step(self) -> StepReport:
        position = TOKENS - self.left
        self.left -= 1
        return StepReport(tokens=(StepTokens("r", 1, position, (1,)),), decode_s=1e-6, batch_size=1)

    def cancel(self, request_id: str) -> None:
        raise AssertionError("nobody cancels")

    def memory(self) -> WorkerMemory:
        return WorkerMemory(kv_tokens_capacity=100)

    def close(self) -> None:
        """Nothing to free."""


def told(margin_tokens: int) -> list[tuple[Report, ...]]:
    """All calls of one lease's life."""
    calls: queue.Queue[tuple[Report, ...]] = queue.Queue()
    thread = EngineThread(OneRow, lambda *reports: calls.put(reports))
    thread.start()
    found = [calls.get(timeout=PATIENCE_S)]
    assert isinstance(found[0][0], EngineReady)
    spec = make_spec("r", [1, 2], 100, Sampling())
    order = make_batch(make_order(spec, TOKENS), form="leased")
    thread.submit(msgspec.structs.replace(order, margin_tokens=margin_tokens))
    while sum(isinstance(r, EngineStepped) for call in found for r in call) < TOKENS:
        found.append(calls.get(timeout=PATIENCE_S))
    thread.close()
    return found


def positions(calls: list[tuple[Report, ...]]) -> list[list[int]]:
    return [
        [t.position for r in call if isinstance(r, EngineStepped) for t in r.report.tokens]
        for call in calls
        if any(isinstance(r, EngineStepped) for r in call)
    ]


def test_quick_iterations_are_told_together_but_the_first_token_is_not_kept() -> None:
    calls = positions(told(margin_tokens=30))
    assert list(chain(*calls)) == list(range(TOKENS)), (
        "each once, in order, and the rest at the pause"
    )
    assert calls[0] == [0]
    assert len(calls) < TOKENS / 2
    assert max(map(len, calls)) <= 30 // 3 + 1


def test_nothing_is_kept_where_a_lease_is_renewed_at_its_last_tokens() -> None:
    assert positions(told(margin_tokens=2)) == [[n] for n in range(TOKENS)]
