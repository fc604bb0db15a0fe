"""One closed batch: its rows, what each has made, and when it ends. No tensors here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.worker.engines.api import BadOrder, SliceEnd, StepTokens
from services.worker.sampling import Chosen, SamplingRow, end_ids
from shared.messages import (
    FinishReason,
    RunSlice,
    SliceOrder,
    SliceResult,
    SliceTimings,
    TokenLogprobs,
)
from shared.tokens import pack, unpack


@dataclass(slots=True)
class Row:
    """One request in the batch."""

    order: SliceOrder
    prompt: Sequence[int]
    output_before: Sequence[int]
    budget: int
    """Most new tokens in this slice."""
    ends: frozenset[int]
    made: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    done: bool = False
    """No more tokens in this slice: finished, cancelled, or the lease is used up."""
    idle_iterations: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def input_ids(self) -> list[int]:
        """What is prefilled: the prompt and the output so far."""
        return [*self.prompt, *self.output_before]

    @property
    def position(self) -> int:
        """Where the slice begins in the output."""
        return len(self.output_before)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Only the first slice reports them."""
        return self.order.spec.sampling.prompt_logprobs and self.position == 0

    def sampling_row(self) -> SamplingRow:
        """This row, as the sampler sees it."""
        spec = self.order.spec
        return SamplingRow(spec.sampling, spec.choice, self.prompt, self.output_before)

    def take(self, token: int) -> bool:
        """Append a token. True if it is an ending token."""
        spec = self.order.spec
        self.made.append(token)
        ending = token in self.ends
        if ending:
            self.finish_reason = "stop"
        elif self.position + len(self.made) >= spec.max_tokens:
            self.finish_reason = "length"
        self.done = self.finish_reason is not None or len(self.made) >= self.budget
        return ending


class Batch:
    """The rows of one `RunSlice`."""

    def __init__(
        self, order: RunSlice, end_token_ids: Sequence[int], vocabulary: int, context: int
    ) -> None:
        """Raises BadOrder."""
        if order.form != "closed":
            raise BadOrder(f"this engine runs closed batches only, not {order.form} ones")
        if not order.orders:
            raise BadOrder("the batch is empty")
        self.order = order
        self.rows = [
            _make_row(share, order.iterations, end_token_ids, vocabulary, context)
            for share in order.orders
        ]
        self.input_tokens_max = max(len(row.input_ids) for row in self.rows)
        self.new_tokens_max = max(row.budget for row in self.rows)
        self.iterations = 0
        self.prefill_s = 0.0
        self.decode_s = 0.0

    @property
    def kv_tokens(self) -> int:
        """Slots that the whole slice needs: N x (L + S)."""
        return len(self.rows) * (self.input_tokens_max + self.new_tokens_max)

    @property
    def done(self) -> bool:
        """No row makes tokens any more."""
        return all(row.done for row in self.rows)

    def cancel(self, request_id: str) -> None:
        """End this request's row; it idles until the batch ends."""
        for row in self.rows:
            if row.order.spec.request_id == request_id and not row.done:
                row.finish_reason = "cancelled"
                row.done = True

    def take(self, chosen: Chosen) -> tuple[StepTokens, ...]:
        """Give each running row its token; count idle ones."""
        first = self.iterations == 0
        self.iterations += 1
        tokens = []
        for index, row in enumerate(self.rows):
            if row.done:
                row.idle_iterations += 1
                continue
            position = row.position + len(row.made)
            ids: tuple[int, ...] = ()
            ending = False
            if row.budget == 0:
                row.done = True
                row.finish_reason = "length" if row.order.spec.max_tokens <= position else None
            else:
                ids = (chosen.ids[index],)
                ending = row.take(chosen.ids[index])
            logprobs = (chosen.logprobs[index],) if ids and index in chosen.logprobs else ()
            tokens.append(
                StepTokens(
                    request_id=row.order.spec.request_id,
                    attempt=row.order.attempt,
                    position=position,
                    ids=ids,
                    finish_reason=row.finish_reason,
                    ending_token=ending,
                    logprobs=logprobs,
                    prompt_logprobs=row.prompt_logprobs if first else (),
                )
            )
        return tuple(tokens)

    def end(self, detail: str = "") -> SliceEnd:
        """The results so far."""
        results = tuple(
            SliceResult(
                request_id=row.order.spec.request_id,
                attempt=row.order.attempt,
                position=row.position,
                tokens=pack(row.made),
                finish_reason=row.finish_reason,
                invalid_tokens=row.idle_iterations,
                pad_tokens=self.input_tokens_max - len(row.input_ids),
                detail="" if row.finish_reason else detail,
            )
            for row in self.rows
        )
        timings = SliceTimings(
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            iterations=self.iterations,
            input_tokens_max=self.input_tokens_max,
            batch_size=len(self.rows),
        )
        return SliceEnd(batch_id=self.order.batch_id, results=results, timings=timings)


def _make_row(
    order: SliceOrder,
    iterations: int,
    end_token_ids: Sequence[int],
    vocabulary: int,
    context: int,
) -> Row:
    spec = order.spec
    prompt, output = unpack(spec.prompt), unpack(order.tokens)
    budget = min(order.lease_tokens, spec.max_tokens - len(output))
    budget = max(0, min(budget, iterations) if iterations else budget)
    named = f"request {spec.request_id}"
    if not prompt:
        raise BadOrder(f"{named} has no prompt; this engine keeps no KV between slices")
    if max(prompt) >= vocabulary or max(output, default=0) >= vocabulary:
        raise BadOrder(f"{named} has token ids beyond the vocabulary of {vocabulary}")
    if len(prompt) + len(output) + budget > context:
        raise BadOrder(f"{named} would exceed the context of {context} tokens")
    return Row(order, prompt, output, budget, end_ids(spec.sampling, end_token_ids))
