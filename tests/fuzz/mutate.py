"""Broken messages from a seed: valid ones of every kind, and what bad lines and bad people make.

Valid messages are drawn from the types themselves, so a new message or field takes part by itself.
"""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, get_args

import msgspec
from msgspec import inspect

from shared.messages import AnyMessage, Message, encode

KINDS: tuple[type[Message], ...] = get_args(AnyMessage)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 127, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 1.5, math.nan, math.inf, -math.inf, 5e-324, 1.7e308),
    *("", "\x00", "a" * 300, "😀", "#", "*", "..", "gateway.x", "SliceDone"),
    *(b"", b"\x00", b"\xff" * 7, b"\x01\x00\x00\x00" * 5),
    *([], {}, [[]], {"": None}, [None] * 20, {"type": "Submit"}, {1: 2}),
)
LYING_LENGTHS = (
    b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
    b"\xdf\xff\xff\xff\xff",  # a map
    b"\xdb\xff\xff\xff\xff",  # a text
    b"\xc6\xff\xff\xff\xff",  # bytes
    b"\xc9\xff\xff\xff\xff\x01",  # an extension
    b"\xdc\xff\xff",
)
NESTING = 5_000
"""Arrays in arrays: deeper than any decoder's stack is meant for."""
TEXTS = ("", "r1", "r2", "g1", "w1", "m", "demo_model", "a.b", "1-1")
NUMBERS = (0, 1, 2, 3, 5, 16, 100, 2_048, -1, 2**31, 2**63 - 1)


def valid(chance: Random, kind: type[Message] | None = None) -> Message:
    """A message that the types allow, of any kind or of this one."""
    kind = kind or chance.choice(KINDS)
    made = _drawn(chance, inspect.type_info(kind))
    message: Message = msgspec.convert(made, kind)
    return message


def mutated(chance: Random, message: bytes) -> bytes:
    """The encoded message with something wrong in it; now and then it still means something."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        message = chance.choice(MUTATIONS)(chance, message)
    return message


def flipped(chance: Random, message: bytes) -> bytes:
    """Bits the other way round."""
    changed = bytearray(message)
    for _ in range(chance.randint(1, 8) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: Random, message: bytes) -> bytes:
    """The end, the beginning or a middle part is missing."""
    first, last = sorted(chance.randint(0, len(message)) for _ in range(2))
    return chance.choice((message[:last], message[first:], message[:first] + message[last:]))


def spliced(chance: Random, message: bytes) -> bytes:
    """The beginning of one, the end of another; or one behind the other."""
    other = encode(valid(chance))
    place, there = chance.randint(0, len(message)), chance.randint(0, len(other))
    return chance.choice((message[:place] + other[there:], message + other))


def inserted(chance: Random, message: bytes) -> bytes:
    """Bytes that do not belong there."""
    place = chance.randint(0, len(message))
    return message[:place] + chance.randbytes(chance.randint(1, 12)) + message[place:]


def lengthened(chance: Random, message: bytes) -> bytes:
    """A length that lies."""
    place = chance.randint(0, len(message))
    skip = chance.randint(0, 5)
    return message[:place] + chance.choice(LYING_LENGTHS) + message[place + skip :]


def nested(chance: Random, message: bytes) -> bytes:
    """A value wrapped so often that nobody should follow."""
    place = chance.randint(0, len(message))
    return message[:place] + b"\x91" * NESTING + message[place:]


def exchanged(chance: Random, message: bytes) -> bytes:
    """Somewhere in its structure another value, of another type perhaps; or a field too many or
    too few."""
    try:
        content = msgspec.msgpack.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return flipped(chance, message)
    try:
        return msgspec.msgpack.encode(_exchanged(chance, content))
    except (ValueError, OverflowError, RecursionError, TypeError):
        return cut(chance, message)


def revalued(chance: Random, message: bytes) -> bytes:
    """A value of the same type that nobody expects there: it comes past the decoder."""
    try:
        content = msgspec.msgpack.decode(message)
        return msgspec.msgpack.encode(_revalued(chance, content))
    except (ValueError, OverflowError, RecursionError, TypeError):  # DecodeError is a ValueError
        return cut(chance, message)


MUTATIONS: Sequence[Callable[[Random, bytes], bytes]] = (
    *(flipped, flipped, cut, spliced, inserted, lengthened),
    *(exchanged, exchanged, exchanged),
    *(revalued, revalued, revalued, revalued, revalued),
    nested,
)
"""Most of those that come past the decoder."""


def _exchanged(chance: Random, content: Any) -> Any:
    if isinstance(content, dict) and content and chance.random() < 0.9:
        key = chance.choice(list(content))
        match chance.randrange(8):
            case 0:
                return {name: value for name, value in content.items() if name != key}
            case 1:
                return {
                    **content,
                    chance.choice(("type", "x", "epoch", "worker")): _strange(chance),
                }
            case _:
                return {**content, key: _exchanged(chance, content[key])}
    if isinstance(content, list) and content and chance.random() < 0.9:
        place = chance.randrange(len(content))
        match chance.randrange(6):
            case 0:
                return content[:place] + content[place + 1 :]
            case 1:
                return content * chance.randint(2, 50)
            case _:
                return [*content[:place], _exchanged(chance, content[place]), *content[place + 1 :]]
    return _strange(chance)


def _revalued(chance: Random, content: Any) -> Any:
    if isinstance(content, dict) and content:
        key = chance.choice([name for name in content if name != "type"] or list(content))
        return {**content, key: _revalued(chance, content[key])}
    if isinstance(content, list) and content:
        place = chance.randrange(len(content))
        return [*content[:place], _revalued(chance, content[place]), *content[place + 1 :]]
    same = [value for value in STRANGE if type(value) is type(content)]
    return chance.choice(same) if same else content


def _strange(chance: Random) -> Any:
    return chance.choice(STRANGE)


def _drawn(chance: Random, kind: inspect.Type) -> Any:
    """A value of this type, for msgspec.convert."""
    match kind:
        case inspect.StructType():
            return _struct(chance, kind)
        case inspect.StrType():
            return chance.choice(TEXTS)
        case inspect.BytesType():
            return chance.choice((b"", b"\x05\x00\x00\x00" * chance.randint(1, 8), b"\x01\x02"))
        case inspect.IntType():
            return chance.choice(NUMBERS)
        case inspect.FloatType():
            return chance.choice((0.0, 0.5, 1.0, 30.0, -1.0, 1e9))
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.LiteralType():
            return chance.choice(kind.values)
        case inspect.UnionType():
            return _drawn(chance, chance.choice(kind.types))
        case inspect.VarTupleType():
            return [_drawn(chance, kind.item_type) for _ in range(chance.choice((0, 1, 1, 3)))]
        case inspect.TupleType():
            return [_drawn(chance, item) for item in kind.item_types]
        case inspect.DictType():
            keys = [_drawn(chance, kind.key_type) for _ in range(chance.choice((0, 0, 2)))]
            return {key: _drawn(chance, kind.value_type) for key in keys}
    raise AssertionError(f"a message has a field of a type that is not drawn yet: {kind}")


def _struct(chance: Random, kind: inspect.StructType) -> Any:
    array = bool(kind.array_like)
    values = {
        field.encode_name: _drawn(chance, field.type)
        for field in kind.fields
        if array or field.required or chance.random() < 0.7
    }
    if array:
        return list(values.values())
    return values if kind.tag is None else {str(kind.tag_field): kind.tag, **values}
