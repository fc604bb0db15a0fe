"""SCLS's serving-time model: fitted to what simulated workers report, tried on what it has not
seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from services.worker.core.pretend_closed import ClosedEngine, Row
from services.worker.core.pretend_parts import noise_of
from shared.costs import CostFit
from shared.memory import closed_batch_tokens
from shared.messages import RunSlice, SliceDone, SliceTimings
from shared.profiles import CostProfile, load_profile
from sim.network import Seen
from sim.reproduction.scls_runs import CAP, PROFILE, SLICE, Task, setup_of
from sim.run import Keep, run

GRID_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
GRID_INPUTS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 1920)
FOLDS = 5
UNSETTLED = 32
"""Batches before the running fit knows the model [T]."""


@dataclass(frozen=True, slots=True)
class FitTask:
    """`grid`: profiling runs over (N, L). `run`: the batches of a run under preset scls."""

    kind: str
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Errors:
    """|estimated / measured - 1| of slices that the fit has not seen, and their RMSE."""

    part: str
    cells: int
    mean: float
    p95: float
    worst: float
    rmse_s: float


@dataclass(frozen=True, slots=True)
class FitFigures:
    """What came out of one kind of measurement."""

    task: FitTask
    errors: tuple[Errors, ...]
    online: Errors | None = None
    """`run`: the estimate that each dispatched batch carried, against what it took."""
    online_settled: Errors | None = None
    """The same without the first 32 batches: before them the fit knows nothing yet."""


def fit_tasks(*, quick: bool) -> list[FitTask]:
    """Both kinds."""
    return [FitTask("grid"), FitTask("run", 120 if quick else 10_000)]


def run_fit(task: FitTask) -> FitFigures:
    """Measure, fit on four fifths of the cells, try on the rest; every cell is held out once."""
    if task.kind == "grid":
        return FitFigures(task, _held_out(_grid()))
    outcome = run(setup_of(Task("fit", "scls", requests=task.requests)), keep=Keep(messages=True))
    pairs = _pairs(outcome.messages)
    held = _held_out([timings for _, timings in pairs])
    whole = _errors("estimate at dispatch", *_estimates(pairs))
    settled = _errors(
        "estimate at dispatch, settled", *_estimates(pairs[min(UNSETTLED, len(pairs) // 2) :])
    )
    return FitFigures(task, held, whole, settled)


def _grid() -> list[SliceTimings]:
    """Timings that a simulated worker reports of whole slices over a grid, noise included."""
    profile = load_profile(PROFILE)
    engine = ClosedEngine(
        profile, profile.kv_tokens, noise_of(Random("grid").gauss, profile.noise_cv)
    )
    found, now = [], 0.0
    for rows in GRID_ROWS:
        for tokens in GRID_INPUTS:
            if closed_batch_tokens(rows, tokens, SLICE) <= profile.kv_tokens:
                batch = [_row(number, tokens) for number in range(rows)]
                engine.start(f"{rows}x{tokens}", batch, SLICE, now)
                now = engine.next_at() or now
                (over,) = engine.advance(now)
                found.append(over.timings)
    return found


def _row(number: int, tokens: int) -> Row:
    return Row(
        request_id=f"r{number}",
        attempt=1,
        prompt_tokens=tokens,
        made=0,
        lease_tokens=SLICE,
        true_length=2 * CAP,
        max_tokens=2 * CAP,
    )


def _pairs(messages: Sequence[Seen]) -> list[tuple[float, SliceTimings]]:
    """(estimate, timings) of every batch, in the order in which workers reported them."""
    expected: dict[str, float] = {}
    found: dict[str, tuple[float, SliceTimings]] = {}
    for _, _, message in messages:
        if isinstance(message, RunSlice):
            expected.setdefault(message.batch_id, message.expected_s)
        elif isinstance(message, SliceDone) and message.timings.iterations:
            found.setdefault(message.batch_id, (expected[message.batch_id], message.timings))
    return list(found.values())


def _held_out(timings: Sequence[SliceTimings]) -> tuple[Errors, ...]:
    """A cell is a pair (N, L): all its measurements are held out together."""
    cells = sorted({(t.batch_size, t.input_tokens_max) for t in timings})
    Random(0).shuffle(cells)
    fold_of = {cell: place % FOLDS for place, cell in enumerate(cells)}
    seen: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": [], "slice": []}
    for fold in range(FOLDS):
        fit = CostFit()
        held = []
        for t in timings:
            if fold_of[t.batch_size, t.input_tokens_max] == fold:
                held.append(t)
            else:
                fit.observe(t)
        for t in held:
            for part, pair in _told(fit, t).items():
                seen[part].append(pair)
    return tuple(_errors(part, *zip(*pairs, strict=True)) for part, pairs in seen.items())


def _told(fit: CostFit, t: SliceTimings) -> dict[str, tuple[float, float]]:
    """(estimated, measured) seconds of a slice's parts; decode is one step's mean."""
    cost, rows, tokens = fit.cost, t.batch_size, t.input_tokens_max
    prefill_s = cost.prefill.at(rows, tokens)
    whole_s = cost.slice_s(rows, tokens, t.iterations)
    told = {
        "prefill": (prefill_s, t.prefill_s),
        "slice": (whole_s, t.prefill_s + t.decode_s),
    }
    if t.iterations > 1:
        steps = t.iterations - 1
        told["decode"] = ((whole_s - prefill_s) / steps, t.decode_s / steps)
    return told


def _estimates(
    pairs: Sequence[tuple[float, SliceTimings]],
) -> tuple[Sequence[float], Sequence[float]]:
    return [e for e, _ in pairs], [t.prefill_s + t.decode_s for _, t in pairs]


def _errors(part: str, estimated: Sequence[float], measured: Sequence[float]) -> Errors:
    guess, truth = np.asarray(estimated), np.asarray(measured)
    relative = np.abs(guess / truth - 1)
    return Errors(
        part=part,
        cells=len(relative),
        mean=float(relative.mean()),
        p95=float(np.percentile(relative, 95)),
        worst=float(relative.max()),
        rmse_s=float(np.sqrt(np.mean((guess - truth) ** 2))),
    )


def linearity(profile: CostProfile) -> tuple[float, float, bool]:
    """T11 of a decode step: R2 of straight lines over l at each N, and over N at each l (the worst
    of each), and whether the slopes rise in the other variable."""
    sizes, contexts = np.array(GRID_ROWS), np.array(GRID_INPUTS)
    seconds = np.array(
        [[profile.decode_steps_s(int(n), int(n * c), 1) for c in contexts] for n in sizes]
    )
    over_context = [_line(contexts, row) for row in seconds]
    over_size = [_line(sizes, column) for column in seconds.T]
    rising = over_context[-1][0] > over_context[0][0] and over_size[-1][0] > over_size[0][0]
    return min(r for _, r in over_context), min(r for _, r in over_size), rising


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, R2)."""
    slope, base = np.polyfit(x, y, 1)
    left = np.sum((y - slope * x - base) ** 2)
    spread = np.sum((y - y.mean()) ** 2)
    return float(slope), float(1 - left / spread) if spread else 1.0
