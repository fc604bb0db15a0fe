"""Products of few rows with a large matrix, by tiles that stay in registers.

Theory of operation. With few rows a linear layer is reading its weights. A tile multiplies up to
six rows of x with four rows of weights at once, so that each number loaded serves several products
and sums never leave the registers; tiles walk through the weights in the order of memory, and the
next four rows of weights are fetched into the second cache meanwhile. numba's own vectoriser does
not keep such a tile in registers, so the tile is written in LLVM's language: vectors of 16 numbers
where the processor has AVX-512, else of 8 and half the rows.

Measured on one AVX-512 core, all layers of the 29-million model: 4.5, 5.3, 8.3 and 9.8 ms for 1,
6, 8 and 12 rows; oneDNN 9.7, 7.4, 9.7 and 10.7; from 13 rows on oneDNN is ahead.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from services.worker.paged.kernels import CACHE_LINE, F32, OPTIONS, fetch, load

WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if WIDE else 8
ROWS = 6 if WIDE else 3
"""Of x in a tile, at most."""
OUTPUTS = 4
"""Rows of weights in a tile."""
FEW_ROWS = 12 if WIDE else 4
"""Up to so many rows this is faster than oneDNN; without AVX-512 more was not tried."""

ONE_ROW_AHEAD = 4096
"""Bytes: 4.5 ms for all layers of the 29-million model and one row, 5.3 without, 5.0 with 8192."""

_I64, _I32, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


class _Emitter:
    """The code of one tile: `rows` x OUTPUTS sums of products over `inputs` numbers."""

    def __init__(self, builder: Any, narrow: bool) -> None:
        """`narrow`: weights are bfloat16, as int16."""
        self._b = builder
        self._narrow = narrow
        suffix = f"v{LANES}f32"
        self._sum = self._declare(f"llvm.vector.reduce.fadd.{suffix}", _FLOAT, [_FLOAT, _VECTOR])
        self._fma = self._declare(f"llvm.fma.{suffix}", _VECTOR, [_VECTOR] * 3)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        self._fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        known = self._b.module.globals.get(name)
        kind = ir.FunctionType(result, arguments)
        return known if known is not None else ir.Function(self._b.module, kind, name)

    def emit(self, rows: int, ahead: bool, w: Any, x: Any, inputs: Any, out: Any) -> None:
        """w, x, out: (address, bytes from row to row); of out, from one row of x to the next."""
        b = self._b
        weights = [self._row(w, o) for o in range(OUTPUTS)]
        inputs_of = [self._row(x, r) for r in range(rows)]
        before = b.block
        loop, after = b.append_basic_block("tile"), b.append_basic_block("tile_end")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(_I64)
        at.add_incoming(_I64(0), before)
        cells = [(o, r) for o in range(OUTPUTS) for r in range(rows)]
        sums = {cell: b.phi(_VECTOR) for cell in cells}
        for phi in sums.values():
            phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        read = [self._load(row, at) for row in inputs_of]
        found = {}
        for o in range(OUTPUTS):
            if ahead:
                self._bring(b.add(weights[o], b.mul(w[1], _I64(OUTPUTS))), at)
            weight = self._load_weight(weights[o], at)
            for r in range(rows):
                found[o, r] = b.call(self._fma, [weight, read[r], sums[o, r]])
        for cell in cells:
            sums[cell].add_incoming(found[cell], loop)
        following = b.add(at, _I64(LANES))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
        b.position_at_end(after)
        for o, r in cells:
            total = b.call(self._sum, [_FLOAT(0.0), found[o, r]], fastmath=("reassoc",))
            place = b.add(self._row(out, r), _I64(4 * o))
            b.store(total, b.inttoptr(place, _FLOAT.as_pointer()))

    def _row(self, of: Any, index: int) -> Any:
        return self._b.add(of[0], self._b.mul(of[1], _I64(index)))

    def _load(self, row: Any, at: Any, vector: Any = _VECTOR, size: int = 4) -> Any:
        b = self._b
        place = b.add(row, b.mul(at, _I64(size)))
        loaded = b.load(b.inttoptr(place, vector.as_pointer()))
        loaded.align = size
        return loaded

    def _load_weight(self, row: Any, at: Any) -> Any:
        if not self._narrow:
            return self._load(row, at)
        b, wide = self._b, ir.VectorType(_I32, LANES)
        bits = self._load(row, at, ir.VectorType(ir.IntType(16), LANES), 2)
        shift = ir.Constant(wide, [16] * LANES)
        return b.bitcast(b.shl(b.zext(bits, wide), shift), _VECTOR)

    def _bring(self, row: Any, at: Any) -> None:
        """Fetch into the second cache: the first's few open misses would be the limit."""
        b = self._b
        place = b.add(row, b.mul(at, _I64(2 if self._narrow else 4)))
        where = b.inttoptr(place, ir.IntType(8).as_pointer())
        b.call(self._fetch, [where, _I32(0), _I32(2), _I32(1)])


