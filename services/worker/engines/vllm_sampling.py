"""Our sampling inside vLLM: its batch rows get the tokens that our own sampler chooses.

vLLM lets a logits processor change the scores of a whole batch before it samples. This one chooses
by `services.worker.sampling`, forbids all other tokens, and vLLM, told to be greedy, can only take
what was chosen. So a draw depends on (seed, choice, position) alone, as everywhere in the mesh, and
a request may be put into vLLM anew, here or elsewhere, and goes on with the same text. No vLLM in
this file: `vllm_core` ties it to vLLM's interface.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.worker.sampling import BatchSampler, SamplingRow
from shared.messages import Sampling, TokenLogprobs

ROW = "tranche_row"
"""The key in a request's extra arguments under which vLLM carries its row to the processor."""
_FORBIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class KeyedRow:
    """What the processor must know of a request; it never changes."""

    key: str
    """The request's name inside vLLM."""
    sampling: Sampling
    choice: int
    prompt: Sequence[int]
    output: Sequence[int]
    """Output before it was put into vLLM; there it is the prompt's end."""


def vllm_parameters(row: KeyedRow, ends: Collection[int], tokens_max: int) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for a request that may make `tokens_max` more tokens
    (at least 1). All choosing is the row's; vLLM only counts and looks for the ends."""
    scored = row.sampling.prompt_logprobs and not row.output
    return {
        "temperature": 0.0,
        "max_tokens": max(1, tokens_max),
        "ignore_eos": True,
        "stop_token_ids": sorted(ends),
        "prompt_logprobs": (row.sampling.logprobs or 0) if scored else None,
        "detokenize": False,
        "extra_args": {ROW: row},
        # Its own copy would be a deep one, of the row too.
        "skip_clone": True,
    }


@dataclass(slots=True)
class _Seat:
    row: KeyedRow
    made: Sequence[int]
    """Output since it was put into vLLM; vLLM's own list, which grows."""


class KeyedBatch:
    """The rows of vLLM's running batch, by their index in it, and the choice of their tokens."""

    def __init__(self, vocabulary_size: int, model_end_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary_size
        self._end_ids = model_end_ids
        self._seats: dict[int, _Seat] = {}
        self._sampler: BatchSampler | None = None
        self._lengths: list[int] = []
        """Of each row's `made` at which the sampler stands."""
        self.logprobs: dict[str, TokenLogprobs] = {}
        """By key: of the tokens chosen last, where they were asked for."""

    def add(self, index: int, row: KeyedRow, made: Sequence[int]) -> None:
        """A request takes this place, whoever had it."""
        self._seats[index] = _Seat(row, made)
        self._sampler = None

    def remove(self, index: int) -> None:
        """The place is empty."""
        self._seats.pop(index, None)
        self._sampler = None

    def move(self, start: int, end: int, *, swap: bool) -> None:
        """The request in one place goes to another one, whose own goes, or changes places."""
        moved, replaced = self._seats.pop(start, None), self._seats.pop(end, None)
        if moved is not None:
            self._seats[end] = moved
        if replaced is not None and swap:
            self._seats[start] = replaced
        self._sampler = None

    def choose(self, logits: Tensor) -> Tensor:
        """Forbids all but the chosen tokens, in place. logits: [rows, vocabulary], float32.

        A row whose prompt is not read to its end yet has nonsense here, and vLLM drops its token:
        it has made nothing the next time either, and then the sampler is set up anew."""
        seats = [self._seats[index] for index in range(logits.shape[0])]
        lengths = [len(seat.made) for seat in seats]
        if self._sampler is None or lengths != self._lengths:
            self._sampler = self._sampler_of(seats, logits.device)
        chosen = self._sampler.choose(logits)
        self._lengths = [length + 1 for length in lengths]
        self.logprobs = {seats[i].row.key: found for i, found in chosen.logprobs.items()}
        logits.fill_(_FORBIDDEN)
        return logits.scatter_(1, chosen.tensor.unsqueeze(1), 0.0)

    def _sampler_of(self, seats: Sequence[_Seat], device: torch.device) -> BatchSampler:
        rows = [
            SamplingRow(
                seat.row.sampling,
                seat.row.choice,
                seat.row.prompt,
                (*seat.row.output, *seat.made),
            )
            for seat in seats
        ]
        return BatchSampler(rows, self._vocabulary, self._end_ids, device)
