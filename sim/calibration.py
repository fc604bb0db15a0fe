"""Fitting a cost profile: from measured iterations to the coefficients of `shared/profiles.py`.

The closed form is linear in its coefficients once its knots are chosen, and the knots are measured
points. Non-negative least squares on relative error then give curves that never fall. Phases
weigh alike, however many cells each has. Each fifth of the cells is held out once: the stated
errors are of cells that the fit did not see; what is shipped is fitted to all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from shared.profiles import Coefficients, Curve, DecodeCost, FitError
from sim.calibration_cells import CalibrationError, Cell, measured_slices, predicted_slice_s

Array = NDArray[np.float64]

FOLDS = 5
TOKEN_KNOTS_MAX = 72
"""Of the curve over tokens: enough for every tile of a matrix product that a table shows."""
DECODE_KNOTS = (1, 2, 4, 8, 16, 32, 64)
"""Where attention's slope may change: beyond 64 sequences, bandwidth alone sets it."""
CHUNK_KNOTS = (16, 64, 128, 256, 512, 1024)
BENDS = (0, 64, 128, 256)
"""Context tokens tried for the bend; 0 is none."""
PHASES = ("prefill", "decode", "mixed")
SECONDS_MAX = 1e5
NOISE_MAX = 0.05
"""A larger spread is of a table too sparse to say anything of noise."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how far they are from cells that they did not see."""

    coefficients: Coefficients
    errors: dict[str, FitError]
    noise_cv: float
    """What the fit leaves open: 68 % of held-out cells are nearer (mean over the phases)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The knots: what is not linear."""

    token_knots: tuple[int, ...]
    decode_knots: tuple[int, ...]
    chunk_knots: tuple[int, ...]
    bend_tokens: int
    mixed: bool


def fit_cells(cells: Sequence[Cell], *, seed: int = 0) -> Fit:
    """Fit and judge. Raises CalibrationError if a phase is missing."""
    _check(cells)
    bend = min(BENDS, key=lambda bend: _residual(cells, _shape(cells, bend)))
    fold = _folds(cells, seed)
    relative = np.empty(len(cells))
    unseen = []
    for held in range(FOLDS):
        out = fold == held
        seen = [cell for cell, is_out in zip(cells, out, strict=True) if not is_out]
        shape = _shape(seen, bend)
        solution = _solve(*_design(seen, shape))
        unseen.append(_coefficients(solution, shape))
        judged = [cell for cell, is_out in zip(cells, out, strict=True) if is_out]
        features, seconds, _ = _design(judged, shape)
        relative[out] = features @ solution / seconds - 1
    shape = _shape(cells, bend)
    coefficients = _coefficients(_solve(*_design(cells, shape)), shape)
    errors = {
        phase: fit_error([r for c, r in zip(cells, relative, strict=True) if c.phase == phase])
        for phase in PHASES
        if any(cell.phase == phase for cell in cells)
    }
    slices = [
        predicted_slice_s(unseen[fold[sample.index]], sample) / sample.seconds - 1
        for sample in measured_slices(cells)
    ]
    if slices:
        errors["slice"] = fit_error(slices)
    return Fit(coefficients, errors, _spread(cells, relative))


def fit_error(relative: Iterable[float]) -> FitError:
    """The distribution of |predicted / measured - 1|."""
    errors = np.abs(np.array(list(relative)))
    median, p95 = np.percentile(errors, [50, 95])
    return FitError(
        cells=len(errors),
        median=round(float(median), 5),
        p95=round(float(p95), 5),
        worst=round(float(errors.max()), 5),
    )


def _spread(cells: Sequence[Cell], relative: Array) -> float:
    errors = np.abs(relative)
    phases = np.array([cell.phase for cell in cells])
    one_sigma = [np.percentile(errors[phases == phase], 68.27) for phase in sorted(set(phases))]
    return round(min(NOISE_MAX, float(np.mean(one_sigma))), 4)


