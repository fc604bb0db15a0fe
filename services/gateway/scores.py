"""Logprobs in OpenAI's two formats: parallel lists (completions), one object per token (chat)."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

from services.gateway.core.text import Detokenizer
from services.gateway.core.transcript import ScoredToken
from services.gateway.tokenizer import ModelText
from shared.messages import TokenLogprobs
from shared.tokens import unpack

LOGPROB_MIN = -9999.0
"""JSON has no minus infinity; vLLM writes this for it."""
TOKENS_CACHED = 65_536
UNSCORED = TokenLogprobs(chosen=None)


class TokenTexts:
    """What single tokens look like, remembered: top alternatives repeat all the time."""

    def __init__(self, model: ModelText) -> None:
        self.model = model
        self.text = lru_cache(TOKENS_CACHED)(model.token_text)
        self.bytes = lru_cache(TOKENS_CACHED)(model.token_bytes)


def completion_logprobs(
    scored: Sequence[ScoredToken], count: int, texts: TokenTexts, *, offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of a completion. `count`: how many alternatives were asked for. `offset`: length
    of what stands before the output."""
    top = [_top_of(token.token_id, token.scores, count, texts) for token in scored]
    return {
        "tokens": [texts.text(token.token_id) for token in scored],
        "token_logprobs": [_finite(token.scores.chosen) for token in scored],
        "top_logprobs": top if count else None,
        "text_offset": [offset + token.offset for token in scored],
    }


def prompt_logprobs(
    ids: Sequence[int], scores: Sequence[TokenLogprobs], count: int, texts: TokenTexts
) -> dict[str, Any]:
    """`logprobs` of an echoed prompt; its first token has none."""
    detokenizer = Detokenizer(texts.model.tokenizer)
    scored, offset = [], 0
    for token_id, score in zip(ids, [*scores, *repeat(UNSCORED, len(ids))], strict=False):
        scored.append(ScoredToken(token_id, score, offset))
        offset += len(detokenizer.push(token_id))
    return completion_logprobs(scored, count, texts)


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two completion logprobs, one after the other."""
    return {
        key: None if first[key] is None and second[key] is None else first[key] + second[key]
        for key in first
    }


def chat_logprobs(scored: Sequence[ScoredToken], count: int, texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    return {"content": [_chat_token(token, count, texts) for token in scored], "refusal": None}


def _chat_token(token: ScoredToken, count: int, texts: TokenTexts) -> dict[str, Any]:
    top_ids = unpack(token.scores.top_ids)[:count]
    return {
        **_chat_entry(token.token_id, token.scores.chosen, texts),
        "top_logprobs": [
            _chat_entry(token_id, logprob, texts)
            for token_id, logprob in zip(top_ids, token.scores.top_logprobs, strict=False)
        ],
    }


def _chat_entry(token_id: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts.text(token_id),
        "logprob": _finite(logprob) or 0.0,
        "bytes": list(texts.bytes(token_id)),
    }


def _top_of(
    token_id: int, scores: TokenLogprobs, count: int, texts: TokenTexts
) -> dict[str, float] | None:
    """The alternatives, with the chosen token among them; None where nothing was scored."""
    if scores.chosen is None:
        return None
    top = {
        texts.text(top_id): _finite(logprob) or 0.0
        for top_id, logprob in zip(
            unpack(scores.top_ids)[:count], scores.top_logprobs, strict=False
        )
    }
    top.setdefault(texts.text(token_id), _finite(scores.chosen) or 0.0)
    return top


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOGPROB_MIN)
