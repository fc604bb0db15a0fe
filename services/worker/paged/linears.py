"""Linear layers for the CPU: weights laid out anew, once, when the model is loaded.

PyTorch's own `linear` hands row-major weights to MKL, which is far from the machine's rate where
rows are few. On one core float32 goes through tiles of our own (`tiles.py`), which are ahead of
oneDNN at every number of rows that was tried. oneDNN, on its own layout, does the rest: several
threads, and bfloat16, where a processor may have instructions for it; there the tiles help with few
rows if memory is ample enough for both copies. Optional: int8, weights with one scale an output and
activations with one a call.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.worker.memory import device_memory
from services.worker.paged import tiles

ROWS_HINT = 32
"""oneDNN's layout hardly depends on it; all row counts run on one copy."""
TILED_ROWS_MAX = 12
"""Of bfloat16."""
BOTH_SHARE_MAX = 0.2
"""Of the free memory, for a second copy of the weights."""

Arrays = tuple[Any, Any]
"""Panels and bias of `tiles.multiply`."""


class Arena:
    """One piece of memory that panels are laid into, one behind the other."""

    def __init__(self, network: nn.Module) -> None:
        """With room for all linear layers of a network."""
        weights = [m.weight for m in network.modules() if type(m) is nn.Linear]
        numbers = sum(tiles.panels_size(weight) for weight in weights)
        self._whole = torch.empty(numbers, dtype=weights[0].dtype if weights else None)
        self._used = 0

    def place(self, weight: Tensor) -> Any:
        """Its panels."""
        end = self._used + tiles.panels_size(weight)
        assert end <= len(self._whole), "the arena was made for less"
        panels = tiles.lay_panels(weight, self._whole[self._used : end])
        self._used = end
        return panels


class TiledLinear(nn.Module):
    """x W^T + b in float32, on one core."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arena: Arena | None = None) -> None:
        """weight: [outputs, inputs] that `tiles.fits`, float32 or bfloat16."""
        super().__init__()
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        panels = tiles.lay_panels(weight) if arena is None else arena.place(weight)
        none = np.empty(0, np.float32)
        self.arrays: Arrays = (
            panels,
            none if bias is None else bias.detach().float().numpy().copy(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs], contiguous rows, float32."""
        rows = self.wide(x.reshape(-1, self.in_features))
        return rows.view(*x.shape[:-1], self.out_features)

    def wide(self, x: Tensor) -> Tensor:
        """x [rows, inputs]."""
        out = torch.empty((len(x), self.out_features))
        tiles.multiply(x.numpy(), *self.arrays, out.numpy())
        return out


class PackedLinear(nn.Module):
    """x W^T + b by oneDNN, float32 or bfloat16; few rows by tiles if `both`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        both: bool = False,
        arena: Arena | None = None,
    ) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        weight = weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self._bias = None if bias is None else bias.detach().clone()
        self._dtype = weight.dtype
        few = both and tiles.fits(weight)
        self._tiled = TiledLinear(weight, bias, arena) if few else None

    @property
    def arrays(self) -> Arrays | None:
        """For few rows."""
        return None if self._tiled is None else self._tiled.arrays

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs], contiguous rows, of the weights' type."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return found

    def wide(self, x: Tensor) -> Tensor:
        """x [rows, inputs] and the product in float32, whatever the weights are."""
        if self._tiled is not None and 0 < len(x) <= TILED_ROWS_MAX:
            return self._tiled.wide(x)
        return self.forward(x.to(self._dtype)).float()


class Int8Linear(nn.Module):
    """x W^T + b with W rounded to 8 bits, one scale an output, and x to 8 bits at each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        wide = weight.detach().float()
        self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        scales = (wide.abs().amax(dim=1).clamp(min=1e-8) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():  # PyTorch moves quantisation elsewhere, but not this yet
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(wide, scales, zeros, 0, torch.qint8)
        whole = None if bias is None else bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack(rounded, whole)
        # Without VNNI two products of 8 bits are added in 16, which 7 bits cannot overflow.
        self._reduced = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs], of the weights' type."""
        return self.wide(x).to(self._dtype)

    def wide(self, x: Tensor) -> Tensor:
        """x [..., inputs] and the product in float32."""
        found: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self._packed, self._reduced)
        return found


Fast = TiledLinear | PackedLinear | Int8Linear


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    int8: bool = False,
    both: bool = False,
    arena: Arena | None = None,
) -> Fast:
    """The fast form of a linear layer; weight [outputs, inputs]. `both`: there is memory for two
    copies. Decided by the number of threads that PyTorch has now."""
    if int8:
        return Int8Linear(weight, bias)
    alone = torch.get_num_threads() == 1
    if alone and weight.dtype == torch.float32 and tiles.fits(weight):
        return TiledLinear(weight, bias, arena)
    return PackedLinear(weight, bias, both=both and alone, arena=arena)


def both_fit(network: nn.Module) -> bool:
    """Whether there is memory for a second copy of all weights."""
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    free, _ = device_memory(torch.device("cpu"))
    return size <= free * BOTH_SHARE_MAX


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can: on a CPU, in a type that it multiplies fast here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_layers(network: nn.Module, *, int8: bool = False) -> int:
    """Put fast forms in the place of all linear layers of a transformers model; returns how many.
    The model can then only be run, not trained or saved."""
    from transformers.pytorch_utils import Conv1D

    both, packed = both_fit(network), 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            weight: Tensor = child.get_parameter("weight")
            if can_pack(weight):
                rows = weight if type(child) is nn.Linear else weight.t()
                bias = None if child.bias is None else child.get_parameter("bias")
                setattr(parent, name, pack(rows, bias, int8=int8, both=both))
                packed += 1
    return packed
