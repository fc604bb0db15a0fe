"""Told: which recent outputs speak for a request whose output was predicted.

Theory of operation. No predictor is believed: what counts is how long those outputs became for
which about the same was predicted. Predictions are counted in steps of 2 %; evenly over the ranks
of those in the history lie anchors, and an anchor's pool are the outputs whose predictions are
nearest to its own, a fixed share of the history. So a pool is as narrow as the history allows,
whatever the predictor's scale, bias or noise are. Within a pool a line through outputs over
predictions moves the outputs to the anchor, and the anchor's to each step around it. A predictor
that tells no more than the class by prompt does is not heard: the pools' spread around their
medians must be less than that of the classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Cut = NDArray[np.bool_]

STEPS = 32
"""Predictions told apart in a doubling: each is 2 % wide."""
LEVELS = 18 * STEPS
"""The last is for 2 million tokens."""
ANCHORS = 16
POOL_SHARE = 0.2
POOL_LEAST = 30
"""Outputs in a pool: this share of the history, but so many at least."""
USEFUL = 0.95
"""Pools count where their spread is less than this share of the classes'."""


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Outputs that speak for predictions."""

    row_of: Ints
    """The pool of each level of prediction; -1: none."""
    shift_of: Ints
    """Tokens by which outputs at each level are longer than those of its pool."""
    outputs: tuple[Ints, ...]
    """Of each pool: equally likely lengths, ascending."""


def levels_of(predicted: Ints) -> Ints:
    """1 and more for predicted outputs in tokens; 0 where none was."""
    steps = STEPS * np.log2(np.maximum(predicted, 0) / 8 + 1)
    return np.where(predicted > 0, 1 + np.minimum(LEVELS - 2, steps.astype(np.int64)), 0)


def _centres(levels: Ints) -> Floats:
    """Tokens in the middle of levels."""
    return np.asarray(8 * (2 ** ((levels - 0.5) / STEPS) - 1))


def pools_of(
    lengths: Ints,
    cut: Cut | None,
    prompts: Ints,
    levels: Ints,
    seen: Callable[[Ints, Cut | None], Ints],
) -> Pools | None:
    """From outputs, whether a limit cut them, their classes by prompt and their levels; `seen` puts
    the weight of cut ones on those above them. None: no predictions, or of no use."""
    told = np.flatnonzero(levels)
    if len(told) < POOL_LEAST:
        return None
    told = told[np.argsort(levels[told], kind="stable")]
    lengths, levels, prompts = lengths[told], levels[told], prompts[told]
    cut = cut[told] if cut is not None else None
    size = max(POOL_LEAST, round(POOL_SHARE * len(told)))
    middles = levels[((np.arange(ANCHORS) + 0.5) * len(told) / ANCHORS).astype(np.int64)]
    anchors, weights = np.unique(middles, return_counts=True)
    centres, anchored = _centres(levels), _centres(anchors)
    pools, spreads, slopes = [], [], []
    for anchor, centre in zip(anchors.tolist(), anchored.tolist(), strict=True):
        away = np.abs(levels - anchor)
        near = away <= np.partition(away, size - 1)[size - 1]
        slope = _slope(lengths[near], centres[near])
        moved = lengths[near] + np.rint(slope * (centre - centres[near])).astype(np.int64)
        spreads.append(_spread(moved))
        slopes.append(slope)
        pools.append(seen(np.maximum(1, moved), cut[near] if cut is not None else None))
    spread = float(np.average(spreads, weights=weights))
    if spread >= USEFUL * _class_spread(lengths, prompts):
        return None
    all_ = np.arange(LEVELS)
    row_of = np.searchsorted((anchors[1:] + anchors[:-1] + 1) // 2, all_, side="right")
    shift = np.array(slopes)[row_of] * (_centres(all_) - anchored[row_of])
    row_of[0] = -1
    return Pools(row_of, np.rint(shift).astype(np.int64), tuple(pools))


def _slope(outputs: Ints, predicted: Floats) -> float:
    """Of the line through them; a falling one is chance."""
    if predicted.min() == predicted.max():
        return 0.0  # what is off their mean then is rounding
    off = predicted - predicted.mean()
    return max(0.0, float(off @ outputs) / float(off @ off))


def _spread(outputs: Ints) -> float:
    """Mean distance from the median, as one drawn anew would have it."""
    count = len(outputs)
    distance = np.abs(outputs - np.median(outputs)).mean()
    return float(distance) * count / max(1, count - 1)


def _class_spread(lengths: Ints, prompts: Ints) -> float:
    """The same, of each in its class by prompt; of one alone there, in the whole."""
    whole, total = _spread(lengths), 0.0
    for prompt in np.unique(prompts).tolist():
        mine = lengths[prompts == prompt]
        total += len(mine) * (_spread(mine) if len(mine) > 1 else whole)
    return total / len(lengths)
