"""The padded engine's KV cache: allocated once per slice for every token that it can hold.

transformers' own growing cache copies all of it at each token. Here a token is written in place,
and attention gets a view of the used part, so nothing is computed over empty slots. The backing
memory is kept between slices and grows only when a larger slice comes, because fresh memory on a
CPU costs a page fault per 4 KiB.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from services.worker.models import KvShape


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: [batch, heads, capacity, size] each, `length` tokens used."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    """Also for layers with a window: all is kept, and the window is in the mask."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the used ones; returns views of everything used."""
        start, end = self.length, self.length + key_states.shape[-2]
        assert end <= self.keys.shape[2], "a slice wrote more tokens than were allocated"
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what attention will see after the next update."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens used."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens allocated."""
        return int(self.keys.shape[2])


class KvArena:
    """The memory behind all slices of one engine."""

    def __init__(self, shapes: Sequence[KvShape], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._tokens = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def tokens(self) -> int:
        """Tokens that the backing memory holds now."""
        return self._tokens

    def reserve(self, batch_size: int, length: int) -> Cache:
        """A cache for `batch_size` sequences of `length` tokens; what an earlier one held is lost.

        Raises torch.OutOfMemoryError or RuntimeError if the memory cannot be had.
        """
        tokens = batch_size * length
        if tokens > self._tokens:
            self.release()
            self._buffers = [
                (
                    self._empty(tokens * s.heads * s.key_size),
                    self._empty(tokens * s.heads * s.value_size),
                )
                for s in self._shapes
            ]
            self._tokens = tokens
        layers = []
        for shape, (keys, values) in zip(self._shapes, self._buffers, strict=True):
            size = batch_size * shape.heads * length
            layers.append(
                PreallocatedLayer(
                    keys[: size * shape.key_size].view(
                        batch_size, shape.heads, length, shape.key_size
                    ),
                    values[: size * shape.value_size].view(
                        batch_size, shape.heads, length, shape.value_size
                    ),
                )
            )
        return Cache(layers=layers)

    def release(self) -> None:
        """Give the backing memory back."""
        self._buffers = []
        self._tokens = 0

    def _empty(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self._dtype, device=self._device)
