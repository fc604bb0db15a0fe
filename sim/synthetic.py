"""Synthetic length sets: prompt and output lengths drawn from a distribution given as text.

`uniform:32-4096x2048-4096` draws both as whole numbers, ends included; one number stands for
itself (`uniform:512x128`). `lognormal:500/1.2x200/0.8` gives median and sigma of the logarithm.
`dist-1`, `dist-2` and `dist-3` are the three sets of the Past-Future authors' artifact, as the
research note found them there.
"""

import math
import re
from collections.abc import Callable
from random import Random

from sim.items import Item, WorkloadError

NAMED = {
    "dist-1": "uniform:32-4096x2048-4096",
    "dist-2": "uniform:3000-5000x3000-5000",
    "dist-3": "uniform:2048-4096x32-4096",
}
COUNT = 1000
"""Requests of a synthetic set when no limit is given [T]."""
LENGTH_MAX = 131_072
"""No drawn length is above this: the tail of a lognormal has no end, contexts do [T]."""
HOW = (
    f"a synthetic set is {', '.join(NAMED)}, uniform:LOW-HIGHxLOW-HIGH "
    "or lognormal:MEDIAN/SIGMAxMEDIAN/SIGMA (prompt x output tokens)"
)
KINDS = ("uniform", "lognormal")
Length = Callable[[Random], int]


def is_synthetic(text: str) -> bool:
    """Whether the text names or describes a synthetic set, well or badly."""
    return text.lower() in NAMED or text.partition(":")[0].lower() in KINDS


def draw_items(spec: str, count: int, rng: Random) -> list[Item]:
    """`count` requests with drawn lengths, no arrivals. Raises WorkloadError."""
    prompt, output = _lengths(spec)
    return [Item(None, prompt(rng), output(rng)) for _ in range(count)]


def _lengths(spec: str) -> tuple[Length, Length]:
    kind, _, rest = NAMED.get(spec.lower(), spec).partition(":")
    sides = rest.lower().split("x")
    if kind.lower() not in KINDS or len(sides) != 2:
        raise WorkloadError(f"{spec!r}: {HOW}")
    make = _uniform if kind.lower() == "uniform" else _lognormal
    return make(spec, sides[0]), make(spec, sides[1])


def _uniform(spec: str, side: str) -> Length:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", side.strip())
    if match is None:
        raise WorkloadError(f"{spec!r}: {side!r} is no LOW-HIGH; {HOW}")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high <= LENGTH_MAX:
        raise WorkloadError(f"{spec!r}: {side!r} must rise and lie within 1 and {LENGTH_MAX}")
    return lambda rng: rng.randint(low, high)


def _lognormal(spec: str, side: str) -> Length:
    try:
        median, sigma = (float(part) for part in side.split("/"))
    except ValueError:
        raise WorkloadError(f"{spec!r}: {side!r} is no MEDIAN/SIGMA; {HOW}") from None
    if not (1 <= median <= LENGTH_MAX and 0 <= sigma <= 10):
        raise WorkloadError(f"{spec!r}: {side!r} needs a median of 1 or more and 0 <= sigma <= 10")
    centre = math.log(median)
    return lambda rng: min(LENGTH_MAX, max(1, round(math.exp(rng.gauss(centre, sigma)))))
