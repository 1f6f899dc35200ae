"""What a thread of the Mosaic kernel does in its own registers: PTX and addresses, for which Pallas has no words.

The tensor core takes its left operand, 64 rows of 16-bit floats, from the registers of 128 threads. Thread t has row
16 (t // 32) + (t % 32) // 4 and the row eight below, and of every eight columns 2 q and 2 q + 1, q = t % 4, in one
register. The float32 sums lie in the same way.

Each function has a second form, of arrays, for Pallas' simulator (`simulated`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.quantized_matmul import packed, upcast
from pallas_kernels.quantized_matmul.elements import Element

HEIGHT = 64
LAYOUT = plgpu.Layout.WGMMA
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
_NUMBER = plgpu.Layout.WG_SPLAT(())


# --- the left operand ---


def pairs(e: Element) -> list[tuple[int, int]]:
    """Which two codes of a word of 32 bits come into each register of its upcast (`packed`)."""
    lanes = 16 // e.bits
    if e.kind == "table":
        return [(4 * word + 2 * half, 4 * word + 2 * half + 1) for half in range(2) for word in range(2)]
    return [(lane, lanes + lane) for lane in range(lanes)]


def order(e: Element, unit: int) -> np.ndarray:
    """Which code of a unit each column of the left operand is: int `[unit]`.

    Thread q has words of 32 bits in a row, of a quarter of the unit. Its registers, in the order of words and `pairs`,
    are columns 2 q and 2 q + 1 of the first, second, ... eight columns.
    """
    run = unit // 4
    word = 32 // e.bits
    two = np.array([[i * word + a, i * word + b] for i in range(run // word) for a, b in pairs(e)])
    return (np.arange(4)[None, :, None] * run + two[:, None, :]).reshape(unit)


def left(codes: Any, u: int, e: Element, unit: int, offset: Any, dtype: Any, simulated: bool) -> Any:
    """Unit `u` of a stage of codes in shared memory, `[64, unit]`, columns in `order`, as floats of `dtype`.

    Args:
      codes: uint8 `[64, bytes]`.
      offset: what `offsets` gave, for codes with zero points; else None.
    """
    if simulated:
        return _left_of_arrays(codes[:, pl.ds(u * unit * e.bits // 8, unit * e.bits // 8)], e, offset, dtype)
    unit_bytes = unit * e.bits // 8
    offsets = [] if offset is None else [offset]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType((plgpu.TilingTransform((HEIGHT, unit_bytes)),)), *([OF_ROWS] * len(offsets))),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, unit), dtype, layout=LAYOUT),
    )
    def run(ctx: Any, ref: Any, *offset: Any) -> Any:
        row, q = _place()
        words = unit_bytes // 16
        out = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((HEIGHT, unit)), dtype=object)
        two = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        for below in range(2):
            at = _sum(_times(_sum(row, 8 * below), unit_bytes), _times(q, 4 * words), u * HEIGHT * unit_bytes)
            loaded = llvm.load(ir.VectorType.get((words,), _int(32)), _at(ref, at))
            zero = [_item(offset[0].registers.flat[below], 0)] if offset else []
            found = [r for i in range(words) for r in _upcast(_item(loaded, i), e, zero, dtype)]
            for eight, register in enumerate(found):
                out[0, eight, 0, 0, below, 0, 0, 0, 0] = vector.bitcast(two, _vector(register))
        return mgpu.FragmentedArray(_registers=out, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return run(codes, *offsets)


def _upcast(word: ir.Value, e: Element, zero: list[ir.Value], dtype: Any) -> list[ir.Value]:
    """The registers of one word, in the order of `pairs`."""
    lanes = range(16 // e.bits)
    if e.kind == "int":
        return [_asm(packed.int_asm(e.bits, lane, not zero, dtype), [word, *zero]) for lane in lanes]
    if e.kind == "float":
        return [_asm(packed.float_asm(e, lane, dtype), [word]) for lane in lanes]
    both = llvm.StructType.get_literal([_int(32)] * 2)
    halves = [_asm(packed.table_asm(e.table, half, dtype), [word], both, 2) for half in range(2)]
    return [llvm.extractvalue(_int(32), h, [j]) for h in halves for j in range(2)]


def _left_of_arrays(codes: jax.Array, e: Element, offset: Any, dtype: Any) -> jax.Array:
    lanes = 8 // e.bits
    parts = [(codes >> np.uint8(e.bits * i)) & np.uint8(2**e.bits - 1) for i in range(lanes)]
    whole = jnp.stack(parts, -1).reshape(HEIGHT, -1).astype(jnp.uint16)
    if e.kind == "int" and offset is not None:
        numbers = upcast.integers(whole, e.bits, offset[:, None].astype(dtype), dtype)
    elif e.kind == "int":
        numbers = upcast.integers(whole, e.bits, None, dtype)
    elif e.kind == "float":
        numbers = upcast.small_floats(whole, e, dtype)
    else:
        numbers = upcast.table(whole, e.table, dtype)
    unit = numbers.shape[1]
    at = order(e, unit)
    return jnp.concatenate([numbers[:, c : c + 1] for c in at], axis=1)


# --- the right operand ---


def arrange(x: Any, e: Element, unit: int, simulated: bool) -> None:
    """Activations `[rows, stage]` in shared memory, columns of every unit brought into `order`.

    Each thread moves eight of one row that lie in a thread's run of codes; those of a unit are in the same warp, which
    reads all of them before it writes.
    """
    rows, stage = x.shape
    if simulated:
        at = np.concatenate([u * unit + order(e, unit) for u in range(stage // unit)])
        now = x[...]
        x[...] = jnp.concatenate([now[:, c : c + 1] for c in at], axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))),))
    def run(ctx: Any, ref: Any) -> None:
        thread = _thread()
        each = stage // 8  # eights of a row
        moved = []
        for turn in range(-(-rows * each // 128)):
            item = _sum(thread, 128 * turn)
            row, eight = arith.divui(item, _i32(each)), arith.remui(item, _i32(each))
            at = _of_activation(row, _times(eight, 8), stage)
            loaded = llvm.load(ir.VectorType.get((4,), _int(32)), _at(ref, at))
            moved.append((row, eight, [_item(loaded, i) for i in range(4)]))
        mgpu.utils.warp_barrier()
        for row, eight, four in moved:
            in_unit = arith.remui(eight, _i32(unit // 8))
            q, v = arith.divui(in_unit, _i32(unit // 32)), arith.remui(in_unit, _i32(unit // 32))
            unit_begins = _times(arith.divui(eight, _i32(unit // 8)), unit)
            for n, (low, high) in enumerate(_pairs_of_eight(e)):
                two = _asm(f"prmt.b32 $0, $1, $2, {_halves(low, high)};", [four[low // 2], four[high // 2]])
                # Registers of the eight before, eight columns each, and of these the ones of this thread.
                column = _sum(unit_begins, _times(v, 8 * len(_pairs_of_eight(e))), 8 * n, _times(q, 2))
                llvm.store(two, _at(ref, _of_activation(row, column, stage)))

    assert (rows * stage // 8) % 128 == 0
    run(x)


def _pairs_of_eight(e: Element) -> list[tuple[int, int]]:
    """`pairs` of the words of eight codes, in the order of registers."""
    word = 32 // e.bits
    return [(i + a, i + b) for i in range(0, 8, word) for a, b in pairs(e)]


def _halves(low: int, high: int) -> str:
    """The selector that puts the half of `low` in its register, and that of `high`, into one register."""
    a, b = 2 * (low % 2), 4 + 2 * (high % 2)
    return f"0x{b + 1}{b}{a + 1}{a}"


def _of_activation(row: ir.Value, column: ir.Value, stage: int) -> ir.Value:
    """Where an activation of `[rows, stage]` lies, in bytes: in tiles of 8 x 64, 16 bytes exchanged within 128."""
    tile = _sum(_times(arith.divui(row, _i32(8)), stage // 64), arith.divui(column, _i32(64)))
    low = arith.remui(row, _i32(8))
    inner = arith.xori(_times(arith.remui(column, _i32(64)), 2), _times(low, 16))
    return _sum(_times(tile, 1024), _times(low, 128), inner)


# --- parameters of rows ---


def scales(ref: Any, tile: Any, block: Any, simulated: bool) -> Any:
    """float32 `[64]`: the scales of rows, for one group; those of the last row and group behind them."""
    return _of_rows(ref, tile, block, simulated, jnp.float32, lambda a: a.astype(jnp.float32), _to_float32)


def offsets(ref: Any, tile: Any, block: Any, dtype: Any, simulated: bool) -> Any:
    """int32 `[64]`: what is added to codes that are the mantissas of 128 (bfloat16) or 1024, twice in a register."""
    magic = upcast.MAGIC[jnp.dtype(dtype).name][0]

    def bits(zero: ir.Value) -> ir.Value:  # - (128 + zero)
        both = arith.muli(arith.extui(_int(32), zero), _i32(0x10001))
        return arith.ori(both, _i32(((magic | 0x8000) * 0x10001) - (1 << 32)))

    return _of_rows(ref, tile, block, simulated, jnp.int32, lambda a: a.astype(jnp.int32), bits)


def _of_rows(ref: Any, tile: Any, block: Any, simulated: bool, dtype: Any, of_array: Any, of_register: Any) -> Any:
    rows, blocks = ref.shape
    if simulated:
        found = ref[pl.ds(tile * HEIGHT, HEIGHT), pl.ds(jnp.minimum(block, blocks - 1), 1)]
        return of_array(found[:, 0])
    stored, size = ref.dtype, jnp.dtype(ref.dtype).itemsize

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _NUMBER, _NUMBER),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT,), dtype, layout=OF_ROWS),
    )
    def run(ctx: Any, ref: Any, tile: Any, block: Any) -> Any:
        first, _ = _place()
        column = arith.minsi(block.registers.item(), _i32(blocks - 1))
        out = np.empty(OF_ROWS.to_mgpu().registers_shape((HEIGHT,)), dtype=object)
        for below in range(2):
            row = arith.minsi(_sum(_times(tile.registers.item(), HEIGHT), first, 8 * below), _i32(rows - 1))
            at = _times(_sum(_times(row, blocks), column), size)
            out.flat[below] = _vector(of_register(llvm.load(mgpu.utils.dtype_to_ir_type(stored), _at(ref, at))))
        signed = True if dtype == jnp.int32 else None
        return mgpu.FragmentedArray(_registers=out, _layout=OF_ROWS.to_mgpu(), _is_signed=signed)

    return run(ref, jnp.int32(tile), jnp.int32(block))


def _to_float32(value: ir.Value) -> ir.Value:
    f32 = ir.F32Type.get()
    return value if value.type == f32 else arith.extf(f32, value)


# --- sums ---


def shape_of_sums(rows: int, simulated: bool) -> tuple[int, int]:
    """Of the place in shared memory where a warpgroup leaves its sums."""
    return (HEIGHT, rows) if simulated else (rows // 2, 128)


def leave(acc: Any, place: Any, simulated: bool) -> None:
    """Writes float32 sums `[64, rows]` into shared memory: every thread its own."""
    if simulated:
        place[...] = acc
        return

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType()))
    def run(ctx: Any, acc: Any, ref: Any) -> None:
        for j, register in enumerate(acc.registers.flat):
            for i in range(2):
                llvm.store(_item(register, i), _at(ref, _own(2 * j + i)))

    run(acc, place)


def take(acc: Any, place: Any, simulated: bool) -> Any:
    """The sums, and those that another warpgroup left."""
    if simulated:
        return acc + place[...]

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=LAYOUT),
    )
    def run(ctx: Any, acc: Any, ref: Any) -> Any:
        out = acc.registers.copy()
        for j, register in enumerate(acc.registers.flat):
            for i in range(2):
                more = arith.addf(_item(register, i), llvm.load(ir.F32Type.get(), _at(ref, _own(2 * j + i))))
                register = vector.insert(more, register, dynamic_position=[], static_position=[i])
            out.flat[j] = register
        return mgpu.FragmentedArray(_registers=out, _layout=acc.layout, _is_signed=None)

    return run(acc, place)


def _own(j: int) -> ir.Value:
    """Where the sum number `j` of a thread lies: those of all threads side by side."""
    return _sum(_times(_thread(), 4), 512 * j)


def store(acc: Any, out: Any, tile: Any, part: Any, simulated: bool) -> None:
    """Writes sums `[64, rows]` to `[parts, m, n]`, transposed; nothing beyond the last row or column."""
    if simulated:
        out[part, :, pl.ds(tile * HEIGHT, HEIGHT)] = lax.transpose(acc, (1, 0)).astype(out.dtype)
        return
    _, m, n = out.shape
    dtype, size = out.dtype, jnp.dtype(out.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType(), _NUMBER, _NUMBER))
    def run(ctx: Any, acc: Any, ref: Any, tile: Any, part: Any) -> None:
        first, q = _place()
        stored = mgpu.utils.dtype_to_ir_type(dtype)
        whole = _times(part.registers.item(), m * n * size)
        for index in np.ndindex(*acc.registers.shape):
            eight, below = index[1], index[4]
            column = _sum(_times(tile.registers.item(), HEIGHT), first, 8 * below)
            for i in range(2):
                row = _sum(_times(q, 2), 8 * eight + i)
                value = _item(acc.registers[index], i)
                value = value if value.type == stored else arith.truncf(stored, value)
                less = arith.CmpIPredicate.slt
                inside = arith.andi(arith.cmpi(less, column, _i32(n)), arith.cmpi(less, row, _i32(m)))
                with mgpu.utils.when(inside):
                    llvm.store(value, _at(ref, _sum(whole, _times(_sum(_times(row, n), column), size))))

    run(acc, out, jnp.int32(tile), jnp.int32(part))


# --- short words for MLIR ---


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _i32(n: int) -> ir.Value:
    return mgpu.c(n, _int(32))


def _sum(*terms: Any) -> ir.Value:
    first, *rest = [t if isinstance(t, ir.Value) else _i32(t) for t in terms]
    for term in rest:
        first = arith.addi(first, term)
    return first


def _times(a: Any, n: int) -> ir.Value:
    return arith.muli(a, _i32(n))


def _item(v: ir.Value, i: int) -> ir.Value:
    return vector.extract(v, dynamic_position=[], static_position=[i])


def _vector(v: ir.Value) -> ir.Value:
    return vector.broadcast(ir.VectorType.get((1,), v.type), v)


def _asm(text: str, args: list[ir.Value], result: Any = None, outs: int = 1) -> Any:
    """Inline PTX without effects."""
    constraints = ",".join(["=r"] * outs + ["r"] * len(args))
    return llvm.inline_asm(result or _int(32), args, text, constraints, asm_dialect=0, has_side_effects=False)


def _thread() -> ir.Value:
    """The number of a thread in its warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), _i32(128))


def _place() -> tuple[ir.Value, ir.Value]:
    """The first of a thread's rows, and which of the four threads of that row it is."""
    lane, warp = arith.remui(_thread(), _i32(32)), arith.divui(_thread(), _i32(32))
    return _sum(_times(warp, 16), arith.divui(lane, _i32(4))), arith.remui(lane, _i32(4))


def _at(ref: ir.Value, offset: ir.Value) -> ir.Value:
    """A pointer `offset` bytes behind the beginning of a reference."""
    base = mgpu.utils.memref_ptr(ref)
    return llvm.getelementptr(base.type, base, [offset], [-(2**31)], _int(8), llvm.GEPNoWrapFlags.none)
