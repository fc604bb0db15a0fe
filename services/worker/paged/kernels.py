"""The CPU's kernels, compiled by numba: attention over KV blocks, rotary embedding, RMS norms.

Theory of operation. PyTorch has no CPU attention that reads KV where it lies in blocks; gathering
it would cost more than attending to it. Each kernel is made for one shape (heads, sizes, block), so
that its inner loops have constant lengths and become vector code. Arithmetic is float32; KV may be
float32 or the upper halves of float32 (bfloat16, seen as int16). All release Python's lock.

KV lies as [slots, heads, size]; slot = block x block_tokens + place in the block. That is also how
PyTorch's own paged attention on CUDA wants it.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

F32 = np.float32


def _may_cache() -> bool:
    """numba refuses to cache where it finds no folder that it may write to; then kernels are
    compiled at each start, which takes some seconds."""
    own = Path(__file__).parent
    places = (own / "__pycache__" if (own / "__pycache__").exists() else own, Path.home())
    return "NUMBA_CACHE_DIR" in os.environ or any(os.access(place, os.W_OK) for place in places)


OPTIONS: dict[str, Any] = {
    "fastmath": True,
    "nogil": True,
    "error_model": "numpy",
    "cache": _may_cache(),
}
LOG2_E = F32(1.4426950408889634)
LN2_HIGH = F32(0.693359375)
LN2_LOW = F32(-2.12194440e-4)
"""ln 2 in two parts, and the polynomial of Cephes' expf (Moshier): error 2e-7."""
CACHE_LINE = 64
"""Bytes."""
AHEAD = 16
"""Tokens whose KV is fetched before its turn: blocks lie anywhere, so the processor does not
foresee them. Fetched into the second cache, not the first, whose few open misses would be the limit
(32 sequences of 215 tokens: 14 ms with the first, 6.5 with the second; 18 without)."""
LOWEST = F32(-87.0)
"""exp of less is 0 in float32."""


@njit(**OPTIONS)
def _exp(x):  # type: ignore[no-untyped-def]
    x = max(x, LOWEST)
    n = np.floor(x * LOG2_E + F32(0.5))
    f = x - n * LN2_HIGH - n * LN2_LOW
    p = F32(1.9875691500e-4)
    p = p * f + F32(1.3981999507e-3)
    p = p * f + F32(8.3334519073e-3)
    p = p * f + F32(4.1665795894e-2)
    p = p * f + F32(1.6666665459e-1)
    p = p * f + F32(5.0000001201e-1)
    p = p * f * f + f + F32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def load(x):  # type: ignore[no-untyped-def]
    """A stored number as float32: bfloat16's bits are the upper half of float32's."""


def _store(x, like):  # type: ignore[no-untyped-def]
    """float32 as it is stored; of bfloat16 the nearest one's bits, ties to even."""


@overload(load)
def load_typed(x):  # type: ignore[no-untyped-def]
    if x == types.int16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@overload(_store)
def _store_typed(x, like):  # type: ignore[no-untyped-def]
    if like != types.int16:
        return lambda x, like: x

    def narrowed(x, like):  # type: ignore[no-untyped-def]
        bits = F32(x).view(np.int32)
        odd = (bits >> np.int32(16)) & np.int32(1)
        return np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))

    return narrowed


@intrinsic
def fetch(_context, address):  # type: ignore[no-untyped-def]
    """Have the cache line at this address brought near, without waiting for it."""

    def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        where = builder.inttoptr(arguments[0], pointer)
        builder.call(fetch, [where, number(0), number(2), number(1)])  # to read, to L2, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(**OPTIONS)
def _fetch_slot(address, slot_bytes):  # type: ignore[no-untyped-def]
    for line in range(0, slot_bytes, CACHE_LINE):
        fetch(address + line)


