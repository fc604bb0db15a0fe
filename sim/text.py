"""Texts: which token ids stand in a prompt and in an output, without making any.

An output is a stretch of one long row of numbers, which begins at a place of the request's own.
So a slice of it costs one copy, a token tells its position, and a text that was spliced from two
requests, or from two positions, does not match.
"""

from functools import lru_cache
from zlib import crc32

from shared.tokens import TOKEN_BYTES, pack

ROW_TOKENS = 1 << 20
OUTPUT_TOKENS_MAX = 1 << 17
"""Longer outputs are no request of a chat."""
PROMPT_TOKENS_MAX = 1 << 20


@lru_cache(maxsize=1)
def _row() -> bytes:
    return pack(range(ROW_TOKENS + OUTPUT_TOKENS_MAX))


@lru_cache(maxsize=1 << 16)
def prompt_of(tokens: int) -> bytes:
    """A prompt of so many tokens. Equal lengths share one object: contents do not matter yet."""
    return _row()[: tokens * TOKEN_BYTES]


def output_begins(request_id: str) -> int:
    """Where this request's output stands in the row: to be remembered, and given to `output`."""
    return crc32(request_id.encode()) % ROW_TOKENS


def output(begins: int, position: int, count: int) -> bytes:
    """`count` output tokens from `position` on, packed."""
    start = (begins + position) * TOKEN_BYTES
    return _row()[start : start + count * TOKEN_BYTES]