def _check(cells: Sequence[Cell]) -> None:
    for phase in PHASES:
        own = {_place(cell) for cell in cells if cell.phase == phase}
        if len(own) < FOLDS and (own or phase != "mixed"):
            raise CalibrationError(
                f"{len(own)} different {phase} rows; at least {FOLDS} are needed, of prefill and "
                "of decode"
            )
    if any(not 0 < cell.seconds < SECONDS_MAX for cell in cells):
        raise CalibrationError("a latency is not positive, or no latency of one iteration")


def _place(cell: Cell) -> tuple[object, ...]:
    """Equal for repeated measurements of one kind of iteration."""
    return (cell.chunks, cell.decodes, cell.kv_tokens)


def _folds(cells: Sequence[Cell], seed: int) -> NDArray[np.int64]:
    """Which fifth each cell belongs to: fifths of each phase, repetitions together."""
    rng = np.random.default_rng(seed)
    of_place: dict[tuple[object, ...], int] = {}
    for phase in PHASES:
        places = list(dict.fromkeys(_place(cell) for cell in cells if cell.phase == phase))
        for rank, index in enumerate(rng.permutation(len(places))):
            of_place[places[index]] = rank % FOLDS
    return np.array([of_place[_place(cell)] for cell in cells])


def _shape(cells: Sequence[Cell], bend_tokens: int) -> Shape:
    tokens = sorted({cell.tokens for cell in cells})
    while len(tokens) > TOKEN_KNOTS_MAX:
        tokens = _thinned(tokens)
    decodes = {cell.decodes for cell in cells if cell.decodes}
    cached = any(context for cell in cells for _, context in cell.chunks)
    longest = max(chunk for cell in cells for chunk, _ in cell.chunks)
    return Shape(
        token_knots=tuple(tokens[:-1]),
        decode_knots=tuple(knot for knot in DECODE_KNOTS if min(decodes) <= knot < max(decodes)),
        chunk_knots=tuple(knot for knot in CHUNK_KNOTS if cached and knot < longest),
        bend_tokens=bend_tokens,
        mixed=any(cell.phase == "mixed" for cell in cells),
    )


def _thinned(tokens: list[int]) -> list[int]:
    """Without the inner point that lies closest, as a ratio, to the one before."""
    ratios = [tokens[i] / tokens[i - 1] for i in range(1, len(tokens) - 1)]
    return [t for i, t in enumerate(tokens) if i != 1 + ratios.index(min(ratios))]


def _pieces(x: Array, knots: Sequence[int]) -> Array:
    """[len(x), pieces]: how much of 0..x lies in each piece; the last piece is open."""
    edges = np.array([0.0, *knots])
    widths = np.append(np.diff(edges), np.inf)
    pieces: Array = np.clip(x[:, None] - edges, 0.0, widths)
    return pieces


def _features(cells: Sequence[Cell], shape: Shape) -> Array:
    """[cells, features], in the order in which `_coefficients` reads them."""
    decodes = np.array([cell.decodes for cell in cells], dtype=np.float64)
    tokens = np.array([cell.tokens for cell in cells], dtype=np.float64)
    first = shape.token_knots[0]
    above = _pieces(np.maximum(0.0, tokens - first), [k - first for k in shape.token_knots[1:]])
    prefills = np.array([bool(cell.chunks) for cell in cells], dtype=np.float64)[:, None]
    columns = [
        np.ones((len(cells), 1)),
        above,
        _prefill_features(cells, shape),
        (tokens - decodes)[:, None],
        prefills,
    ]
    decode = _decode_features(cells, decodes, shape)
    if not shape.mixed:
        return np.hstack([*columns, decode])
    ones = (decodes > 0).astype(np.float64)[:, None]
    return np.hstack([*columns, decode * (1 - prefills), np.hstack([decode, ones]) * prefills])


def _prefill_features(cells: Sequence[Cell], shape: Shape) -> Array:
    """[cells, pieces of the curve over chunks]: (context + chunk / 2) x piece, summed."""
    flat = [
        (index, chunk, context)
        for index, cell in enumerate(cells)
        for chunk, context in cell.chunks
    ]
    index, chunk, context = np.array(flat, dtype=np.float64).reshape(-1, 3).T
    pieces = (context + 0.5 * chunk)[:, None] * _pieces(chunk, shape.chunk_knots)
    summed = np.zeros((len(cells), pieces.shape[1]))
    np.add.at(summed, index.astype(int), pieces)
    return summed


