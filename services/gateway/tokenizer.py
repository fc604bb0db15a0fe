"""The model's tokenizer and what its configuration says: context length, end tokens, chat template.

Loaded by transformers from a folder or a hub id; no weights, no code from the model's repository.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.gateway.core.text import REPLACEMENT
from shared.config import SetupError
from shared.telemetry.logs import adopt_logger

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
UNKNOWN_LENGTH = 10**9
"""Tokenizers without a known limit report about 1e30."""


class TemplateFailed(Exception):
    """The chat template refused these messages."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """All that a gateway knows of a model."""

    name: str
    tokenizer: Tokenizer
    context_tokens_max: int
    """0: the configuration does not say."""
    vocabulary_size: int
    special_ids: frozenset[int]
    _template: Any
    """transformers' tokenizer, for its sandboxed chat template."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special` adds the begin token where the model wants one. Raises nothing
        for any str that is valid Unicode."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether chat requests can be served."""
        return bool(self._template.chat_template)

    def render_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        """The prompt's text for a conversation. Raises TemplateFailed."""
        try:
            text: str = self._template.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        return text

    def token_text(self, token_id: int) -> str:
        """One token's own text; a part of a character is written as bytes:\\xe2\\x82."""
        text = self.decode((token_id,))
        if REPLACEMENT in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token_id))
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, also if they are only a part of a character."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        text = self.decode((token_id,))
        if REPLACEMENT not in text:
            return text.encode()
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        table = _byte_of_character()
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return text.encode()


def import_tokenizers() -> Any:
    """transformers' AutoTokenizer. On demand: its import takes seconds, and only a running gateway
    needs it."""
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_model_text(model: str, name: str) -> ModelText:
    """Reads the tokenizer and configuration of a folder or hub id. Raises SetupError.

    `name`: what clients call it.
    """
    auto_tokenizer = import_tokenizers()
    adopt_logger("transformers")
    try:
        loaded = auto_tokenizer.from_pretrained(model, trust_remote_code=False, use_fast=True)
        backend = loaded.backend_tokenizer
    except Exception as error:
        raise SetupError(
            f"cannot read a tokenizer from {model!r}: {error}; give a folder with tokenizer.json "
            "or the id of a model on the hub"
        ) from error
    config = _config_of(model)
    config = config.get("text_config", config)
    tokens = backend.get_vocab_size(with_added_tokens=True)
    return ModelText(
        name=name,
        tokenizer=backend,
        context_tokens_max=_context_tokens_max(config, loaded),
        vocabulary_size=_positive(config.get("vocab_size")) or tokens,
        special_ids=frozenset(loaded.all_special_ids),
        _template=loaded,
    )


def _context_tokens_max(config: dict[str, Any], loaded: Any) -> int:
    """From config.json, else from the tokenizer."""
    for key in CONTEXT_KEYS:
        if length := _positive(config.get(key)):
            return length
    length = int(getattr(loaded, "model_max_length", 0) or 0)
    return length if 0 < length < UNKNOWN_LENGTH else 0


def _positive(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _config_of(model: str) -> dict[str, Any]:
    """config.json of a folder, or of a hub model from its cache."""
    from transformers.utils import cached_file

    try:
        path = cached_file(model, "config.json")
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {}
    return config


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves, the others for
    characters from U+0100 on, in order (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in printable]
    table |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return table
