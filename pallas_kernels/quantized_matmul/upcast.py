"""Codes to floats by moving bits: what a kernel does to each element, as functions of arrays.

A 16-bit float with a fixed exponent counts in its mantissa: the bits of 128 or'ed with u (0 <= u < 128) are the
bfloat16 128 + u, those of 1024 with u (u < 1024) the float16 1024 + u. So an upcast is an `or` and a subtraction,
exact, and the zero point (or the shift of two's complement) comes with the subtraction. A small float is a float16
whose bits are put in their places, up to a power of two, subnormal numbers included.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul.elements import ELEMENTS, Element, plane_widths

MAGIC = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}  # bits, value


def lanes(bits: int, word_bytes: int = 1) -> int:
    """Codes that lie in one word of every plane: as many as `word_bytes` of the narrowest plane hold."""
    return 8 * word_bytes // plane_widths(bits)[-1]


def lane_codes(words: tuple[jax.Array, ...], bits: int, lane: int) -> jax.Array:
    """The codes number `lane` of each word, uint16: `words` has one array for each plane, uint8, uint16 or uint32.

    The word of a plane of width w holds the same number of parts of w bits as that of every other plane.
    """
    out, left = None, bits
    for width, word in zip(plane_widths(bits), words, strict=True):
        left -= width
        shift, part = lane * width, word
        if word.dtype.itemsize * 8 > width:
            part = word >> np.asarray(shift, word.dtype)
            if shift + width < word.dtype.itemsize * 8:
                part = part & np.asarray(2**width - 1, word.dtype)
        part = part.astype(jnp.uint16) << np.uint16(left) if left else part.astype(jnp.uint16)
        out = part if out is None else out | part
    assert out is not None
    return out


def integers(codes: jax.Array, bits: int, zero: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Codes of integers as floats, less the zero point; exact where the zero point is one of the codes.

    Args:
      codes: uint16.
      bits: of a code.
      zero: the zero point, broadcasting against `codes`, float of `dtype` for integers, float32 for numbers between
        them; None for codes in two's complement.
      dtype: bfloat16 or float16.
    """
    magic, value = MAGIC[jnp.dtype(dtype).name]
    half = 2 ** (bits - 1)
    if zero is not None and zero.dtype == jnp.float32:
        return (codes.astype(jnp.float32) - zero).astype(dtype)
    if 2**bits > value:  # a byte does not fit beside the bits of 128
        return _bytes_to_bfloat16(codes, zero)
    if zero is None:
        codes, offset = codes ^ np.uint16(half), jnp.asarray(value + half, dtype)
    else:
        offset = zero + jnp.asarray(value, dtype)
    return lax.bitcast_convert_type(codes | np.uint16(magic), dtype) - offset


def _bytes_to_bfloat16(codes: jax.Array, zero: jax.Array | None) -> jax.Array:
    if zero is None:
        return codes.astype(jnp.int8).astype(jnp.bfloat16)
    return codes.astype(jnp.float32).astype(jnp.bfloat16) - zero


def small_floats(codes: jax.Array, e: Element, dtype: jnp.dtype) -> jax.Array:
    """Codes of floats of 4, 6 or 8 bits, times `small_float_unit(e)`. The NaN of e4m3 reads as 480.

    Args:
      codes: uint16.
      e: the element.
      dtype: bfloat16 or float16.
    """
    size = (codes & np.uint16(2 ** (e.bits - 1) - 1)) << np.uint16(10 - e.mantissa)
    sign = (codes >> np.uint16(e.bits - 1)) << np.uint16(15)
    half = lax.bitcast_convert_type(size | sign, jnp.float16)
    return half if dtype == jnp.float16 else half.astype(jnp.float32).astype(dtype)


def small_float_unit(e: Element) -> float:
    """The power of two that `small_floats` leaves in its result."""
    return 2.0 ** (e.bias - 15)


def table(codes: jax.Array, values: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """The entries of a table of 2**b values, by b levels of selects: no memory is read."""
    level = [jnp.asarray(v, dtype) for v in values]
    bit = 1
    while len(level) > 1:
        odd = (codes & np.uint16(bit)) != np.uint16(0)
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2])]
        bit *= 2
    return level[0]


