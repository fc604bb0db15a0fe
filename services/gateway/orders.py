"""From a checked request to what the mesh is asked for: one `RequestSpec` per choice."""

from dataclasses import dataclass

import msgspec

from services.gateway.calls import Call, Choice
from services.gateway.core.text import Detokenizer
from services.gateway.core.transcript import Transcript
from services.gateway.errors import PROMPT_PARAMS, invalid, too_long
from services.gateway.parameters import REQUESTS_MAX
from services.gateway.prompts import Prompt
from services.gateway.requests import ChatRequest, CompletionRequest
from services.gateway.tokenizer import ModelText
from shared.messages import RequestSpec
from shared.tokens import pack

SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Wishes:
    """What headers say about when the answer is wanted, in milliseconds."""

    ttft_deadline_ms: int | None = None
    deadline_ms: int | None = None


def add_choices(
    call: Call,
    request: CompletionRequest | ChatRequest,
    prompts: list[Prompt],
    model: ModelText,
    *,
    gateway: str,
    context_tokens_max: int,
    drawn_seed: int,
    wishes: Wishes,
) -> None:
    """Fills the call with its choices. Raises ApiError for what cannot be served."""
    if len(prompts) * request.n > REQUESTS_MAX:
        raise invalid(
            f"{len(prompts)} prompts with n={request.n} make {len(prompts) * request.n} "
            f"requests; at most {REQUESTS_MAX} are served in one call.",
            "n",
        )
    chat = isinstance(request, ChatRequest)
    asked = request.output_tokens_max if isinstance(request, ChatRequest) else request.max_tokens
    hidden = asked == 0
    asked = max(asked, 1) if asked is not None else None
    logprobs = _logprobs_wanted(request)
    sampling = request.sampling(
        seed=(drawn_seed if request.seed is None else request.seed) & SEED_MASK,
        vocabulary_size=model.vocabulary_size,
        logprobs=logprobs,
        prompt_logprobs=logprobs is not None and not chat and bool(request.echo),
    )
    for number, prompt in enumerate(prompts):
        max_tokens = _output_limit(
            len(prompt.ids), asked, context_tokens_max, PROMPT_PARAMS[call.endpoint]
        )
        if request.min_tokens > max_tokens:
            raise invalid(
                f"'min_tokens' is {request.min_tokens}, but at most {max_tokens} tokens can come.",
                "min_tokens",
            )
        if request.seed is None:  # equal prompts of one call shall differ, unless a seed is given
            sampling = msgspec.structs.replace(sampling, seed=(drawn_seed + number) & SEED_MASK)
        packed = pack(prompt.ids)
        guess = request.predicted_output_tokens
        for choice_index in range(request.n):
            index = len(call.choices)
            spec = RequestSpec(
                request_id=f"{call.call_id}-{index}",
                parent_id=call.call_id,
                choice=choice_index,
                gateway=gateway,
                model=model.name,
                endpoint=call.endpoint,
                tenant=call.tenant,
                priority=request.priority,
                prompt=packed,
                max_tokens=max_tokens,
                sampling=sampling,
                stream=request.stream,
                ttft_deadline_ms=wishes.ttft_deadline_ms,
                deadline_ms=wishes.deadline_ms,
                predicted_output_tokens=None if guess is None else min(guess, max_tokens),
                stop_strings=bool(request.stops),
                trace=call.trace,
            )
            transcript = Transcript(
                Detokenizer(model.tokenizer, prompt.ids, skip_special=request.skip_special_tokens),
                request.stops,
                include_stop=request.include_stop_str_in_output,
                min_tokens=request.min_tokens,
            )
            call.choices.append(Choice(index, spec, prompt, transcript, hidden))


def _logprobs_wanted(request: CompletionRequest | ChatRequest) -> int | None:
    """How many alternatives the workers report; None: no logprobs."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _output_limit(
    prompt_tokens: int, asked: int | None, context_tokens_max: int, param: str
) -> int:
    """Most output tokens; what does not fit the context is refused, as OpenAI does."""
    if not context_tokens_max:
        return 2**31 - 1 if asked is None else asked
    left = context_tokens_max - prompt_tokens
    if left < 1 or (asked is not None and asked > left):
        raise too_long(prompt_tokens, asked, context_tokens_max, param)
    return left if asked is None else asked
