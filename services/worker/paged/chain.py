"""Chain keys: the name of each full block of a text, which stands for all tokens up to its end.

The key of a block is a hash of the key before it and of its own token ids (as in vLLM's prefix
cache). 128 bits of BLAKE2b: among a million million blocks the chance that any two share a key by
accident is 2e-15, and nobody finds two on purpose, so that a match needs no second look.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from shared.tokens import TOKEN_BYTES, pack

KEY_BYTES = 16

Ids = Sequence[int] | np.ndarray | bytes
"""Token ids; bytes are packed ones (`shared.tokens`)."""


def chain_keys(ids: Ids, block_tokens: int, salt: bytes = b"") -> list[bytes]:
    """The key of each full block of a text. Texts of different salts share nothing."""
    chain = ChainKeys(block_tokens, salt)
    chain.extend(ids)
    return chain.keys


class ChainKeys:
    """The keys of a text that grows."""

    def __init__(self, block_tokens: int, salt: bytes = b"") -> None:
        assert block_tokens >= 1, f"blocks of {block_tokens} tokens"
        self.keys: list[bytes] = []
        """Of all full blocks so far."""
        self._block_bytes = block_tokens * TOKEN_BYTES
        self._last = blake2b(salt, digest_size=KEY_BYTES).digest()
        self._open = bytearray()
        """Packed ids of the block that is not full."""

    def extend(self, ids: Ids) -> list[bytes]:
        """The text goes on with these; returns the keys of the blocks that this filled."""
        self._open += _packed(ids)
        before, size = len(self.keys), self._block_bytes
        full = len(self._open) // size * size
        if not full:
            return []
        for start in range(0, full, size):
            block = blake2b(self._last, digest_size=KEY_BYTES)
            block.update(self._open[start : start + size])
            self._last = block.digest()
            self.keys.append(self._last)
        del self._open[:full]
        return self.keys[before:]


def _packed(ids: Ids) -> bytes:
    if isinstance(ids, bytes):
        return ids
    if isinstance(ids, np.ndarray):
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < 1 << 32), "not a token id"
        return ids.astype("<u4").tobytes()
    return pack(ids)
