"""The KV of all leases: one tensor of keys and one of values per layer, cut into blocks.

Slot = block x block_tokens + place. The memory is set aside once; blocks are given out by the pool,
which knows nothing of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.worker.models import KvShape

TOUCHED_BYTES = 1 << 30
"""On a CPU the first so many bytes are written to at the load (a third of a second): a page that an
iteration touches first costs it a fault. The rest of a large pool waits until it is used."""

SavedBlock = tuple[tuple[Tensor, Tensor], ...]
"""A block's keys and values of each layer, in host memory."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's KV: [slots, kv_heads, size]."""

    keys: Tensor
    values: Tensor
    keys_view: Any
    """On a CPU the same memory as a NumPy array (bfloat16 as int16), for the kernels; else None."""
    values_view: Any


class KvCache:
    """See the module's text."""

    def __init__(
        self,
        shapes: Sequence[KvShape],
        dtype: torch.dtype,
        device: torch.device,
        *,
        blocks: int,
        block_tokens: int,
    ) -> None:
        """Raises torch.OutOfMemoryError or RuntimeError if the memory cannot be had."""
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.device = device
        self.spare_slot = blocks * block_tokens
        """On CUDA: the first slot of a block that no sequence has, for rows that only fill up."""
        slots = (blocks + (device.type == "cuda")) * block_tokens
        self.layers = tuple(self._layer(shape, slots, dtype, device) for shape in shapes)
        if device.type == "cpu":
            self._touch(slots)

    def save(self, block: int) -> SavedBlock:
        """Copy a block to host memory."""
        part = self._part(block)
        return tuple(
            (layer.keys[part].to("cpu", copy=True), layer.values[part].to("cpu", copy=True))
            for layer in self.layers
        )

    def restore(self, block: int, saved: SavedBlock) -> None:
        """Copy a saved block back, to any place."""
        part = self._part(block)
        for layer, (keys, values) in zip(self.layers, saved, strict=True):
            layer.keys[part] = keys.to(self.device, non_blocking=True)
            layer.values[part] = values.to(self.device, non_blocking=True)

    def gather(self, layer: int, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, kv_heads, size] of a sequence, by its block ids."""
        cache, size = self.layers[layer], self.block_tokens
        places = torch.arange(size, device=blocks.device)
        slots = (blocks.long()[:, None] * size + places).flatten()[:tokens]
        return cache.keys[slots], cache.values[slots]

    def release(self) -> None:
        """Give the memory back."""
        self.layers = ()

    def _touch(self, slots: int) -> None:
        whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
        first = slots if whole <= TOUCHED_BYTES else slots * TOUCHED_BYTES // whole
        for layer in self.layers:
            layer.keys[:first] = 0
            layer.values[:first] = 0

    def _part(self, block: int) -> slice:
        return slice(block * self.block_tokens, (block + 1) * self.block_tokens)

    def _layer(
        self, shape: KvShape, slots: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        keys = torch.empty((slots, shape.heads, shape.key_size), dtype=dtype, device=device)
        values = torch.empty((slots, shape.heads, shape.value_size), dtype=dtype, device=device)
        return LayerCache(keys, values, _view(keys), _view(values))


def _view(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    if tensor.device.type != "cpu":
        return None
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy()
