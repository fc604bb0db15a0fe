"""What requests on the simulated engine say: how long they get, and which tokens they are made of.

Both follow from a request's seed, so a text is the same in any slices, on any worker, in any
company; and whoever sends the request can know its length while the scheduler cannot.
"""

import csv
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from services.worker.models_config import ModelConfig
from shared.config import SetupError
from shared.messages import RequestSpec, TokenLogprobs

COLUMN = "output_tokens"
MEAN = "mean="
ROWS = 4096
"""Of a table that is made for a mean; enough that its quantiles are smooth."""
ENDLESS = 1 << 40
"""The length of an output that never ends by itself."""
_MASK = (1 << 64) - 1


class LengthsError(SetupError):
    """There is no such length table."""


@cache
def load_lengths(source: str) -> tuple[int, ...]:
    """Output lengths in tokens, from a file with a column `output_tokens`, or `mean=TOKENS`.

    Raises LengthsError.
    """
    if source.startswith(MEAN):
        return _exponential(source.removeprefix(MEAN))
    path = Path(source).expanduser()
    try:
        column = _parquet(path) if path.suffix == ".parquet" else _csv(path)
        lengths = tuple(int(float(value)) for value in column)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LengthsError(
            f"cannot read simulated_lengths {source}: {error or 'no such column'}; give a CSV or "
            f"Parquet file with a column {COLUMN}, or {MEAN}TOKENS"
        ) from error
    if not lengths or min(lengths) < 1:
        raise LengthsError(f"simulated_lengths {source}: the table is empty, or a length below 1")
    return lengths


class Texts:
    """Lengths and ids of all requests of one engine."""

    def __init__(self, lengths: Sequence[int], model: ModelConfig) -> None:
        self._lengths = lengths
        self._model = model
        self._logprob = -math.log(model.vocabulary_size)
        """Every token is as likely as any other."""

    def length(self, spec: RequestSpec) -> int:
        """Where this output would end by itself, the end token counted."""
        sampling = spec.sampling
        if sampling.ignore_eos:
            return ENDLESS
        row = (sampling.seed + spec.choice) % len(self._lengths)
        return max(self._lengths[row], sampling.min_tokens + 1)

    def ids(self, spec: RequestSpec, begin: int, end: int, *, ended: bool) -> tuple[int, ...]:
        """Output tokens from position `begin` to before `end`; `ended`: the last one ends it."""
        made = [self._token(spec, position) for position in range(begin, end)]
        if ended and made and self._model.end_token_ids:
            made[-1] = self._model.end_token_ids[0]
        return tuple(made)

    def logprobs(self, spec: RequestSpec, tokens: int) -> tuple[TokenLogprobs, ...]:
        """One entry per token if they are wanted."""
        if spec.sampling.logprobs is None:
            return ()
        return (TokenLogprobs(chosen=self._logprob),) * tokens

    def prompt_logprobs(self, spec: RequestSpec, prompt_tokens: int) -> tuple[TokenLogprobs, ...]:
        """One entry per prompt token if they are wanted."""
        if not spec.sampling.prompt_logprobs:
            return ()
        rest = (TokenLogprobs(chosen=self._logprob),) * (prompt_tokens - 1)
        return (TokenLogprobs(chosen=None), *rest)

    def _token(self, spec: RequestSpec, position: int) -> int:
        """An id that depends on (seed, choice, position) alone, and ends nothing."""
        sampling = spec.sampling
        drawn = _mixed((sampling.seed & _MASK) ^ _mixed(position + (spec.choice << 32)))
        if sampling.allowed_token_ids:
            return sampling.allowed_token_ids[drawn % len(sampling.allowed_token_ids)]
        size = self._model.vocabulary_size
        ends = {*self._model.end_token_ids, *sampling.stop_token_ids}
        token = drawn % size
        for _ in range(len(ends)):
            if token not in ends:
                break
            token = (token + 1) % size
        return token


def _mixed(value: int) -> int:
    """splitmix64's finisher: 64 bits that look random."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _exponential(mean: str) -> tuple[int, ...]:
    """The quantiles of an exponential distribution, in an order that looks random."""
    try:
        tokens = float(mean)
    except ValueError:
        tokens = 0.0
    if not 1 <= tokens < ENDLESS:
        raise LengthsError(f"simulated_lengths {MEAN}{mean}: the mean is a number from 1 up")
    ranks = sorted(range(ROWS), key=_mixed)
    return tuple(max(1, round(-tokens * math.log1p(-(rank + 0.5) / ROWS))) for rank in ranks)


def _csv(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row[COLUMN] for row in csv.DictReader(file)]


def _parquet(path: Path) -> list[float]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise LengthsError(
            "a Parquet table needs pyarrow: pip install 'tranche[parquet]'"
        ) from error
    column: list[float] = parquet.read_table(path, columns=[COLUMN])[COLUMN].to_pylist()
    return column
