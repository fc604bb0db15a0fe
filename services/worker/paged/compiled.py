"""Models of Llama's shape on one core: a layer in two calls, its attention and all the rest.

All products, norms and activations between one attention and the next are one compiled call, and
all weights lie in one piece of memory in the order in which they are read, so that the next matrix
is being fetched while the last outputs of the one before are computed. Where few rows are computed
reading the weights is nearly all of the work, and what lies between two products is felt.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from services.worker.paged import kernels
from services.worker.paged.attention import KernelAttention, Rotation
from services.worker.paged.iteration import Ints, Iteration
from services.worker.paged.kernels import OPTIONS
from services.worker.paged.tiles import multiply

KEPT_ROWS = 256
"""Space for so many rows is kept from one iteration to the next."""


@dataclass(frozen=True, slots=True)
class LayerArrays:
    """One layer as NumPy arrays; a product is (panels, bias) of `tiles.multiply`."""

    qkv: tuple[Any, Any]
    out: tuple[Any, Any]
    gate_up: tuple[Any, Any]
    down: tuple[Any, Any]
    norm_in: Any
    norm_mlp: Any
    rotation: Rotation
    eps: Any
    scale: float
    window: int


class CompiledLayers:
    """See the module's text."""

    def __init__(
        self,
        layers: Items[LayerArrays],
        norm: Any,
        head: tuple[Any, Any],
        embedding: Tensor,
        widths: "Widths",
    ) -> None:
        """embedding: [vocabulary, hidden]; norm: the last one's weight [hidden]."""
        self._layers, self._norm, self._head = layers, norm, head
        self._embedding, self._widths = embedding, widths
        self._attention: KernelAttention | None = None
        self._kernel: Any = None
        self._begin: tuple[Any, ...] = ()
        self._turns: list[tuple[Any, ...]] = []
        self._attends: list[tuple[Any, ...]] = []
        self._kept = widths.space(KEPT_ROWS)

    def forward(
        self, iteration: Iteration, attention: KernelAttention, only: Ints | None
    ) -> Tensor:
        """Logits of the wanted rows. `only`: the rows that the last layer is wanted of."""
        if attention is not self._attention:
            self._bind(attention)
        attention.begin(iteration)
        rows = len(iteration.ids)
        space = self._kept if rows <= KEPT_ROWS else self._widths.space(rows)
        h, mixed, qkv, both, inner = (part[:rows] for part in space)
        # Fresh in each iteration: it is small, and a caller may keep what is made of it.
        x = self._embedding[torch.from_numpy(iteration.ids)].float().numpy()
        places = (iteration.positions, iteration.slots)
        enter(x, *self._begin, *places, h, qkv)
        for index, turn in enumerate(self._turns):
            found = self._attend(index, iteration, attention, qkv)
            between(found, *turn, *places, x, h, mixed, both, inner, qkv)
        found = self._attend(len(self._turns), iteration, attention, qkv, only)
        wanted = iteration.wanted
        if only is not None:
            x, h, mixed, both, inner = (part[only] for part in (x, h, mixed, both, inner))
            wanted = np.arange(len(only), dtype=np.int64)
        return self._leave(found, wanted, x, h, mixed, both, inner)

    def _attend(
        self,
        index: int,
        iteration: Iteration,
        attention: KernelAttention,
        qkv: Any,
        only: Ints | None = None,
    ) -> Any:
        """[rows, heads x size]."""
        layer, rows = self._layers[index], len(qkv)
        if iteration.chunks or only is not None or attention.shared_out:
            heads = self._widths.heads
            whole = torch.from_numpy(qkv)
            out = attention.attend_stored(index, whole, heads, layer.scale, layer.window, only)
            return out.flatten(1).numpy()
        found = np.empty((rows, self._widths.found), np.float32)
        fixed = self._attends[index]
        tables = (iteration.tables, iteration.seats, iteration.contexts)
        by_head = found.reshape(rows, self._widths.heads, -1)
        self._kernel(qkv, *fixed[:3], *tables, *fixed[3:], by_head, 0, rows)
        return found

    def _leave(
        self, found: Any, wanted: Ints, x: Any, h: Any, mixed: Any, both: Any, inner: Any
    ) -> Tensor:
        last = self._layers[-1]
        logits = torch.empty((len(wanted), self._widths.vocabulary))
        leave(
            found,
            *last.out,
            last.norm_mlp,
            last.eps,
            *last.gate_up,
            *last.down,
            self._norm,
            *self._head,
            x,
            h,
            mixed,
            both,
            inner,
            wanted,
            logits.numpy(),
        )
        return logits

    def _bind(self, attention: KernelAttention) -> None:
        """What the calls get that does not change from one iteration to the next."""
        cache, heads = attention.cache, self._widths.heads
        stored = cache.layers
        kv_heads, size = stored[0].keys.shape[1:]
        self._kernel = kernels.attention(heads // kv_heads, size, stored[0].values.shape[2])

        def entry(index: int) -> tuple[Any, ...]:
            layer, place = self._layers[index], stored[index]
            turned = layer.rotation
            return (
                layer.norm_in,
                layer.eps,
                *layer.qkv,
                heads,
                turned.q_norm,
                turned.k_norm,
                turned.cos,
                turned.sin,
                place.keys_view,
                place.values_view,
            )

        self._begin = entry(0)
        self._turns = [
            (*of.out, of.norm_mlp, *of.gate_up, *of.down, *entry(index + 1))
            for index, of in enumerate(self._layers[:-1])
        ]
        none = np.float32(0)
        self._attends = [
            (
                place.keys_view,
                place.values_view,
                cache.block_tokens,
                of.window,
                np.float32(of.scale),
                none,
            )
            for of, place in zip(self._layers, stored, strict=True)
        ]
        self._attention = attention


@dataclass(frozen=True, slots=True)
class Widths:
    """Numbers in a row of what layers hand on."""

    hidden: int
    heads: int
    found: int
    """heads x value size."""
    qkv: int
    gate_up: int
    vocabulary: int

    def space(self, rows: int) -> tuple[Any, ...]:
        """For h, mixed, qkv, both, inner."""
        widths = (self.hidden, self.hidden, self.qkv, self.gate_up, self.gate_up // 2)
        return tuple(np.empty((rows, width), np.float32) for width in widths)


@njit(**OPTIONS)
def enter(  # type: ignore[no-untyped-def]
    x,
    norm,
    eps,
    qkv_panels,
    qkv_bias,
    heads,
    q_norm,
    k_norm,
    cos,
    sin,
    keys,
    values,
    positions,
    slots,
    h,
    qkv,
):
    """From x to queries; keys and values go to their slots. See kernels.prepare for the shapes."""
    kernels.normalize(x, norm, eps, h)
    multiply(h, qkv_panels, qkv_bias, qkv)
    kernels.prepare(qkv, heads, q_norm, k_norm, eps, positions, cos, sin, slots, keys, values)


@njit(**OPTIONS)
def _digest(  # type: ignore[no-untyped-def]
    found,
    out_panels,
    out_bias,
    norm_mlp,
    eps,
    gate_up_panels,
    gate_up_bias,
    down_panels,
    down_bias,
    x,
    h,
    mixed,
    both,
    inner,
):
    """What follows attention in a layer: x += out(found); mixed = mlp(norm(x)), not added yet."""
    multiply(found, out_panels, out_bias, mixed)
    kernels.add_and_normalize(x, mixed, norm_mlp, eps, h)
    multiply(h, gate_up_panels, gate_up_bias, both)
    kernels.gate(both, inner)
    multiply(inner, down_panels, down_bias, mixed)


@njit(**OPTIONS)
def between(  # type: ignore[no-untyped-def]
    found,
    out_panels,
    out_bias,
    norm_mlp,
    gate_up_panels,
    gate_up_bias,
    down_panels,
    down_bias,
    norm,
    eps,
    qkv_panels,
    qkv_bias,
    heads,
    q_norm,
    k_norm,
    cos,
    sin,
    keys,
    values,
    positions,
    slots,
    x,
    h,
    mixed,
    both,
    inner,
    qkv,
):
    """From one layer's attention to the next one's: found [rows, inputs], x [rows, hidden]."""
    _digest(
        found,
        out_panels,
        out_bias,
        norm_mlp,
        eps,
        gate_up_panels,
        gate_up_bias,
        down_panels,
        down_bias,
        x,
        h,
        mixed,
        both,
        inner,
    )
    kernels.add_and_normalize(x, mixed, norm, eps, h)
    multiply(h, qkv_panels, qkv_bias, qkv)
    kernels.prepare(qkv, heads, q_norm, k_norm, eps, positions, cos, sin, slots, keys, values)


@njit(**OPTIONS)
def leave(  # type: ignore[no-untyped-def]
    found,
    out_panels,
    out_bias,
    norm_mlp,
    eps,
    gate_up_panels,
    gate_up_bias,
    down_panels,
    down_bias,
    norm,
    head_panels,
    head_bias,
    x,
    h,
    mixed,
    both,
    inner,
    wanted,
    logits,
):
    """From the last layer's attention to the logits [wanted rows, vocabulary]."""
    _digest(
        found,
        out_panels,
        out_bias,
        norm_mlp,
        eps,
        gate_up_panels,
        gate_up_bias,
        down_panels,
        down_bias,
        x,
        h,
        mixed,
        both,
        inner,
    )
    kernels.add_and_normalize(x, mixed, norm, eps, h)
    count = wanted.shape[0]
    for index in range(count):
        for d in range(h.shape[1]):
            mixed[index, d] = h[wanted[index], d]
    multiply(mixed[:count], head_panels, head_bias, logits)
