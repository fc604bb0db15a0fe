"""Linear layers for the CPU: weights laid out anew for oneDNN, once, when the model is loaded.

PyTorch's own `linear` hands row-major weights to MKL, which is far from the machine's rate where
rows are few: 17 ms against 9 for all layers of a 29-million model at 8 rows, 30 against 18 at 32
(one AVX-512 core; `python -m bench.steps`). Optional: int8 weights, one scale a column, multiplied
by float activations (weights are what a small batch waits for).
"""

from typing import Protocol

import torch
from torch import Tensor, nn

ROWS_HINT = 32
"""The layout hardly depends on it; all row counts run on one copy."""


class Product(Protocol):
    """x [rows, inputs] to [rows, outputs]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""


class PackedLinear(nn.Module):
    """x W^T + b, float32 or bfloat16, on one packed copy of W."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), ROWS_HINT
        )
        self._bias = None if bias is None else bias.detach().clone()
        self._dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs], contiguous rows."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return found


class Int8Linear(nn.Module):
    """x W^T + b with W rounded to 8 bits, one scale per output."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scales = weight.detach().float().abs().amax(dim=1).clamp(min=1e-8) / 127
        self._weight = (weight.detach().float() / scales[:, None]).round().to(torch.int8)
        self._scales = scales.to(weight.dtype)
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs]."""
        rows = x.reshape(-1, self.in_features)
        found: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._scales)
        if self._bias is not None:
            found += self._bias
        return found.view(*x.shape[:-1], self.out_features)


def pack(weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> nn.Module:
    """The fast form of a linear layer; weight [outputs, inputs]."""
    if int8:
        return Int8Linear(weight, bias)
    return PackedLinear(weight, bias)


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

    packed = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D):
                continue
            weight: Tensor = child.get_parameter("weight")
            if can_pack(weight):
                rows = weight if type(child) is nn.Linear else weight.t()
                bias = None if child.bias is None else child.get_parameter("bias")
                setattr(parent, name, pack(rows, bias, int8=int8))
                packed += 1
    return packed
