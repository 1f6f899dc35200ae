"""Scales as they are stored: powers of two, 8-bit floats, and a second level of scales for the scales.

Scales are arrays `[..., M, blocks]`, M rows of tiles (rows of the weight, where a tile has one). The second level,
`outer`, is one of

    ()                     none
    (scale,)               value = stored * scale              e4m3 scales: NVFP4's global scale
    (scale, offset)        value = (stored + offset) * scale   uint8 scales: double quantization

each `[..., outer rows, outer blocks]`. The offset is an integer: so a block of zeros keeps the scale 0 exactly, and no
sum of products is rounded differently in another program. QLoRA (arXiv 2305.14314) subtracts the mean of the scales
and stores the rest in 8 bits; here 8 bits span the range from the smallest to the largest scale of an outer block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jquant.core.elements import ELEMENTS
from jquant.core.format_type import Format

Outer = tuple[jax.Array, ...]

# Where the largest scale of a tensor is mapped to. With "four over six" the block with the largest numbers may ask for
# a scale 1.5 times its own, and 256 * 1.5 is an e4m3 number within the range.
_E4M3_TOP, _E4M3_TOP_FOUR_OVER_SIX = 448.0, 256.0
_E4M3_SMALLEST = 2.0**-9
_OFFSET_TOP = 2.0**15  # steps from zero to the largest of a block of scales, at most: below float32's 2**24


def safe(scale: jax.Array) -> jax.Array:
    """The scale, with 1 for 0: a zero block decodes to zeros, and must not divide by them."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def spread_rows(a: jax.Array, rows: int, count: int) -> jax.Array:
    """Repeats every row: `[..., ceil(count / rows), x]` -> `[..., count, x]`."""
    if rows == 1 or a.ndim < 2:
        return a
    out = jnp.broadcast_to(a[..., None, :], (*a.shape[:-1], rows, a.shape[-1]))
    return out.reshape(*a.shape[:-2], a.shape[-2] * rows, a.shape[-1])[..., :count, :]


def spread_outer(a: jax.Array, fmt: Format, shape: tuple[int, ...]) -> jax.Array:
    """A second-level array for scales of `shape`, broadcasting against them."""
    if not isinstance(fmt.outer_block, int):
        return a
    count, blocks = shape[-2:] if len(shape) > 1 else (1, shape[-1])
    if blocks > fmt.outer_block:
        wide = jnp.broadcast_to(a[..., None], (*a.shape, fmt.outer_block))
        return wide.reshape(*a.shape[:-1], -1)[..., :blocks]
    return spread_rows(a, fmt.outer_rows(blocks), count)


def scale_values(scale: jax.Array, outer: Outer, fmt: Format) -> jax.Array:
    """The numbers that stored scales stand for, float32, their shape."""
    values = scale.astype(jnp.float32)
    if not outer:
        return values
    spread = [spread_outer(a.astype(jnp.float32), fmt, scale.shape) for a in outer]
    if len(spread) == 2:
        values = values + spread[1]
    return values * spread[0]


def choose_outer(ideal: jax.Array, fmt: Format, stacked: int = 0) -> Outer:
    """The second level for scales that should be `ideal` (float32 `[..., M, blocks]`, none negative).

    Args:
      ideal: what the scales should be.
      fmt: the format.
      stacked: how many leading axes hold separate tensors.
    """
    if fmt.outer_block is None:
        return ()
    high = _reduce_outer(ideal, jnp.max, fmt, stacked)
    if fmt.scale_dtype != "uint8":
        top = _E4M3_TOP_FOUR_OVER_SIX if fmt.four_over_six else _E4M3_TOP
        return (high * (1 / top),)
    low = _reduce_outer(ideal, jnp.min, fmt, stacked)
    step = jnp.maximum((high - low) * (1 / 255), high * (1 / _OFFSET_TOP))
    return step, jnp.round(low * (1 / safe(step))).astype(jnp.uint16)


