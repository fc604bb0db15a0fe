"""Which orders can never run here, told before the engine sees them."""

from collections.abc import Collection

from services.worker.engines.api import EngineInfo
from shared.messages import FinishReason, RunSlice, Sampling, SliceOrder, SliceResult, TokenRun
from shared.tokens import TOKEN_BYTES, count, unpack

LOGPROBS_MAX = 100
"""Most likely tokens reported per position; OpenAI allows 20, others more."""


def batch_fault(order: RunSlice, info: EngineInfo) -> str:
    """Why this batch as a whole can never run here; empty if it can."""
    if order.form not in info.forms:
        return f"form {order.form}: engine {info.engine} runs {', '.join(info.forms)} slices"
    return "" if order.orders else "the batch is empty"


def order_fault(order: SliceOrder, info: EngineInfo) -> str:
    """Why this request can never be served here; empty if it can."""
    spec = order.spec
    if not spec.prompt:
        return "the prompt is empty"
    if len(spec.prompt) % TOKEN_BYTES or len(order.tokens) % TOKEN_BYTES:
        return "the token ids are cut off"
    total = count(spec.prompt) + max(spec.max_tokens, count(order.tokens))
    if total > info.context_tokens_max:
        return f"{total} tokens exceed the context of {info.context_tokens_max}"
    if spec.max_tokens < 0 or order.lease_tokens < 0:
        return "a token limit is negative"
    return _ids_fault(order, info.vocabulary_size) or _sampling_fault(spec.sampling)


def refused_result(order: SliceOrder, reason: FinishReason, detail: str) -> SliceResult:
    """What the scheduler is told of a request that is not run."""
    return SliceResult(
        request_id=order.spec.request_id,
        attempt=order.attempt,
        position=count(order.tokens),
        finish_reason=reason,
        detail=detail,
    )


def error_run(order: SliceOrder, fault: str) -> TokenRun:
    """What the gateway is told of a request that can never run."""
    return TokenRun(
        request_id=order.spec.request_id,
        attempt=order.attempt,
        position=count(order.tokens),
        ids=b"",
        finish_reason="error",
        detail=fault,
    )


def _ids_fault(order: SliceOrder, vocabulary: int) -> str:
    sampling = order.spec.sampling
    groups: tuple[tuple[str, Collection[int]], ...] = (
        ("prompt", unpack(order.spec.prompt)),
        ("output", unpack(order.tokens)),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids),
    )
    for name, ids in groups:
        if max(ids, default=0) >= vocabulary or min(ids, default=0) < 0:
            return f"{name} has token ids outside of 0 to {vocabulary - 1}"
    return ""


def _sampling_fault(sampling: Sampling) -> str:
    faults = {
        "temperature": not 0 <= sampling.temperature < float("inf"),
        "top_p": not 0 < sampling.top_p <= 1,
        "min_p": not 0 <= sampling.min_p <= 1,
        "top_k": sampling.top_k < -1,
        "repetition_penalty": not 0 < sampling.repetition_penalty < float("inf"),
        "presence_penalty": not abs(sampling.presence_penalty) < float("inf"),
        "frequency_penalty": not abs(sampling.frequency_penalty) < float("inf"),
        "logit_bias": any(not abs(v) < float("inf") for v in sampling.logit_bias.values()),
        "logprobs": not 0 <= (sampling.logprobs or 0) <= LOGPROBS_MAX,
    }
    wrong = [name for name, is_wrong in faults.items() if is_wrong]
    return f"out of range: {', '.join(wrong)}" if wrong else ""
