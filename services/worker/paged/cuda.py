"""Attention on CUDA: PyTorch's own variable-length attention over blocks (flash attention).

Used where the installed torch has it and the shapes fit; elsewhere `GatheringAttention` runs. It is
one call per layer for decodes and chunks alike.
"""

import inspect

import torch
from torch import Tensor

from services.worker.paged.cache import KvCache
from services.worker.paged.iteration import Iteration

BLOCK_MULTIPLE = 16
"""What flash attention wants of a page's size; larger ones are slower to share."""


def varlen_fits(cache: KvCache) -> bool:
    """Whether PyTorch's paged attention runs this cache: its version, type, sizes, device."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return False
    sizes = {(layer.keys.shape[2], layer.values.shape[2]) for layer in cache.layers}
    same = all(key == value and key <= 256 and key % 8 == 0 for key, value in sizes)
    capable = torch.cuda.get_device_capability(cache.device) >= (8, 0)
    narrow = cache.dtype in (torch.bfloat16, torch.float16)
    return same and capable and narrow and cache.block_tokens % BLOCK_MULTIPLE == 0


class VarlenAttention:
    """See the module's text."""

    def __init__(self, cache: KvCache) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self.cache = cache
        self._varlen = varlen_attn

    def begin(self, iteration: Iteration) -> None:
        """Copy the iteration's shape to the device: one sequence per single row or chunk."""
        device, single = self.cache.device, iteration.single
        seats = [*iteration.seats[:single].tolist(), *(c.seat for c in iteration.chunks)]
        used = [*iteration.contexts[:single].tolist(), *(c.context for c in iteration.chunks)]
        ends = [*range(1, single + 1), *(c.end for c in iteration.chunks)]
        longest = max(used)
        blocks = -(-longest // self.cache.block_tokens)

        def on_device(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self._slots = torch.from_numpy(iteration.slots).to(device)
        self._starts = on_device([0, *ends])
        self._used = on_device(used)
        self._table = torch.from_numpy(iteration.tables[seats, :blocks]).to(device)
        self._rows_max = max([1, *(c.end - c.begin for c in iteration.chunks)])
        self._context_max = longest

    def hold(self, slots: Tensor, used: Tensor, table: Tensor, context_max: int) -> None:
        """In the place of `begin`: single rows only, whose inputs lie on the device and may change
        there (CUDA graphs). slots, used: [rows]; table: [rows, blocks]."""
        rows = len(slots)
        self._slots, self._used, self._table = slots, used, table
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        self._rows_max, self._context_max = 1, context_max

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
        assert not cap, "flash attention of torch has no softcap"
        cache, size = self.cache.layers[layer], self.cache.block_tokens
        cache.keys[self._slots] = keys
        cache.values[self._slots] = values
        found = self._varlen(
            query.contiguous(),
            cache.keys.view(-1, size, *cache.keys.shape[1:]),
            cache.values.view(-1, size, *cache.values.shape[1:]),
            self._starts,
            None,
            self._rows_max,
            self._context_max,
            scale=scale,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=query.shape[1] != cache.keys.shape[1],
            seqused_k=self._used,
            block_table=self._table,
        )
        assert isinstance(found, Tensor)
        return found