def _reduce_outer(ideal: jax.Array, how: Callable[..., jax.Array], fmt: Format, stacked: int) -> jax.Array:
    how = partial(how, keepdims=True)
    if ideal.size == 0:
        how = partial(how, initial=0.0)
    if fmt.outer_block == "tensor":
        return how(ideal, axis=tuple(range(stacked, ideal.ndim)))
    if fmt.outer_block == "channel":
        return how(ideal, axis=-1)
    assert isinstance(fmt.outer_block, int)
    blocks = ideal.shape[-1]
    if blocks > fmt.outer_block:
        return how(_split(ideal, -1, fmt.outer_block), axis=-1)[..., 0]
    ideal = how(ideal, axis=-1)
    return ideal if ideal.ndim < 2 else how(_split(ideal, -2, fmt.outer_rows(blocks)), axis=-2)[..., 0, :]


def _split(a: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts an axis into parts, `[.., n / size, size, ..]`, the last filled up with copies of its end."""
    axis %= a.ndim
    if pad := -a.shape[axis] % size:
        mode = "edge" if a.size else "constant"
        a = jnp.pad(a, [(0, pad if i == axis else 0) for i in range(a.ndim)], mode=mode)
    return a.reshape(*a.shape[:axis], a.shape[axis] // size, size, *a.shape[axis + 1 :])


def store_scale(ideal: jax.Array, top: jax.Array, fmt: Format, outer: Outer) -> jax.Array:
    """Scales in the dtype of the format.

    Args:
      ideal: what they should be, float32 `[..., M, blocks]`.
      top: the largest absolute value of every block, from which powers of two are chosen.
      fmt: the format.
      outer: the second level that was chosen.
    """
    if fmt.scale_dtype == "float8_e8m0fnu":
        return _power_of_two(top, fmt)
    if outer:
        ideal_of_outer = ideal * (1 / safe(spread_outer(outer[0], fmt, ideal.shape)))
        if fmt.scale_dtype == "uint8":
            return _store_uint8(ideal, ideal_of_outer, spread_outer(outer[1], fmt, ideal.shape))
        ideal = ideal_of_outer
    # Beyond the largest number of the dtype, that number: an infinite scale would decode a zero code to NaN.
    largest = float(jnp.finfo(fmt.scale_dtype).max)
    stored = jnp.where(jnp.isinf(ideal), ideal, jnp.minimum(ideal, largest))
    if fmt.scale_dtype == "float8_e4m3fn":  # 2**-10 rounds to zero, and a block that is not zero needs a scale
        stored = jnp.where(stored > 0, jnp.maximum(stored, _E4M3_SMALLEST), stored)
    return stored.astype(fmt.scale_dtype)


def _store_uint8(ideal: jax.Array, ideal_of_outer: jax.Array, offset: jax.Array) -> jax.Array:
    offset = offset.astype(jnp.float32)
    code = jnp.clip(jnp.round(ideal_of_outer) - offset, 0, 255)
    return jnp.where((ideal > 0) & (offset == 0), jnp.maximum(code, 1), code).astype(jnp.uint8)


def _power_of_two(top: jax.Array, fmt: Format) -> jax.Array:
    """e8m0 scales for blocks whose largest absolute value is `top`, between 2**-126 and 2**126: their reciprocals are
    normal numbers too. A zero block gets the smallest."""
    element = ELEMENTS[fmt.element]
    bits = jax.lax.bitcast_convert_type(top, jnp.int32)
    if fmt.scale_rule == "even":
        bits = bits + (1 << (22 - element.mantissa))
    exponent = jnp.clip((bits >> 23) - element.top_exponent, 1, 253)
    if fmt.scale_rule == "ceil":
        power = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
        exponent = jnp.where(top > element.top * power, jnp.minimum(exponent + 1, 253), exponent)
    exponent = jnp.where(jnp.isfinite(top), exponent, 255)  # NaN
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu)
