"""The JSON of answers and stream chunks, as OpenAI's.

One `Writer` per call: it knows the endpoint and what the request asked for, and turns deltas into
chunks, or collects them into one answer.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from services.gateway.calls import Call, Choice
from services.gateway.core.transcript import Delta
from services.gateway.requests import ChatRequest, CompletionRequest
from services.gateway.scores import (
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    joined,
    prompt_logprobs,
)

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(content) + b"\n\n"


def waiting_comment(call: Call, now: float) -> bytes:
    """A comment for a stream that has nothing else to say: what is expected from now on, in
    milliseconds, as it was predicted when the call was accepted. Of what is over nothing is said,
    but by how much a start is late; the end is then as far away as it was to be from the start."""
    if call.promise is None:
        return b": waiting\n\n"
    start_s, finish_s = (at - now for at in call.promise)
    words = []
    if not call.begun:
        finish_s -= min(0.0, start_s)
        words.append(_milliseconds("start", start_s) or _milliseconds("late", -start_s))
    words.append(_milliseconds("finish", finish_s))
    said = " ".join(filter(None, words))
    return f": waiting, predicted {said}\n\n".encode() if said else b": waiting\n\n"


def _milliseconds(name: str, seconds: float) -> str:
    return f"{name}-ms={seconds * 1_000:.0f}" if seconds > 0 else ""


class Writer:
    """Writes one call's answer."""

    def __init__(
        self,
        call: Call,
        request: CompletionRequest | ChatRequest,
        texts: TokenTexts,
        fingerprint: str,
    ) -> None:
        self._call = call
        self._texts = texts
        self._fingerprint = fingerprint
        self._chat = isinstance(request, ChatRequest)
        self._echo = request.echo
        self._token_ids = request.return_token_ids
        self._scored = call.choices[0].spec.sampling.logprobs is not None
        self._top_count = call.choices[0].spec.sampling.logprobs or 0
        options = request.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats
        self._opened: set[int] = set()
        self._written_tokens = [0] * len(call.choices)

    # ------------------------------------------------------------------------------- streaming

    def chunks(self, choice: Choice, delta: Delta) -> Iterator[bytes]:
        """The events for what is new of a choice; the first ones open it."""
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            opening = self._opening(choice)
            if opening is not None:
                yield event(self._chunk([opening]))
        self._written_tokens[choice.index] = choice.transcript.output_tokens
        yield event(self._chunk([self._delta_choice(choice, delta)]))

    def last_chunks(self) -> Iterator[bytes]:
        """What follows the last delta of the last choice."""
        if self._usage_at_end:
            yield event(self._chunk([], usage=self.usage()))
        yield DONE

    def _opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk: the role in chat, the echoed prompt in completions."""
        if self._chat:
            content = choice.prompt.echo if self._echo else ""
            opening = self._stream_choice(choice, {"role": "assistant", "content": content}, None)
        elif self._echo:
            logprobs = None
            if self._scored:
                logprobs = prompt_logprobs(
                    choice.prompt.ids, choice.prompt_scores, self._top_count, self._texts
                )
            opening = self._stream_choice(choice, choice.prompt.echo, logprobs)
        else:
            return None
        if self._token_ids:
            opening["prompt_token_ids"] = choice.prompt.ids
        return opening

    def _delta_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        entry = self._stream_choice(
            choice, content if self._chat else delta.text, self._logprobs(choice, delta)
        )
        entry["finish_reason"] = finish_reason(delta)
        if delta.stop_reason is not None:
            entry["stop_reason"] = delta.stop_reason
        if self._token_ids:
            entry["token_ids"] = delta.token_ids
        return entry

    def _stream_choice(self, choice: Choice, content: Any, logprobs: Any) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta" if self._chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def _chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        chunk = self._frame("chat.completion.chunk" if self._chat else "text_completion", choices)
        if self._usage_always:
            chunk["usage"] = self.usage()
        elif self._usage_at_end:
            chunk["usage"] = usage
        return chunk

    # ---------------------------------------------------------------------------- whole answers

    def answer(self) -> bytes:
        """The whole answer; every choice has finished."""
        choices = []
        for choice in self._call.choices:
            delta = choice.transcript.take() or Delta()
            self._written_tokens[choice.index] = choice.transcript.output_tokens
            choices.append(
                self._chat_choice(choice, delta) if self._chat else self._text_choice(choice, delta)
            )
        kind = "chat.completion" if self._chat else "text_completion"
        return _encode({**self._frame(kind, choices), "usage": self.usage()})

    def _text_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(choice, delta)
        if self._echo and logprobs is not None:
            echoed = prompt_logprobs(
                choice.prompt.ids, choice.prompt_scores, self._top_count, self._texts
            )
            logprobs = joined(echoed, logprobs)
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": choice.prompt.echo + delta.text if self._echo else delta.text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(delta),
            "stop_reason": delta.stop_reason,
        }
        if self._token_ids:
            entry["prompt_token_ids"] = choice.prompt.ids
            entry["token_ids"] = delta.token_ids
        return entry

    def _chat_choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        content = choice.prompt.echo + delta.text if self._echo else delta.text
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs(choice, delta),
            "finish_reason": finish_reason(delta),
            "stop_reason": delta.stop_reason,
        }
        if self._token_ids:
            entry["token_ids"] = delta.token_ids
        return entry

    # -------------------------------------------------------------------------------- in common

    def usage(self) -> dict[str, int]:
        """Tokens of what was written so far."""
        prompt, output = self._call.prompt_tokens, sum(self._written_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._call.answer_id,
            "object": kind,
            "created": self._call.created,
            "model": self._call.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        if not self._scored:
            return None
        if self._chat:
            return chat_logprobs(delta.scored, self._top_count, self._texts)
        offset = len(choice.prompt.echo) if self._echo else 0
        return completion_logprobs(delta.scored, self._top_count, self._texts, offset=offset)


def finish_reason(delta: Delta) -> str | None:
    """In OpenAI's words; what the mesh itself cancelled is vLLM's `abort`."""
    return "abort" if delta.finish_reason == "cancelled" else delta.finish_reason
