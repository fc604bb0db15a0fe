"""Products of rows with a large matrix on one core, by tiles that stay in registers.

Theory of operation. Weights are laid out anew, once: panels of two vectors' width of outputs,
input by input, so that a panel is read from its first byte to its last. A tile multiplies up to 14
rows of x with one panel: its sums never leave the registers until they are whole, each vector of
weights serves all rows of the tile, each number of x two vectors. Panels are fetched into the
second cache well ahead of the first tile's reading; further tiles of the same panel find it there.
numba's own vectoriser does not keep such a tile in registers, so it is written in LLVM's language:
vectors of 16 numbers where the processor has AVX-512, else of 8 and fewer rows.

An output is summed in the order of its inputs, by itself: it is the same, to the bit, whatever rows
stand beside it.

Measured on one core (AMD EPYC with AVX-512; least of 11 interleaved runs, all layers of the
29-million model, in ms; oneDNN on the same numbers in brackets): 3.4 (8.2) for 1 row, 4.1 (8.2) for
8, 7.6 (10.9) for 16, 14.8 (17.9) for 32, 29 (34) for 64, 74 (81) for 160.
"""

from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from services.worker.paged.kernels import CACHE_LINE, OPTIONS

WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if WIDE else 8
VECTORS = 2
PANEL = VECTORS * LANES
"""Outputs of a panel."""
ROWS = 14 if WIDE else 6
"""Of x in a tile, at most: all sums, a panel's vectors and one number of x are in registers."""
STEPS = 4
"""Inputs of a turn of the loop; inputs must be a multiple of it."""
FEW_ROWS = 5
AHEAD_FEW, AHEAD = 12, 64
"""Inputs whose weights are fetched ahead, with up to FEW_ROWS rows and with more: with few rows
the memory's rate is the limit and a straight walk is foreseen anyway; with more it is latency."""

_I64, _I32, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_BYTE = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def fits(weight: Tensor) -> bool:
    """Whether a matrix [outputs, inputs] can be multiplied here."""
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return known and weight.shape[1] % STEPS == 0


