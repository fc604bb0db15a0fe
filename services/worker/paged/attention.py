"""Attention of one iteration over KV blocks: writes the new keys and values, then attends.

Rows that stand alone, as decodes do, go through a kernel that reads KV where it lies. Long chunks
of prefill go through matrix products, over KV that is gathered unless the chunk is all there is.
Where no kernel fits (other devices or number types) rows are gathered, too: slow, but right.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from services.worker.paged.cache import KvCache
from services.worker.paged.iteration import Chunk, Ints, Iteration


class Attention(Protocol):
    """Of all layers."""

    def begin(self, iteration: Iteration) -> None:
        """The next calls are of this iteration."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> Tensor:
        """query [rows, heads, size], keys and values [rows, kv_heads, size], already rotated;
        answers [rows, heads, value size]. `window`: a row sees at most so many tokens (0: all);
        `cap`: softcap of the scores (0: none)."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """What makes queries and keys of one layer's products: NumPy arrays, float32."""

    q_norm: Any
    """[size], or [0]: no norm."""
    k_norm: Any
    eps: Any
    cos: Any
    """[positions, rotated size]."""
    sin: Any


class GatheringAttention:
    """Any device, any type: KV of each sequence is gathered for each iteration."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._now: Iteration | None = None

    def begin(self, iteration: Iteration) -> None:
        """See Attention."""
        self._now = iteration
        device = self._cache.device
        self._slots = torch.from_numpy(iteration.slots).to(device)
        single = iteration.single
        self._singles = [
            Chunk(row, row + 1, int(iteration.seats[row]), int(iteration.contexts[row]))
            for row in range(single)
        ]

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> Tensor:
        """See Attention."""
        now = self._now
        assert now is not None
        stored = self._cache.layers[layer]
        stored.keys[self._slots] = keys.to(stored.keys.dtype)
        stored.values[self._slots] = values.to(stored.values.dtype)
        out = query.new_empty((*query.shape[:2], values.shape[2]))
        for chunk in (*self._singles, *now.chunks):
            out[chunk.begin : chunk.end] = attend_chunk(
                self._cache, layer, now, chunk, query, keys, values, scale, window, cap
            )
        return out


class KernelAttention:
    """On a CPU: float32 and bfloat16, by compiled kernels; rows are shared out to `threads`."""

    def __init__(self, cache: KvCache, threads: int = 1) -> None:
        from services.worker.paged import kernels

        self.cache = cache
        self._kernels = kernels
        self._pool = ThreadPoolExecutor(threads, "attention") if threads > 1 else None
        self._threads = threads
        self._now: Iteration | None = None

    def begin(self, iteration: Iteration) -> None:
        """See Attention."""
        self._now = iteration

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> Tensor:
        """See Attention."""
        now, stored = self._now, self.cache.layers[layer]
        assert now is not None
        q, k, v = (part.float().contiguous() for part in (query, keys, values))
        self._kernels.write_kv(
            k.numpy(), v.numpy(), now.slots, stored.keys_view, stored.values_view
        )
        out = self._attend(layer, q.flatten(1).numpy(), q, k, v, scale, window, cap)
        return out.to(query.dtype)

    @property
    def shared_out(self) -> bool:
        """Whether rows are shared out to several threads."""
        return self._pool is not None

    def attend_joined(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rotation: Rotation,
        scale: float,
        window: int,
        only: Ints | None = None,
    ) -> Tensor:
        """Queries, keys and values in one [rows, (heads + 2 kv_heads) x size], neither normed nor
        rotated; float32. They are changed in place. `only`: the answer is of these rows."""
        now, stored = self._now, self.cache.layers[layer]
        assert now is not None
        self._kernels.prepare(
            qkv.numpy(),
            heads,
            rotation.q_norm,
            rotation.k_norm,
            rotation.eps,
            now.positions,
            rotation.cos,
            rotation.sin,
            now.slots,
            stored.keys_view,
            stored.values_view,
        )
        return self.attend_stored(layer, qkv, heads, scale, window, only)

    def attend_stored(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        scale: float,
        window: int,
        only: Ints | None = None,
    ) -> Tensor:
        """The same, of queries and keys that are rotated, and keys and values in the cache."""
        now, stored = self._now, self.cache.layers[layer]
        assert now is not None
        joined = qkv.numpy()
        kv_heads, size = stored.keys.shape[1:]
        if only is not None:
            out = torch.empty((len(only), heads, size))
            self._attend_rows(
                layer, joined[only], now.seats[only], now.contexts[only], scale, window, 0.0, out
            )
            return out
        parts = qkv.view(len(qkv), -1, size)
        q, k, v = parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, -kv_heads:]
        return self._attend(layer, joined, q, k, v, scale, window, 0.0)

    def _attend(
        self,
        layer: int,
        flat: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int,
        cap: float,
    ) -> Tensor:
        """Over KV that is written already. flat: the queries, [rows, heads x size or more]."""
        now = self._now
        assert now is not None
        rows, heads, _ = q.shape
        out = torch.empty((rows, heads, v.shape[2]))
        single = slice(0, now.single)
        self._attend_rows(
            layer, flat, now.seats[single], now.contexts[single], scale, window, cap, out
        )
        for chunk in now.chunks:
            out[chunk.begin : chunk.end] = attend_chunk(
                self.cache, layer, now, chunk, q, k, v, scale, window, cap
            )
        return out

    def _attend_rows(
        self,
        layer: int,
        flat: Any,
        seats: Ints,
        contexts: Ints,
        scale: float,
        window: int,
        cap: float,
        out: Tensor,
    ) -> None:
        """The first rows of `flat` and `out`, one for each of `seats`, by the kernel."""
        now, stored, rows = self._now, self.cache.layers[layer], len(seats)
        assert now is not None
        if not rows:
            return
        kv_heads = stored.keys.shape[1]
        kernel = self._kernels.attention(
            out.shape[1] // kv_heads, stored.keys.shape[2], out.shape[2]
        )
        fixed = (
            flat,
            stored.keys_view,
            stored.values_view,
            self.cache.block_tokens,
            now.tables,
            seats,
            contexts,
            window,
            np.float32(scale),
            np.float32(cap),
            out.numpy(),
        )
        if self._pool is None or rows < 2:
            kernel(*fixed, 0, rows)
        else:
            bounds = np.linspace(0, rows, self._threads + 1).astype(int).tolist()
            list(self._pool.map(lambda b, e: kernel(*fixed, b, e), bounds[:-1], bounds[1:]))


def attend_chunk(
    cache: KvCache,
    layer: int,
    now: Iteration,
    chunk: Chunk,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int,
    cap: float,
) -> Tensor:
    """One sequence's rows, by matrix products: [rows of the chunk, heads, value size]."""
    rows, context = chunk.end - chunk.begin, chunk.context
    q = query[chunk.begin : chunk.end].transpose(0, 1)
    if rows == context:
        k, v = keys[chunk.begin : chunk.end], values[chunk.begin : chunk.end]
    else:
        blocks = -(-context // cache.block_tokens)
        table = torch.from_numpy(now.tables[chunk.seat, :blocks]).to(query.device)
        k, v = cache.gather(layer, table, context)
    k, v = k.to(q.dtype).transpose(0, 1), v.to(q.dtype).transpose(0, 1)
    limited = 0 < window < context
    if rows == context and not limited and not cap:
        return _products(q, k, v, None, scale)
    mask = _visible(rows, context, window if limited else 0, query.device)
    if cap:
        return _capped(q, k, v, mask, scale, cap)
    return _products(q, k, v, mask, scale)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[heads, rows, size] of each; without a mask: causal from the first token on."""
    out = scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0].transpose(0, 1)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0).float(), v.repeat_interleave(group, 0).float()
    scores = torch.tanh(q.float() @ k.transpose(1, 2) * (scale / cap)) * cap
    scores.masked_fill_(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).to(q.dtype)


def _visible(rows: int, context: int, window: int, device: torch.device) -> Tensor:
    """[rows, context]: what the last `rows` tokens of a sequence may see."""
    columns = torch.arange(context, device=device)
    own = columns[context - rows :, None]
    seen = columns <= own
    return seen & (columns > own - window) if window else seen


def kernels_fit(cache: KvCache) -> bool:
    """Whether the compiled kernels can be used."""
    return cache.device.type == "cpu" and cache.dtype in (torch.float32, torch.bfloat16)


def make_attention(cache: KvCache, threads: int, *, capped: bool) -> Attention:
    """The fastest that fits. `capped`: scores have a softcap."""
    if kernels_fit(cache):
        return KernelAttention(cache, threads)
    if cache.device.type == "cuda" and not capped:
        from services.worker.paged.cuda import VarlenAttention, varlen_fits

        if varlen_fits(cache):
            return VarlenAttention(cache)
    return GatheringAttention(cache)
