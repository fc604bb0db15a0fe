"""Products by tiles: the same as PyTorch's, for every number of rows and odd shapes."""

import numpy as np
import pytest
import torch

from services.worker.paged.linears import Arena, PackedLinear, TiledLinear, pack
from services.worker.paged.tiles import FEW_ROWS, PANEL, ROWS, STEPS, fits, lay_panels, multiply

NONE = np.empty(0, np.float32)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 1])
@pytest.mark.parametrize("outputs", [1, 3, PANEL, PANEL + 1, 2 * PANEL - 1])
@pytest.mark.parametrize("inputs", [STEPS, 13 * STEPS])
def test_product_is_torchs(rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = drawn(rows, inputs), drawn(outputs, inputs), drawn(outputs)
    guarded = torch.full((rows + 1, outputs), 7.0)
    out = guarded[:rows].numpy()
    multiply(x.numpy(), lay_panels(weight), bias.numpy(), out)
    assert torch.allclose(torch.from_numpy(out), x @ weight.t() + bias, atol=1e-4)
    assert bool((guarded[rows] == 7.0).all()), "wrote past the last row"
    multiply(x.numpy(), lay_panels(weight), NONE, out)
    assert torch.allclose(torch.from_numpy(out), x @ weight.t(), atol=1e-4)


def test_an_output_is_the_same_to_the_bit_whatever_rows_are_beside_it() -> None:
    x, panels = drawn(3 * ROWS, 40), lay_panels(drawn(PANEL + 5, 40))
    whole = np.empty((len(x), PANEL + 5), np.float32)
    multiply(x.numpy(), panels, NONE, whole)
    for begin, end in ((0, 1), (5, 7), (1, ROWS), (2, 2 * ROWS + 3)):
        some = np.empty((end - begin, PANEL + 5), np.float32)
        multiply(x[begin:end].numpy(), panels, NONE, some)
        assert (some == whole[begin:end]).all(), (begin, end)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1, ROWS])
def test_bfloat16_weights_are_read_exactly(rows: int) -> None:
    x, weight = drawn(rows, 4 * STEPS), drawn(9, 4 * STEPS).bfloat16()
    out = torch.empty(rows, 9)
    multiply(x.numpy(), lay_panels(weight), NONE, out.numpy())
    assert torch.allclose(out, x @ weight.float().t(), atol=1e-4)


def test_weights_in_one_piece_of_memory_multiply_like_others() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(STEPS, 3), torch.nn.Linear(2 * STEPS, PANEL + 1))
    arena = Arena(network)
    for layer in network:
        assert isinstance(layer, torch.nn.Linear)
        x = drawn(4, layer.in_features)
        tiled = TiledLinear(layer.weight, layer.bias, arena)
        assert torch.allclose(tiled(x), layer(x), atol=1e-4)


def test_a_width_that_no_tile_has_is_left_to_onednn() -> None:
    weight = drawn(8, STEPS + 1)
    layer = pack(weight, both=True)
    assert not fits(weight)
    assert isinstance(layer, PackedLinear)
    x = torch.ones(1, STEPS + 1)
    assert torch.allclose(layer.wide(x), x @ weight.t(), atol=1e-4)