def _decode_features(cells: Sequence[Cell], decodes: Array, shape: Shape) -> Array:
    """[cells, pieces of the slope, beyond the bend, sequences]."""
    kv_tokens = np.array([cell.kv_tokens for cell in cells], dtype=np.float64)
    context = (kv_tokens / np.maximum(1.0, decodes))[:, None]
    slopes = context * _pieces(decodes, shape.decode_knots)
    beyond = decodes[:, None] * np.maximum(0.0, context - shape.bend_tokens)
    bent = beyond if shape.bend_tokens else np.zeros_like(beyond)
    return np.hstack([slopes, bent, decodes[:, None]])


def _design(cells: Sequence[Cell], shape: Shape) -> tuple[Array, Array, Array]:
    """Features, seconds, and weights that give each phase the same say."""
    seconds = np.array([cell.seconds for cell in cells])
    phases = [cell.phase for cell in cells]
    counts = {phase: phases.count(phase) for phase in set(phases)}
    weights = np.array([(len(cells) / len(counts) / counts[phase]) ** 0.5 for phase in phases])
    return _features(cells, shape), seconds, weights


def _solve(design: Array, seconds: Array, weights: Array) -> Array:
    scaled = design * (weights / seconds)[:, None]
    norms = np.maximum(np.abs(scaled).max(axis=0), 1e-300)
    solution, _ = nnls(scaled / norms, weights, maxiter=50 * design.shape[1])
    return np.asarray(solution / norms, dtype=np.float64)


def _residual(cells: Sequence[Cell], shape: Shape) -> float:
    design, seconds, weights = _design(cells, shape)
    solution = _solve(design, seconds, weights)
    return float(np.mean(weights**2 * (design @ solution / seconds - 1) ** 2))


def _coefficients(solution: Array, shape: Shape) -> Coefficients:
    values = iter(_rounded(value) for value in solution)
    fixed = next(values)
    first = shape.token_knots[0]
    tokens = _curve([next(values) for _ in shape.token_knots], shape.token_knots, fixed, first)
    chunk_slopes = [next(values) for _ in range(len(shape.chunk_knots) + 1)]
    attention = _curve(chunk_slopes, (0, *shape.chunk_knots), 0.0, 0)
    per_prefill_token, prefill_fixed = next(values), next(values)
    decode = _decode_cost(values, shape, with_fixed=False)
    mixed = _decode_cost(values, shape, with_fixed=True) if shape.mixed else None
    return Coefficients(
        tokens=tokens,
        prefill_attention=attention,
        decode=decode,
        mixed=mixed,
        per_prefill_token_s=per_prefill_token,
        prefill_fixed_s=prefill_fixed,
    )


def _decode_cost(values: Iterable[float], shape: Shape, with_fixed: bool) -> DecodeCost:
    values = iter(values)
    slopes = [next(values) for _ in range(len(shape.decode_knots) + 1)]
    beyond, per_sequence = next(values), next(values)
    return DecodeCost(
        slope=_curve(slopes, (0, *shape.decode_knots), 0.0, 0),
        per_sequence_s=per_sequence,
        fixed_s=next(values) if with_fixed else 0.0,
        bend_tokens=float(shape.bend_tokens),
        beyond_bend_s=beyond,
    )


def _curve(slopes: Sequence[float], knots: Sequence[int], start: float, first: int) -> Curve:
    """Slopes from knot to knot, the last one open; flat before the first knot."""
    rises = [s * (b - a) for s, a, b in zip(slopes, knots, knots[1:], strict=False)]
    heights = [_rounded(height) for height in accumulate(rises, initial=start)]
    edges = [float(knot) for knot in knots]
    if first > 0:
        edges, heights = [0.0, *edges], [start, *heights]
    return Curve(tuple(edges), tuple(heights), slope_after=slopes[-1])


def _rounded(value: float) -> float:
    """Seven digits: far below any measurement, and the same file on any machine."""
    return float(f"{value:.7g}")
