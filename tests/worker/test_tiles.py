"""Products of few rows: the same as PyTorch's, for every number of rows and odd shapes."""

import numpy as np
import pytest
import torch

from services.worker.paged.linears import PackedLinear
from services.worker.paged.tiles import FEW_ROWS, LANES, ROWS, multiply


@pytest.mark.parametrize("rows", [1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1])
@pytest.mark.parametrize("outputs", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("inputs", [LANES, 5 * LANES])
def test_product_is_torchs(rows: int, outputs: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(rows * 1_000 + outputs * 10 + inputs)
    x, weight = (
        torch.randn(rows, inputs, generator=draw),
        torch.randn(outputs, inputs, generator=draw),
    )
    bias = torch.randn(outputs, generator=draw)
    guarded = torch.full((rows + 1, outputs), 7.0)
    out = guarded[:rows].numpy()
    multiply(x.numpy(), weight.numpy(), bias.numpy(), out)
    assert torch.allclose(torch.from_numpy(out), x @ weight.t() + bias, atol=1e-4)
    assert bool((guarded[rows] == 7.0).all()), "wrote past the last row"
    multiply(x.numpy(), weight.numpy(), np.empty(0, np.float32), out)
    assert torch.allclose(torch.from_numpy(out), x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("rows", [1, ROWS, FEW_ROWS])
def test_bfloat16_weights_are_read_exactly(rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4 * LANES, generator=draw)
    weight = torch.randn(9, 4 * LANES, generator=draw).bfloat16()
    out = torch.empty(rows, 9)
    multiply(x.numpy(), weight.view(torch.int16).numpy(), np.empty(0, np.float32), out.numpy())
    assert torch.allclose(out, x @ weight.float().t(), atol=1e-4)


def test_a_width_that_no_tile_has_is_left_to_onednn() -> None:
    weight = torch.randn(8, LANES + 1, generator=torch.Generator().manual_seed(3))
    layer = PackedLinear(weight, None, plain=True)
    x = torch.ones(1, LANES + 1)
    assert torch.allclose(layer.wide(x), x @ weight.t(), atol=1e-4)
