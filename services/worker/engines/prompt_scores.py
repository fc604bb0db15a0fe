"""Log probabilities of prompt tokens, gathered chunk by chunk while a batch is prefilled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from services.worker.engines.batch import Row
from services.worker.sampling import describe_logprobs
from shared.messages import TokenLogprobs


class PromptScores:
    """For the rows that want them: one entry per prompt token; the first has no probability."""

    def __init__(self, rows: Sequence[Row], width: int) -> None:
        self._rows = rows
        self._width = width
        self._found: dict[int, list[TokenLogprobs]] = {
            index: [TokenLogprobs(chosen=None)]
            for index, row in enumerate(rows)
            if row.wants_prompt_logprobs
        }

    @property
    def wanted(self) -> bool:
        """Whether any row wants them."""
        return bool(self._found)

    def add(self, logits: Tensor, inputs: Tensor, start: int) -> None:
        """logits: [rows, columns, vocabulary] of the columns from `start` on. The logits of a
        column score the token of the next one."""
        for index, found in self._found.items():
            row = self._rows[index]
            pad = self._width - len(row.input_ids)
            first, last = max(start, pad), min(start + logits.shape[1], self._width - 1)
            if first >= last:
                continue
            scores = torch.log_softmax(logits[index, first - start : last - start].float(), dim=-1)
            targets = inputs[index, first + 1 : last + 1].tolist()
            wanted = row.order.spec.sampling.logprobs or 0
            found += describe_logprobs(scores, targets, [wanted] * len(targets))

    def deliver(self) -> None:
        """Give each row its own; they go out with its first token."""
        for index, found in self._found.items():
            self._rows[index].prompt_logprobs = tuple(found)
