"""Predicted quantiles of outputs: what they are, and how their truth is counted."""

from random import Random

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.scheduler.core.calibration import LEVELS, Calibration
from services.scheduler.core.outputs import quantile
from services.scheduler.core.policies.lengths import prepare_lengths
from services.scheduler.core.policies.survival import kinds_of
from services.scheduler.core.settings import Constants
from services.scheduler.metrics import SchedulerMetrics
from shared import tokens
from shared.messages import (
    LengthClass,
    LengthForecast,
    RunSlice,
    SliceDone,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from tests.core.seam import Bench, beat_of, submit

CAP = 4096


def test_quantiles_of_known_lengths_are_the_least_that_cover() -> None:
    lengths = tuple(range(10, 110, 10))
    assert [quantile(lengths, level) for level in (0.0, 0.1, 0.5, 0.51, 0.9, 1.0)] == [
        10,
        10,
        50,
        60,
        90,
        100,
    ]


def test_survival_quantiles_cover_what_they_say() -> None:
    draw = Random("lengths")
    known = np.array([min(CAP, int(draw.lognormvariate(5, 0.8)) + 1) for _ in range(1000)])
    prompts = np.full(len(known), 100)
    model = prepare_lengths(known, None, Constants(), kinds_of(prompts))
    told = model.quantiles(LEVELS, CAP, int(kinds_of(prompts[:1])[0]))
    later = [min(CAP, int(draw.lognormvariate(5, 0.8)) + 1) for _ in range(4000)]
    for level, tokens_ in zip(LEVELS, told, strict=True):
        assert sum(length <= tokens_ for length in later) / 4000 == pytest.approx(level, abs=0.03)
    assert list(told) == sorted(told)
    assert max(model.quantiles(LEVELS, 60, 1)) <= 60


def test_the_price_of_a_miss_is_the_pinball_loss() -> None:
    told = Calibration()
    told.ended((10.0, 20.0, 30.0), 15)
    told.ended((10.0, 20.0, 30.0), 40)
    told.ended((), 40)
    assert told.compared == 2
    assert told.covered == [0, 1, 1]
    assert told.pinball_tokens == pytest.approx(
        [0.5 * 5 + 0.5 * 30, 0.1 * 5 + 0.9 * 20, 0.01 * 15 + 0.99 * 10]
    )


def forecast() -> LengthForecast:
    lengths = tuple(range(1, 41)) * 10
    known = LengthClass(
        model="m",
        lengths=tokens.pack(lengths),
        finished=len(lengths),
        prompts=tokens.pack([10] * len(lengths)),
    )
    return LengthForecast(version=1, classes=(known,))


def ended(run: RunSlice, output: int) -> SliceDone:
    (order,) = run.orders
    result = SliceResult(
        request_id=order.spec.request_id,
        attempt=order.attempt,
        position=0,
        tokens=tokens.pack(range(output)),
        finish_reason="stop",
    )
    return SliceDone(
        epoch=1,
        worker="w1",
        batch_id=run.batch_id,
        form="leased",
        results=(result,),
        timings=SliceTimings(),
        memory=WorkerMemory(kv_tokens_capacity=2000),
    )


def test_the_core_compares_and_the_metrics_tell() -> None:
    bench = Bench("tranche", Constants(slice_tokens=64))
    registry = CollectorRegistry()
    metrics = SchedulerMetrics(registry)
    bench.say(forecast())
    bench.say(beat_of("w1", forms=("leased",)))
    outputs = [(7 * number) % 40 + 1 for number in range(40)]
    for number, output in enumerate(outputs):
        (run,) = bench.say(submit(f"r{number}", max_tokens=41))
        assert isinstance(run, RunSlice)
        bench.say(ended(run, output))
        metrics.on_books(bench.core.books)
    told = bench.core.books.calibration
    assert told.compared == 40
    shares = [count / 40 for count in told.covered]
    assert shares == pytest.approx([0.5, 0.9, 0.99], abs=0.06)
    text = generate_latest(registry).decode()
    assert "tranche_predicted_outputs_total 40.0" in text
    assert f'tranche_covered_outputs_total{{quantile="0.5"}} {told.covered[0]}.0' in text
    assert 'tranche_output_pinball_loss_tokens_total{quantile="0.9"}' in text
    assert "tranche_eviction_target_ratio 0.03" in text
    metrics.elected()
    metrics.on_books(Bench("tranche").core.books)
    assert "tranche_predicted_outputs_total 40.0" in generate_latest(registry).decode()
