"""Codes to floats two and four at a time, by inline PTX: what `upcast` calculates.

A register holds two 16-bit floats. Two words of codes are upcast in one register, lane by lane:

    integers   shift, mask and magic bits (one lop3), a fused multiply-add that takes the offset away
    floats     shift and mask twice (sign, and the rest at its place), a multiplication by a power of two
    tables     bytes are looked up by `prmt`, four codes at a time: eight entries by one, sixteen by two and a select

No interpreter runs PTX. What is tested anywhere is the text, instruction by instruction; kernels that have it ran
their tests on a GPU (benchmarks/results/kernels-h100.md).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.quantized_matmul.elements import Element
from pallas_kernels.quantized_matmul.upcast import MAGIC

_KIND = {"bfloat16": "bf16x2", "float16": "f16x2"}
_MANTISSA = {"bfloat16": 7, "float16": 10}


def _twice(bits: int) -> str:
    """A number of 16 bits in both halves of a register."""
    return f"0x{int(bits) * 0x10001:08x}"


def _bits(number: float, dtype: jnp.dtype) -> int:
    return int(np.asarray(number, np.float32).astype(jnp.dtype(dtype)).view(np.uint16))


def _text(registers: str, lines: list[str]) -> str:
    return "{ " + "; ".join([f".reg .b32 {registers}", *lines]) + "; }"


def can(words: tuple[jax.Array, ...], e: Element, zeros: Sequence[jax.Array | None], dtype: jnp.dtype) -> bool:
    """Whether `values` has an upcast for these words, as a kernel has loaded them."""
    exact = all(zero is None or zero.dtype == dtype for zero in zeros)
    if len(words) > 1 or jnp.dtype(dtype).name not in _KIND or not exact:
        return False
    pairs = words[0].dtype == jnp.uint16 and words[0].shape[-1] % 2 == 0
    if e.kind == "int":
        signed = all(zero is None for zero in zeros)
        return pairs and (e.bits in (2, 4) or (e.bits == 8 and (signed or jnp.dtype(dtype).name == "float16")))
    if e.kind == "float":  # the infinities of e5m2 are none of a bfloat16 multiplied
        whole = words[0].dtype == jnp.uint8 and words[0].shape[-1] % 4 == 0
        return (pairs and e.bits == 4) or ((pairs or whole) and e.bits == 8 and e.mantissa == 3)
    return pairs and len(e.table) == 16


def values(words: jax.Array, e: Element, zeros: Sequence[jax.Array | None], dtype: jnp.dtype) -> list[jax.Array]:
    """The elements of every lane, as `upcast.integers`, `small_floats` and `table` give them: on a GPU only.

    Args:
      words: uint16, or uint8 with one code each; an even number (of bytes: four) along the last axis.
      e: what a code stands for.
      zeros: of integers, for each lane one of the codes, in `dtype`, broadcasting against the words; or None, for
        two's complement.
      dtype: bfloat16 or float16.
    """
    lanes = words.dtype.itemsize * 8 // e.bits
    if e.kind == "table":
        return [
            o for half in range(2) for o in _halves(_run(table_asm(e.table, half, dtype), [words], jnp.int32), dtype)
        ]
    if e.kind == "float":
        if lanes == 1:
            return [_run(bytes_asm(e, dtype), [words], dtype, pack=4)]
        return [_run(float_asm(e, lane, dtype), [words], dtype) for lane in range(lanes)]
    magic = MAGIC[jnp.dtype(dtype).name][1]
    out = []
    for lane, zero in enumerate(zeros):
        offset = [] if zero is None else [jnp.broadcast_to(jnp.asarray(-magic, dtype) - zero, words.shape)]
        out.append(_run(int_asm(e.bits, lane, zero is None, dtype), [words, *offset], dtype))
    return out


def _run(text: str, args: list[jax.Array], dtype: jnp.dtype, pack: int = 2) -> jax.Array:
    """`pack` elements of each argument lie in a register of 32 bits, and so do those of the result, or in several."""
    registers = pack * jnp.dtype(dtype).itemsize // 4
    [out] = plt.elementwise_inline_asm(
        text,
        args=args,
        constraints=",".join(["=r"] * registers + ["r"] * len(args)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return out


def _halves(pairs: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """The two 16-bit floats of each int32 (Pallas has no unsigned results of inline PTX), the lower one first."""
    pairs = lax.bitcast_convert_type(pairs, jnp.uint32)
    low, high = pairs.astype(jnp.uint16), (pairs >> np.uint32(16)).astype(jnp.uint16)
    return [lax.bitcast_convert_type(part, dtype) for part in (low, high)]


def int_asm(bits: int, lane: int, signed: bool, dtype: jnp.dtype) -> str:
    """`upcast.integers` of lane `lane` of two 16-bit words: three instructions.

    $0 is the two floats, $1 the two words, and without `signed` $2 the two offsets that are added: less the zero point
    and less 128 (bfloat16) or 1024 (float16).
    """
    magic, value = MAGIC[jnp.dtype(dtype).name]
    half = 2 ** (bits - 1)
    if 2**bits > value:  # a byte does not fit beside the bits of 128: less 128 or 256, as its sign is
        return _text(
            "t, u, minus",
            [
                f"shr.b32 t, $1, {lane * bits}",
                f"and.b32 u, t, {_twice(half)}",
                f"or.b32 u, u, {_twice(magic)}",
                f"and.b32 t, t, {_twice(half - 1)}",
                f"or.b32 t, t, {_twice(magic)}",
                f"mov.b32 minus, {_twice(_bits(-1.0, dtype))}",
                f"fma.rn.{_KIND[jnp.dtype(dtype).name]} $0, u, minus, t",
            ],
        )
    return _text(
        "t, one, offset",
        [
            f"shr.b32 t, $1, {lane * bits}",
            f"and.b32 t, t, {_twice(2**bits - 1)}",
            f"xor.b32 t, t, {_twice(magic + half if signed else magic)}",  # with the `and` before it one lop3
            f"mov.b32 one, {_twice(_bits(1.0, dtype))}",
            f"mov.b32 offset, {_twice(_bits(-value - half, dtype)) if signed else '$2'}",
            f"fma.rn.{_KIND[jnp.dtype(dtype).name]} $0, t, one, offset",  # capability 8.0 has no sum of two bfloat16
        ],
    )


def _float_lines(e: Element, source: str, place: int, out: str, dtype: jnp.dtype) -> list[str]:
    """Two floats whose codes begin at bit `place` of each half of `source`."""
    name = jnp.dtype(dtype).name
    low = _MANTISSA[name] - e.mantissa
    size, move, up = 2 ** (e.bits - 1) - 1, low - place, 15 - (place + e.bits - 1)
    lines = [
        f"{'shl' if move > 0 else 'shr'}.b32 t, {source}, {abs(move)}",
        f"and.b32 t, t, {_twice(size << low)}",
        f"shl.b32 s, {source}, {up}",
        f"and.b32 s, s, {_twice(0x8000)}",
        f"or.b32 {out if name == 'float16' else 't'}, t, s",
    ]
    if name == "float16":
        return lines
    # The unit is that of float16: `upcast.small_float_unit`. Less than the least normal number is exact too.
    return [*lines, f"mov.b32 s, {_twice(_bits(2.0**112, dtype))}", f"mov.b32 none, {_twice(0x8000)}",
            f"fma.rn.{_KIND[name]} {out}, t, s, none"]  # fmt: skip


def float_asm(e: Element, lane: int, dtype: jnp.dtype) -> str:
    """`upcast.small_floats` of lane `lane` of two 16-bit words. $0 is the two floats, $1 the two words."""
    return _text("t, s, none", _float_lines(e, "$1", lane * e.bits, "$0", dtype))


def bytes_asm(e: Element, dtype: jnp.dtype) -> str:
    """`upcast.small_floats` of four bytes. $0 and $1 are the floats of the first and the last two, $2 the bytes."""
    lines = []
    for out, selector in (("$0", "0x1404"), ("$1", "0x3424")):  # a byte in the upper half of each 16 bits
        lines += [f"prmt.b32 b, $2, 0, {selector}", *_float_lines(e, "b", 8, out, dtype)]
    return _text("b, t, s, none", lines)


def table_asm(entries: tuple[float, ...], half: int, dtype: jnp.dtype) -> str:
    """`upcast.table` of 16 entries for lanes 2 `half` and 2 `half` + 1 of two 16-bit words.

    $0 is the two floats of the first word, $1 those of the second, $2 the two words. (Pallas has no inline PTX with
    results for all lanes.)
    """
    bits = np.asarray(entries, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    lines = []
    for part, numbers in (("l", bits & 0xFF), ("h", bits >> 8)):
        for i in range(4):
            word = sum(int(b) << (8 * j) for j, b in enumerate(numbers[4 * i : 4 * i + 4]))
            lines.append(f"mov.b32 {part}{i}, 0x{word:08x}")
    lines += [
        f"prmt.b32 w, $2, 0, {('0x4420', '0x4431')[half]}",  # the byte of each word: four codes
        "and.b32 s, w, 0x7777",  # the last three bits of each code: which of eight bytes
        "shl.b32 a, w, 4",
        "prmt.b32 m, a, w, 0xd9c8",  # the first bit of each code, all over a byte
    ]
    for part, out in (("l", "lo"), ("h", "hi")):
        lines += [
            f"prmt.b32 x, {part}2, {part}3, s",
            f"prmt.b32 y, {part}0, {part}1, s",
            f"lop3.b32 {out}, x, y, m, 0xe4",  # m ? x : y
        ]
    lines += ["prmt.b32 $0, lo, hi, 0x5140", "prmt.b32 $1, lo, hi, 0x7362"]
    return _text("w, a, s, m, x, y, lo, hi, l0, l1, l2, l3, h0, h1, h2, h3", lines)