@functools.cache
def odd_polynomial(values: tuple[float, ...]) -> tuple[float, ...] | None:
    """Coefficients of x, x^3, x^5, ... that give a table's values at x = code - (n - 1) / 2, each to 2^-12 of itself.

    The fewest by (weighted) least squares. None where the table is small, not symmetric about zero, or no
    smooth function.
    """
    v = np.asarray(values, np.float64)
    if len(v) < 16 or np.any(v == 0) or np.any(v != -v[::-1]):
        return None
    x = np.arange(len(v)) - (len(v) - 1) / 2
    for count in range(1, len(v) // 2):
        powers = x[:, None] ** (2 * np.arange(count) + 1)
        coefficients = np.linalg.lstsq(powers / np.abs(v)[:, None], np.sign(v), rcond=None)[0]
        if np.max(np.abs(powers @ coefficients / v - 1)) <= 2.0**-12:
            return tuple(float(c) for c in coefficients)
    return None


def polynomial(codes: jax.Array, coefficients: tuple[float, ...], bits: int, dtype: jnp.dtype) -> jax.Array:
    """`odd_polynomial` of codes below 2**bits: a third of the instructions that `table` takes for 16 values."""
    # The bits of 2**22 with twice the code are 2**22 + code.
    raised = (codes.astype(jnp.uint32) << np.uint32(1)) | np.uint32(0x4A800000)
    x = lax.bitcast_convert_type(raised, jnp.float32) - np.float32(2**22 + (2**bits - 1) / 2)
    square = x * x
    out = jnp.full_like(x, np.float32(coefficients[-1]))
    for c in coefficients[-2::-1]:
        out = out * square + np.float32(c)
    return (out * x).astype(dtype)


# --- words and scales ---


def as_words(planes: tuple[jax.Array, ...], bits: int, lanes: int) -> list[jax.Array]:
    """The planes as words of equal number, `lanes` codes each: a byte of the narrowest, 2 or 4 bytes of wider ones.

    Moves nothing.
    """

    def view(plane: jax.Array, width: int) -> jax.Array:
        size = width * lanes // 8
        if size == 1:
            return plane
        word = {2: jnp.uint16, 4: jnp.uint32}[size]
        return lax.bitcast_convert_type(plane.reshape(*plane.shape[:-1], -1, size), word)

    return [view(plane, width) for plane, width in zip(planes, plane_widths(bits), strict=True)]


def stored_scale(scale: jax.Array) -> jax.Array:
    """Scales of 8 bits as bytes: Triton has no such dtypes."""
    return lax.bitcast_convert_type(scale, jnp.uint8) if scale.dtype.itemsize == 1 else scale


def stored_zero(zero: jax.Array) -> jax.Array:
    """Zero points as a kernel reads them: bytes, or float32."""
    return zero if zero.dtype in (jnp.uint8, jnp.float32) else zero.astype(jnp.float32)


def scale_numbers(scale: jax.Array, stored: str, dtype: Any = jnp.float32) -> jax.Array:
    """Scales as numbers: float32 for sums; for elements `dtype`, where that holds them exactly, else float32."""
    if stored == "float8_e8m0fnu":
        if dtype == jnp.bfloat16:
            return lax.bitcast_convert_type(scale.astype(jnp.uint16) << np.uint16(7), jnp.bfloat16)
        return lax.bitcast_convert_type(scale.astype(jnp.uint32) << np.uint32(23), jnp.float32)
    if stored == "float8_e4m3fn":
        e = ELEMENTS["fp8_e4m3"]
        number = small_floats(scale.astype(jnp.uint16), e, jnp.float16).astype(jnp.float32)
        return (number * np.float32(1 / small_float_unit(e))).astype(dtype if dtype == jnp.bfloat16 else jnp.float32)
    return scale if scale.dtype == dtype else scale.astype(jnp.float32)


def times(w: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Elements times scales, rounded once to `dtype`."""
    if scale.dtype == dtype:
        return w * scale
    return (w.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)
