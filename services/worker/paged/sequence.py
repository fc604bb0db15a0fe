"""One leased request in the running batch: its text, its blocks, and how far each has got."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import chain

from services.worker.engines.api import BadOrder, StepTokens
from services.worker.paged.chain import ChainKeys
from services.worker.paged.iteration import Part
from services.worker.sampling import SamplingRow, end_ids
from shared.messages import FinishReason, SliceOrder, TokenLogprobs
from shared.tokens import unpack


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module's text. The text is the prompt and the output so far."""

    order: SliceOrder
    prompt: Items[int]
    output: list[int]
    until: int
    """It may make output up to this position."""
    ends: frozenset[int]
    chain: ChainKeys
    """Keys of the text's full blocks."""
    seat: int = -1
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens of the text whose KV is in the cache."""
    published: int = 0
    """Of `blocks`, those that are found under their keys, or whose keys others carry."""
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    told_prompt: bool = False

    @property
    def request_id(self) -> str:
        return self.order.spec.request_id

    @property
    def tokens(self) -> int:
        """Of the text."""
        return len(self.prompt) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens of the text that are not computed; 1: it decodes."""
        return self.tokens - self.computed

    @property
    def decodes(self) -> bool:
        """Its next row makes a token, and no row before it is missing."""
        return self.left == 1 and bool(self.output)

    @property
    def runs(self) -> bool:
        """It has credit for another token, or has none to make."""
        return len(self.output) < self.until or self.scores_only

    @property
    def scores_only(self) -> bool:
        """Its output has its length already: at most its prompt is scored."""
        return len(self.output) >= self.order.spec.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Only the first placement reports log probabilities of the prompt."""
        return self.order.spec.sampling.prompt_logprobs and not self.order.tokens

    def part(self, tokens: int) -> Part:
        """Its next so many tokens as rows. Logits of the last one, once the text is at its end; of
        all while the prompt is scored."""
        begin, end = self.computed, self.computed + tokens
        ids = self.output[-1:] if tokens == 1 and self.decodes else self._text(begin, end)
        if self.scores_prompt and begin < len(self.prompt):
            wanted = tokens
        else:
            wanted = int(end == self.tokens)
        return Part(self.seat, ids, end, wanted)

    def sampling_row(self) -> SamplingRow:
        """As the sampler sees it now."""
        spec = self.order.spec
        return SamplingRow(spec.sampling, spec.choice, self.prompt, self.output)

    def take(self, token: int, logprobs: TokenLogprobs | None) -> StepTokens:
        """Append a token."""
        position, ending = len(self.output), token in self.ends
        self.output.append(token)
        if ending:
            self.finish_reason = "stop"
        elif position + 1 >= self.order.spec.max_tokens:
            self.finish_reason = "length"
        return self._tell(position, (token,), ending, () if logprobs is None else (logprobs,))

    def end_scored(self) -> StepTokens:
        """Its end, without a token."""
        self.finish_reason = "length"
        return self._tell(len(self.output), (), False, ())

    def _tell(
        self, position: int, ids: tuple[int, ...], ending: bool, logprobs: tuple[TokenLogprobs, ...]
    ) -> StepTokens:
        scores: tuple[TokenLogprobs, ...] = ()
        if self.prompt_logprobs and not self.told_prompt:
            scores, self.told_prompt = tuple(self.prompt_logprobs), True
        return StepTokens(
            request_id=self.request_id,
            attempt=self.order.attempt,
            position=position,
            ids=ids,
            finish_reason=self.finish_reason,
            ending_token=ending,
            logprobs=logprobs,
            prompt_logprobs=scores,
        )

    def _text(self, begin: int, end: int) -> list[int]:
        prompt = len(self.prompt)
        if end <= prompt:
            return list(self.prompt[begin:end])
        return list(
            chain(self.prompt[begin:prompt], self.output[max(0, begin - prompt) : end - prompt])
        )


def make_sequence(
    order: SliceOrder,
    end_token_ids: Items[int],
    vocabulary: int,
    context: int,
    block_tokens: int,
) -> Sequence:
    """Of an order. Raises BadOrder."""
    spec = order.spec
    prompt, output = unpack(spec.prompt), unpack(order.tokens)
    named = f"request {spec.request_id}"
    if not prompt:
        raise BadOrder(f"{named} has no prompt; KV of an earlier lease is found by its tokens")
    if max(prompt) >= vocabulary or max(output, default=0) >= vocabulary:
        raise BadOrder(f"{named} has token ids beyond the vocabulary of {vocabulary}")
    most = max(spec.max_tokens, len(output))
    if len(prompt) + most > context:
        raise BadOrder(f"{named} would exceed the context of {context} tokens")
    until = min(len(output) + max(0, order.lease_tokens), most)
    keys = ChainKeys(block_tokens)
    keys.extend(spec.prompt)
    keys.extend(order.tokens)
    return Sequence(order, prompt, list(output), until, end_ids(spec.sampling, end_token_ids), keys)