@njit(**OPTIONS)
def _find_slots(table, context, window, block_tokens, slots):  # type: ignore[no-untyped-def]
    """Where the tokens lie that a row sees; returns how many they are."""
    first = max(0, context - window) if window > 0 else 0
    span = context - first
    for j in range(span):
        n = first + j
        slots[j] = table[n // block_tokens] * block_tokens + n % block_tokens
    return span


@njit(**OPTIONS)
def _weigh(scores, span, cap):  # type: ignore[no-untyped-def]
    """The first `span` scores become weights: their softmax, with a softcap before if cap > 0."""
    if cap > 0:
        for j in range(span):
            scores[j] = cap * np.tanh(scores[j] / cap)
    top = scores[0]
    for j in range(span):
        top = max(top, scores[j])
    total = F32(0)
    for j in range(span):
        p = _exp(scores[j] - top)
        scores[j] = p
        total += p
    by = F32(1) / total
    for j in range(span):
        scores[j] *= by


@lru_cache(maxsize=64)
def attention(group: int, key_size: int, value_size: int) -> Callable[..., None]:
    """attend(q, keys, values, block_tokens, tables, seats, contexts, window, scale, cap, out,
    begin, end).

    q: [rows, heads x key_size or more] float32; keys, values: [slots, kv_heads, size]; tables:
    [seats, blocks] int32; seats, contexts: [rows] int32: whose blocks a row reads, and how many
    tokens of them, its own the last; window: at most so many of these, 0: all; cap: softcap of
    scores, 0: none; out: [rows, heads, value_size]. Rows begin..end are done.
    """

    @njit(**OPTIONS)
    def attend(  # type: ignore[no-untyped-def]
        q, keys, values, block_tokens, tables, seats, contexts, window, scale, cap, out, begin, end
    ):
        kv_heads = keys.shape[1]
        heads = kv_heads * group
        first_key, key_bytes = keys.ctypes.data, keys.strides[0]
        first_value, value_bytes = values.ctypes.data, values.strides[0]
        longest = 1
        for row in range(begin, end):
            longest = max(longest, contexts[row])
        slots = np.empty(longest, np.int64)
        scores = np.empty((heads, longest), np.float32)
        sums = np.empty((heads, value_size), np.float32)
        for row in range(begin, end):
            span = _find_slots(tables[seats[row]], contexts[row], window, block_tokens, slots)
            for j in range(span):
                slot, n = slots[j], j + AHEAD
                if n < span:
                    _fetch_slot(first_key + slots[n] * key_bytes, key_bytes)
                elif n - span < span:
                    _fetch_slot(first_value + slots[n - span] * value_bytes, value_bytes)
                for head in range(kv_heads):
                    for g in range(0, group - 1, 2):
                        own = head * group + g
                        at, next_at = own * key_size, (own + 1) * key_size
                        s, t = F32(0), F32(0)
                        for d in range(key_size):
                            k = load(keys[slot, head, d])  # type: ignore[no-untyped-call]
                            s += q[row, at + d] * k
                            t += q[row, next_at + d] * k
                        scores[own, j], scores[own + 1, j] = s * scale, t * scale
                    if group % 2:
                        own = head * group + group - 1
                        at = own * key_size
                        s = F32(0)
                        for d in range(key_size):
                            k = load(keys[slot, head, d])  # type: ignore[no-untyped-call]
                            s += q[row, at + d] * k
                        scores[own, j] = s * scale
            for head in range(heads):
                _weigh(scores[head], span, cap)
                for d in range(value_size):
                    sums[head, d] = F32(0)
            for j in range(span):
                slot, n = slots[j], j + AHEAD
                if n < span:
                    _fetch_slot(first_value + slots[n] * value_bytes, value_bytes)
                for head in range(kv_heads):
                    for g in range(0, group - 1, 2):
                        own = head * group + g
                        p, r = scores[own, j], scores[own + 1, j]
                        for d in range(value_size):
                            v = load(values[slot, head, d])  # type: ignore[no-untyped-call]
                            sums[own, d] += p * v
                            sums[own + 1, d] += r * v
                    if group % 2:
                        own = head * group + group - 1
                        p = scores[own, j]
                        for d in range(value_size):
                            v = load(values[slot, head, d])  # type: ignore[no-untyped-call]
                            sums[own, d] += p * v
            for head in range(heads):
                for d in range(value_size):
                    out[row, head, d] = sums[head, d]

    return attend  # type: ignore[no-any-return]


@njit(**OPTIONS)
def write_kv(k, v, slots, keys, values):  # type: ignore[no-untyped-def]
    """k, v [rows, kv_heads, size] float32 to the slots [rows] of keys and values [slots, kv_heads,
    size]."""
    for row in range(slots.shape[0]):
        slot = slots[row]
        for head in range(keys.shape[1]):
            for d in range(keys.shape[2]):
                keys[slot, head, d] = _store(k[row, head, d], keys[0, 0, 0])  # type: ignore[no-untyped-call]
            for d in range(values.shape[2]):
                values[slot, head, d] = _store(v[row, head, d], values[0, 0, 0])  # type: ignore[no-untyped-call]


@njit(**OPTIONS)
def _normalize_at(x, row, at, size, weight, eps):  # type: ignore[no-untyped-def]
    total = F32(0)
    for d in range(size):
        total += x[row, at + d] * x[row, at + d]
    by = F32(1) / np.sqrt(total / F32(size) + eps)
    for d in range(size):
        x[row, at + d] = x[row, at + d] * by * weight[d]


@njit(**OPTIONS)
def _rotate_at(x, row, at, c, s):  # type: ignore[no-untyped-def]
    half = c.shape[0] // 2
    for d in range(half):
        a, b = x[row, at + d], x[row, at + half + d]
        x[row, at + d] = a * c[d] - b * s[d]
        x[row, at + half + d] = b * c[half + d] + a * s[half + d]


@njit(**OPTIONS)
def prepare(  # type: ignore[no-untyped-def]
    qkv, heads, q_norm, k_norm, eps, positions, cos, sin, slots, keys, values
):
    """Norms (where the weights have elements) and rotary embedding of queries and keys, in place;
    then keys and values to their slots.

    qkv: [rows, (heads + 2 kv_heads) x size]; q_norm, k_norm: [size] or [0]; positions, slots:
    [rows]; cos, sin: [positions, rotated size], whose halves are the pairs' two parts; keys,
    values: [slots, kv_heads, size].
    """
    kv_heads, size = keys.shape[1], keys.shape[2]
    for row in range(slots.shape[0]):
        c, s = cos[positions[row]], sin[positions[row]]
        for head in range(heads + kv_heads):
            at = head * size
            weight = q_norm if head < heads else k_norm
            if weight.shape[0]:
                _normalize_at(qkv, row, at, size, weight, eps)
            _rotate_at(qkv, row, at, c, s)
        slot = slots[row]
        for head in range(kv_heads):
            at = (heads + head) * size
            for d in range(size):
                keys[slot, head, d] = _store(qkv[row, at + d], keys[0, 0, 0])  # type: ignore[no-untyped-call]
            at = (heads + kv_heads + head) * size
            for d in range(size):
                values[slot, head, d] = _store(qkv[row, at + d], values[0, 0, 0])  # type: ignore[no-untyped-call]


@njit(**OPTIONS)
def add_and_normalize(x, y, weight, eps, out):  # type: ignore[no-untyped-def]
    """x += y; out = RMS norm of x times weight. All [rows, size] but weight [size]."""
    size = x.shape[1]
    for row in range(x.shape[0]):
        total = F32(0)
        for d in range(size):
            v = x[row, d] + y[row, d]
            x[row, d] = v
            total += v * v
        by = F32(1) / np.sqrt(total / F32(size) + eps)
        for d in range(size):
            out[row, d] = x[row, d] * by * weight[d]


@njit(**OPTIONS)
def normalize(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """out = RMS norm of x times weight; x, out: [rows, size]."""
    size = x.shape[1]
    for row in range(x.shape[0]):
        total = F32(0)
        for d in range(size):
            total += x[row, d] * x[row, d]
        by = F32(1) / np.sqrt(total / F32(size) + eps)
        for d in range(size):
            out[row, d] = x[row, d] * by * weight[d]


@njit(**OPTIONS)
def gate(x, out):  # type: ignore[no-untyped-def]
    """out = silu(first half of x) * second half; x: [rows, 2 size], out: [rows, size]."""
    size = out.shape[1]
    for row in range(x.shape[0]):
        for d in range(size):
            v = x[row, d]
            out[row, d] = v / (F32(1) + _exp(-v)) * x[row, size + d]
