"""A pool that leases alone keep nearly full: no allocation fails, nothing leaks, no surprise.

The small version of `python -m bench.pool_soak`.
"""

from pathlib import Path

from bench.pool_soak import Soak, drawn_requests, sound
from services.worker.engines.api import LeasedEngine
from tests.worker.conformance.subjects import Kit
from tests.worker.tiny_models import END


def test_hidden_lengths_and_a_full_pool(careful_kit: Kit, llama: Path) -> None:
    engine = careful_kit.make(llama, kv_tokens=1_024, batch_size_max=0)
    assert isinstance(engine, LeasedEngine)
    requests = list(drawn_requests(300, END, end_bias=(1.0, 4.5)))
    outcome = Soak(engine, requests).run()
    assert sound(outcome), outcome
    assert outcome.parked > 0, "it never had to"
    assert outcome.output_tokens > 4_000
