"""Token ids on the wire: little-endian unsigned 32-bit integers, packed without a header.

Packing ids as raw bytes costs about 0.4 us for 640 ids; a msgpack list of ints costs 30-40 us.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence

TOKEN_BYTES = 4
_NATIVE_U32 = "I"
assert array(_NATIVE_U32).itemsize == TOKEN_BYTES


def pack(ids: Iterable[int]) -> bytes:
    """Token ids as bytes, 4 per id. Raises OverflowError for an id outside 0 .. 2**32 - 1."""
    packed = array(_NATIVE_U32, ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(data: bytes) -> Sequence[int]:
    """The ids in `data`. Raises ValueError if its length is not a multiple of 4 bytes."""
    unpacked = array(_NATIVE_U32)
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()


def count(data: bytes) -> int:
    """How many ids `data` holds."""
    return len(data) // TOKEN_BYTES
