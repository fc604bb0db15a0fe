"""Linear layers for the CPU: weights laid out anew for oneDNN, once, when the model is loaded.

PyTorch's own `linear` hands row-major weights to MKL, which is far from the machine's rate where
rows are few: 17 ms against 9 for all layers of a 29-million model at 8 rows, 30 against 18 at 32
(one AVX-512 core; `python -m bench.steps`). For few rows tiles of our own are faster still
(`tiles.py`). They want weights as they were, so that both copies are kept where memory is ample.
Optional: int8, weights with one scale an output and activations with one a call: a third to a
quarter of the time.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.worker.memory import device_memory

ROWS_HINT = 32
"""The layout hardly depends on it; all row counts run on one copy."""
PLAIN_SHARE_MAX = 0.2
"""Of the free memory, for a second copy of the weights."""


class PackedLinear(nn.Module):
    """x W^T + b, float32 or bfloat16, on a packed copy of W, and W itself if `plain`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, plain: bool) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        weight = weight.detach().contiguous()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self._bias = None if bias is None else bias.detach().clone()
        self._dtype = weight.dtype
        self._multiply: Callable[..., None] | None = None
        self._few_rows = 0
        if plain:
            from services.worker.paged.tiles import FEW_ROWS, LANES, multiply

            if self.in_features % LANES == 0:
                self._multiply, self._few_rows = multiply, FEW_ROWS
            self._plain = _array(weight)
            self._plain_bias: Any = (
                np.empty(0, np.float32) if bias is None else bias.detach().float().numpy().copy()
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs], contiguous rows, of the weights' type."""
        if self._dtype == torch.float32 and self._few(x):
            return self.wide(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return found

    def wide(self, x: Tensor) -> Tensor:
        """x [rows, inputs] and the product in float32, whatever the weights are."""
        if self._few(x) and self._multiply is not None:
            out = torch.empty((len(x), self.out_features))
            self._multiply(x.numpy(), self._plain, self._plain_bias, out.numpy())
            return out
        if self._dtype == torch.float32:
            return self.forward(x)
        return self.forward(x.to(self._dtype)).float()

    def _few(self, x: Tensor) -> bool:
        rows = x.numel() // self.in_features
        return 0 < rows <= self._few_rows and not _several_threads()


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


Fast = PackedLinear | Int8Linear


def pack(
    weight: Tensor, bias: Tensor | None = None, *, int8: bool = False, plain: bool = False
) -> Fast:
    """The fast form of a linear layer; weight [outputs, inputs]."""
    return Int8Linear(weight, bias) if int8 else PackedLinear(weight, bias, plain=plain)


def plain_fits(network: nn.Module) -> bool:
    """Whether there is memory for a second copy of all weights."""
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    free, _ = device_memory(torch.device("cpu"))
    return size <= free * PLAIN_SHARE_MAX


def _several_threads() -> bool:
    """The tiles have one; oneDNN takes all."""
    return torch.get_num_threads() > 1


def _array(weight: Tensor) -> Any:
    """The same memory; bfloat16 as int16."""
    bits = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    return bits.numpy()


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can: on a CPU, in a type that it multiplies fast here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_layers(network: nn.Module, *, int8: bool = False, plain: bool = False) -> int:
    """Put fast forms in the place of all linear layers of a transformers model; returns how many.
    The model can then only be run, not trained or saved."""
    from transformers.pytorch_utils import Conv1D

    packed = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            weight: Tensor = child.get_parameter("weight")
            if can_pack(weight):
                rows = weight if type(child) is nn.Linear else weight.t()
                bias = None if child.bias is None else child.get_parameter("bias")
                setattr(parent, name, pack(rows, bias, int8=int8, plain=plain))
                packed += 1
    return packed
