"""From a request's prompt or conversation to token ids.

Tokenizing 100,000 characters takes tens of milliseconds, in which no stream would move on; long
texts therefore go to threads (the tokenizer lets other threads run meanwhile).
"""

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from services.gateway.errors import invalid, too_long
from services.gateway.requests import ChatRequest, CompletionRequest
from services.gateway.tokenizer import ModelText, TemplateFailed

INLINE_CHARACTERS_MAX = 4_096
"""About 0.5 ms of work; a thread's hand-over costs 0.1 ms."""
CHARACTERS_PER_TOKEN_MAX = 64
"""A prompt with more characters than this times the context cannot fit: no token is longer on
average. It is refused before it is tokenized."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready to be served."""

    ids: list[int]
    echo: str = ""
    """What stands before the completion if `echo` was asked for."""


async def completion_prompts(
    request: CompletionRequest, model: ModelText, threads: Executor, context_tokens_max: int
) -> list[Prompt]:
    """All prompts of `/v1/completions`. Raises ApiError."""
    prompts = []
    for given in _each(request.prompt):
        if isinstance(given, str):
            _check_size(len(given), context_tokens_max, "prompt")
            ids = await _encode(given, model, threads, special=True)
        else:
            ids = given
            unknown = next((i for i in ids if i >= model.vocabulary_size), None)
            if unknown is not None:
                raise invalid(
                    f"'prompt' has the token id {unknown}; this model's ids are below "
                    f"{model.vocabulary_size}.",
                    "prompt",
                )
        if not ids:
            raise invalid("'prompt' is empty.", "prompt", "empty_prompt")
        ids = _truncated(ids, request.truncate_prompt_tokens, request.max_tokens, model)
        echo = ""
        if request.echo:
            kept_whole = isinstance(given, str) and request.truncate_prompt_tokens is None
            echo = str(given) if kept_whole else model.decode(ids, skip_special=True)
        prompts.append(Prompt(ids, echo))
    return prompts


async def chat_prompt(
    request: ChatRequest, model: ModelText, threads: Executor, context_tokens_max: int
) -> Prompt:
    """The conversation through the model's chat template. Raises ApiError."""
    messages = [message.plain(index) for index, message in enumerate(request.messages)]
    if not model.has_chat_template:
        raise invalid("This model has no chat template; use /v1/completions.", "messages")
    options: dict[str, Any] = {
        key: value
        for key, value in (request.chat_template_kwargs or {}).items()
        if key not in TEMPLATE_OWN
    }
    options["add_generation_prompt"] = request.add_generation_prompt
    if request.continue_final_message:
        options["continue_final_message"] = True
    size = sum(len(message["content"]) for message in messages)
    _check_size(size, context_tokens_max, "messages")
    loop = asyncio.get_running_loop()
    try:
        if size <= INLINE_CHARACTERS_MAX:
            text = model.render_chat(messages, options)
        else:
            text = await loop.run_in_executor(threads, model.render_chat, messages, options)
    except TemplateFailed as error:
        raise invalid(
            f"The model's chat template refuses these messages: {str(error)[:300]}", "messages"
        ) from error
    _check_size(len(text), context_tokens_max, "messages")
    ids = await _encode(text, model, threads, special=False)
    if not ids:
        raise invalid("'messages' give an empty prompt.", "messages", "empty_prompt")
    ids = _truncated(ids, request.truncate_prompt_tokens, request.output_tokens_max, model)
    return Prompt(ids, messages[-1]["content"] if request.echo else "")


TEMPLATE_OWN = frozenset(
    {
        *("conversation", "tokenize", "return_dict", "return_tensors", "chat_template"),
        *("padding", "truncation", "max_length", "tokenizer_kwargs", "tools", "documents"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    }
)
"""Arguments of transformers' `apply_chat_template` that are no variables of the template."""


def _each(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, whichever of the four forms it has."""
    if isinstance(prompt, str):
        return [prompt]
    ids: list[int] = []
    prompts: list[str | list[int]] = []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
        else:
            prompts.append(part)
    return prompts or [ids]


async def _encode(text: str, model: ModelText, threads: Executor, *, special: bool) -> list[int]:
    if len(text) <= INLINE_CHARACTERS_MAX:
        return model.encode(text, special=special)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(threads, lambda: model.encode(text, special=special))


def _check_size(characters: int, context_tokens_max: int, param: str) -> None:
    if context_tokens_max and characters > context_tokens_max * CHARACTERS_PER_TOKEN_MAX:
        raise too_long(characters // CHARACTERS_PER_TOKEN_MAX, None, context_tokens_max, param)


def _truncated(
    ids: list[int], keep: int | None, output_tokens: int | None, model: ModelText
) -> list[int]:
    """The last `keep` ids; -1: as many as the context and the output leave."""
    if keep is None:
        return ids
    if keep == -1:
        if not model.context_tokens_max:
            return ids
        keep = max(1, model.context_tokens_max - (output_tokens or 1))
    if keep == 0:
        raise invalid("'truncate_prompt_tokens' must keep at least 1.", "truncate_prompt_tokens")
    return ids[-keep:]