def panels_size(weight: Tensor) -> int:
    """How many numbers its panels have."""
    outputs, inputs = weight.shape
    return -(-outputs // PANEL) * PANEL * inputs


def lay_panels(weight: Tensor, out: Tensor | None = None) -> Any:
    """weight [outputs, inputs] as panels [panels, inputs, PANEL], zeros after the last output; a
    NumPy array, bfloat16 as int16. `out`: flat memory for it, of `panels_size` numbers."""
    outputs, inputs = weight.shape
    count = -(-outputs // PANEL)
    if out is None:
        out = torch.empty(panels_size(weight), dtype=weight.dtype)
    panels = out.view(count, inputs, PANEL)
    whole = outputs // PANEL
    panels[:whole] = weight[: whole * PANEL].view(whole, PANEL, inputs).transpose(1, 2)
    if whole < count:
        panels[whole] = 0
        panels[whole, :, : outputs - whole * PANEL] = weight[whole * PANEL :].t()
    bits = panels.view(torch.int16) if panels.dtype == torch.bfloat16 else panels
    return bits.numpy()


class _Emitter:
    """The code of one tile: `rows` x PANEL sums of products over `inputs` inputs."""

    def __init__(self, builder: Any, narrow: bool) -> None:
        """`narrow`: weights are bfloat16, as int16."""
        self._b = builder
        self._narrow = narrow
        self._fma = self._declare(f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        self._fetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        known = self._b.module.globals.get(name)
        kind = ir.FunctionType(result, arguments)
        return known if known is not None else ir.Function(self._b.module, kind, name)

    def emit(self, rows: int, ahead: bool, w: Any, x: Any, inputs: Any, out: Any) -> None:
        """w: address of the panel; x, out: (address, bytes from row to row)."""
        b = self._b
        read = [self._row(x, r) for r in range(rows)]
        before = b.block
        loop, after = b.append_basic_block("tile"), b.append_basic_block("tile_end")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(_I64)
        at.add_incoming(_I64(0), before)
        cells = [(r, v) for r in range(rows) for v in range(VECTORS)]
        sums = {cell: b.phi(_VECTOR) for cell in cells}
        for phi in sums.values():
            phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        found: dict[tuple[int, int], Any] = dict(sums)
        distance = AHEAD_FEW if rows <= FEW_ROWS else AHEAD
        for step in range(STEPS):
            index = b.add(at, _I64(step))
            line = b.add(w, b.mul(index, _I64(PANEL * self._size)))
            if ahead:
                self._bring(b.add(line, _I64(distance * PANEL * self._size)))
            weights = [self._load_weight(line, v) for v in range(VECTORS)]
            for r in range(rows):
                number = self._spread(b.add(read[r], b.mul(index, _I64(4))))
                for v in range(VECTORS):
                    found[r, v] = b.call(self._fma, [number, weights[v], found[r, v]])
        for cell in cells:
            sums[cell].add_incoming(found[cell], loop)
        following = b.add(at, _I64(STEPS))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
        b.position_at_end(after)
        for r, v in cells:
            place = b.add(self._row(out, r), _I64(4 * LANES * v))
            b.store(found[r, v], b.inttoptr(place, _VECTOR.as_pointer())).align = 4

    @property
    def _size(self) -> int:
        return 2 if self._narrow else 4

    def _row(self, of: Any, index: int) -> Any:
        return self._b.add(of[0], self._b.mul(of[1], _I64(index)))

    def _load(self, address: Any, kind: Any, align: int) -> Any:
        loaded = self._b.load(self._b.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def _spread(self, address: Any) -> Any:
        """One number in all lanes."""
        b, none = self._b, ir.Constant(_VECTOR, ir.Undefined)
        first = b.insert_element(none, self._load(address, _FLOAT, 4), _I32(0))
        return b.shuffle_vector(first, none, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

    def _load_weight(self, line: Any, vector: int) -> Any:
        b = self._b
        place = b.add(line, _I64(vector * LANES * self._size))
        if not self._narrow:
            return self._load(place, _VECTOR, 4)
        wide = ir.VectorType(_I32, LANES)
        bits = self._load(place, ir.VectorType(ir.IntType(16), LANES), 2)
        shift = ir.Constant(wide, [16] * LANES)
        return b.bitcast(b.shl(b.zext(bits, wide), shift), _VECTOR)

    def _bring(self, line: Any) -> None:
        """Fetch into the second cache: the first's few open misses would be the limit."""
        b = self._b
        for at in range(0, PANEL * self._size, CACHE_LINE):
            where = b.inttoptr(b.add(line, _I64(at)), _BYTE)
            b.call(self._fetch, [where, _I32(0), _I32(2), _I32(1)])


@intrinsic
def _tile(_context, like, rows, ahead, w, x, x_row, inputs, out, out_row):  # type: ignore[no-untyped-def]
    """The tile of `rows` (1 .. ROWS) rows; see _Emitter.emit. `like`: a number of the weights'."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, rows, ahead, w, x, x_row, inputs, out, out_row = arguments
        emitter = _Emitter(builder, signature.args[0] == types.int16)
        end = builder.append_basic_block("end")
        which = builder.add(builder.mul(rows, _I64(2)), ahead)
        switch = builder.switch(which, end)
        for case in range(2, 2 * ROWS + 2):
            block = builder.append_basic_block(f"rows_{case // 2}")
            switch.add_case(_I64(case), block)
            builder.position_at_end(block)
            emitter.emit(case // 2, case % 2 == 1, w, (x, x_row), inputs, (out, out_row))
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(like, *[types.int64] * 8), generate


@njit(**OPTIONS)
def multiply(x, panels, bias, out):  # type: ignore[no-untyped-def]
    """out = x W^T + bias. x: [rows, inputs] float32, panels: of `lay_panels`, bias: [outputs] or
    [0], out: [rows, outputs]; rows of x and out are contiguous in themselves."""
    rows, outputs = out.shape
    tiles = (rows + ROWS - 1) // ROWS
    part = np.empty((ROWS, PANEL), np.float32)
    w, w_panel = panels.ctypes.data, panels.strides[0]
    first, x_row = x.ctypes.data, x.strides[0]
    found, out_row = out.ctypes.data, out.strides[0]
    for panel in range(panels.shape[0]):
        at = panel * PANEL
        partly = at + PANEL > outputs
        begin = 0
        for tile in range(tiles):
            end = rows * (tile + 1) // tiles
            _tile(
                panels[0, 0, 0],
                end - begin,
                1 if tile == 0 else 0,
                w + panel * w_panel,
                first + begin * x_row,
                x_row,
                x.shape[1],
                part.ctypes.data if partly else found + begin * out_row + 4 * at,
                part.strides[0] if partly else out_row,
            )
            if partly:
                for row in range(begin, end):
                    for o in range(at, outputs):
                        out[row, o] = part[row - begin, o - at]
            begin = end
    if bias.shape[0]:
        for row in range(rows):
            for o in range(outputs):
                out[row, o] += bias[o]
