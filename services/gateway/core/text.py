"""Text of one growing output: token ids in, whole characters out.

A token may be a part of a character, so text is held back until it is complete. Ids are pushed one
by one, whatever runs they arrived in, so the text does not depend on how the mesh cut the output
into messages. All deltas together equal `tokenizer.decode(ids)`.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 6
"""Prompt ids that the decoder sees first: some decoders drop the space of the very first word."""

HELD_TOKENS_MAX = 16
"""No character has more tokens. A model that writes broken bytes for ever must not make every step
decode them all again."""

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one output incrementally."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = list(prompt_ids[-CONTEXT_TOKENS:])
        self._held: list[int] = []
        self._stream = self._fresh_stream()

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        self._held.append(token_id)
        try:
            text: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:  # the decoder rewrote what it had said before
            return self.flush()
        if text is None:
            return self.flush() if len(self._held) >= HELD_TOKENS_MAX else ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is still held; an unfinished character becomes U+FFFD, as in a plain decode."""
        if not self._held:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        self._context, self._held = self._held[-CONTEXT_TOKENS:], []
        self._stream = self._fresh_stream()
        return text[len(before) :] if text.startswith(before) else text

    def _decode(self, ids: list[int]) -> str:
        decoded: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
        return decoded

    def _fresh_stream(self) -> DecodeStream:
        """A stream that has seen the context, unless the context ends inside a character."""
        if self._decode(self._context).endswith(REPLACEMENT):
            self._context = []
        return DecodeStream(ids=self._context, skip_special_tokens=self._skip_special)
