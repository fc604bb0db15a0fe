"""Measuring a worker: how long prefills and decode steps of batches take on its engine.

The engine is driven directly, without bus and scheduler, with random prompts over a grid of batch
sizes and lengths. What is measured is the engine's own clock (`StepReport`), as in slice timings.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from services.worker.engines.api import Engine, EngineInfo, OutOfMemory
from shared.config import SetupError
from shared.messages import Form, RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import pack

TOKEN_IDS_MIN = 3
"""Random prompts leave the first ids out: they often end or pad a text."""
POINTS_MIN = 8
"""Fewer batches would not determine a profile."""


@dataclass(frozen=True, slots=True)
class Point:
    """A closed batch to measure."""

    batch: int
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a closed batch."""

    point: Point
    prefill_s: float
    decode_s: tuple[float, ...]
    """Of each decode step; the first has a context of input_tokens + 1."""


def grid(
    engine: Engine, batch_sizes: Sequence[int], lengths: Sequence[int], steps: int
) -> list[Point]:
    """The batches that this engine can hold. Raises SetupError if there are fewer than 4."""
    capacity, most = engine.memory().kv_tokens_capacity, engine.info.batch_size_max
    block = engine.info.kv_block_tokens
    points = [
        Point(batch, length)
        for length in lengths
        for batch in batch_sizes
        if length + steps + 1 <= engine.info.context_tokens_max
        and batch * -(-(length + steps + 1) // block) * block <= capacity
        and (not most or batch <= most)
    ]
    if len(points) < 4 or len({p.batch for p in points}) < 2:
        raise SetupError(
            f"of this grid only {len(points)} batches fit into {capacity} KV tokens and a context "
            f"of {engine.info.context_tokens_max}; give smaller --batch-sizes, --lengths or --steps"
        )
    return points


def measure(
    engine: Engine,
    points: Sequence[Point],
    *,
    steps: int,
    repeats: int,
    seconds_max: float,
    seed: int = 0,
    on_run: Callable[[], None] = lambda: None,
) -> Iterator[Measured]:
    """Each point `repeats` times, the whole grid in turn and in another order each time, so that a
    slow minute hits no kind of point alone. After `seconds_max` no further batch is begun, once
    POINTS_MIN are measured."""
    rng = Random(seed)  # noqa: S311
    _run(engine, points[0], min(steps, 4), rng)  # the first run of all pays for warming up
    began, runs = time.monotonic(), 0
    for _ in range(repeats):
        for point in rng.sample(points, len(points)):
            if runs >= POINTS_MIN and time.monotonic() - began > seconds_max:
                return
            yield _run(engine, point, steps, rng)
            runs += 1
            on_run()


def _run(engine: Engine, point: Point, steps: int, rng: Random) -> Measured:
    try:
        engine.start(_batch(point, steps + 1, engine.info, rng))
        prefill_s, decode_s = 0.0, []
        while engine.busy:
            report = engine.step()
            prefill_s += report.prefill_s
            if report.decode_s > 0:
                decode_s.append(report.decode_s)
    except OutOfMemory as error:
        raise SetupError(
            f"{point.batch} x {point.input_tokens} tokens do not fit: {error}; "
            "give smaller --batch-sizes or --lengths"
        ) from error
    return Measured(point, prefill_s, tuple(decode_s))


def _batch(point: Point, tokens: int, info: EngineInfo, rng: Random) -> RunSlice:
    """A closed batch, or as many leases at once where the engine runs only those."""
    vocabulary = info.vocabulary_size
    form: Form = "closed" if "closed" in info.forms else "leased"
    first = min(TOKEN_IDS_MIN, vocabulary - 1)
    orders = tuple(
        SliceOrder(
            spec=RequestSpec(
                request_id=f"measure-{index}",
                parent_id=f"measure-{index}",
                gateway="",
                model="",
                prompt=pack([rng.randrange(first, vocabulary) for _ in range(point.input_tokens)]),
                max_tokens=tokens,
                sampling=Sampling(seed=index, ignore_eos=True),
            ),
            attempt=1,
            lease_tokens=tokens,
        )
        for index in range(point.batch)
    )
    return RunSlice(
        epoch=1,
        worker="",
        batch_id="measure",
        form=form,
        orders=orders,
        iterations=tokens,
        prefill_first=True,  # so that leases decode together, too
    )