@intrinsic
def _tile(_context, like, rows, ahead, w, w_row, x, x_row, inputs, out, out_row):  # type: ignore[no-untyped-def]
    """The tile of `rows` (1 .. ROWS) rows; see _Emitter.emit. `like`: a number of the weights'."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, rows, ahead, w, w_row, x, x_row, inputs, out, out_row = arguments
        emitter = _Emitter(builder, signature.args[0] == types.int16)
        end = builder.append_basic_block("end")
        which = builder.add(builder.mul(rows, _I64(2)), ahead)
        switch = builder.switch(which, end)
        for case in range(2, 2 * ROWS + 2):
            block = builder.append_basic_block(f"rows_{case // 2}")
            switch.add_case(_I64(case), block)
            builder.position_at_end(block)
            emitter.emit(case // 2, case % 2 == 1, (w, w_row), (x, x_row), inputs, (out, out_row))
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(like, *[types.int64] * 9), generate


@njit(**OPTIONS)
def _multiply_row(x, weight, out):  # type: ignore[no-untyped-def]
    """x: [inputs], out: [outputs]."""
    w, w_row = weight.ctypes.data, weight.strides[0]
    for o in range(weight.shape[0]):
        for line in range(0, w_row, CACHE_LINE):
            fetch(w + o * w_row + ONE_ROW_AHEAD + line)
        s = F32(0)
        for i in range(weight.shape[1]):
            s += load(weight[o, i]) * x[i]  # type: ignore[no-untyped-call]
        out[o] = s


@njit(**OPTIONS)
def multiply(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """out = x weight^T + bias for few rows. x: [rows, inputs] float32, weight: [outputs, inputs]
    float32 or bfloat16 as int16, bias: [outputs] or [0], out: [rows, outputs]; inputs: a multiple
    of LANES."""
    rows, outputs = out.shape
    # One row is read at the memory's rate by a plain loop, which walks in a straight line.
    whole = outputs - outputs % OUTPUTS if rows > 1 else 0
    tiles = (rows + ROWS - 1) // ROWS
    w, w_row = weight.ctypes.data, weight.strides[0]
    first, x_row = x.ctypes.data, x.strides[0]
    found, out_row = out.ctypes.data, out.strides[0]
    for o in range(0, whole, OUTPUTS):
        begin = 0
        for tile in range(tiles):
            end = rows * (tile + 1) // tiles
            _tile(
                weight[0, 0],
                end - begin,
                1 if tile == 0 else 0,
                w + o * w_row,
                w_row,
                first + begin * x_row,
                x_row,
                x.shape[1],
                found + begin * out_row + 4 * o,
                out_row,
            )
            begin = end
    for row in range(rows):
        _multiply_row(x[row], weight[whole:], out[row, whole:])
    if bias.shape[0]:
        for row in range(rows):
            for o in range(outputs):
                out[row, o] += bias[o]
