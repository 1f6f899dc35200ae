"""Vectors of keys or values to codes and back, by a `Coding`. Pure functions on arrays.

A `Store` holds what is stored of keys or values. X stands for rows: `[batch, kv_heads]`, or `[pages, kv_heads]` of a
pool. T positions, D head_dim, N tokens of a block:

    scales for a token and head     codes [X, T, packed D]   scale [X, T, groups]
    scales for a channel (N > 1)    codes [X, T, packed D]   scale [X, T / N, D]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import packing
from jquant.core.elements import search
from jquant.core.formats import (
    BlockParams,
    Format,
    block_extremes,
    block_params,
    decode,
    decode_codes,
    encode,
    reduce_blocks,
)
from jquant.kv_cache.format import Coding
from jquant.kv_cache.paging import blank
from jquant.solvers.rtn import search_params

_SEARCHED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# With zero points between the codes: of 16 normal numbers in 4 bits these three take a tenth off the squared error.
_SHIFTS = (0.0, 0.04, -0.04)


class Store(NamedTuple):
    """What is stored of keys or of values.

    Attributes:
      codes: the planes of `core.packing`, uint8; of floats one array of floats.
      scale: in the format's scale dtype, or None: floats, a static scale.
      zero_point: like `scale`, or None.
      static: float32 `[kv_heads]`, the scale that is given beforehand (`Coding.static`), or None.
    """

    codes: tuple[jax.Array, ...]
    scale: jax.Array | None
    zero_point: jax.Array | None
    static: jax.Array | None


def encode_vectors(x: jax.Array, coding: Coding, static: jax.Array | None) -> Store:
    """Encodes `x` `[.., kv_heads, T, D]`, already rotated; with blocks of tokens, T is a multiple of N."""
    if coding.is_float:
        return Store((x.astype(str(coding.format)),), None, None, static)
    x = x.astype(jnp.float32)
    if coding.tokens > 1:
        blocks = x.reshape(*x.shape[:-2], -1, coding.tokens, x.shape[-1]).swapaxes(-1, -2)  # [.., T / N, D, N]
        codes, scale, zero = _encode_rows(blocks, coding, static)
        codes = codes.swapaxes(-1, -2).reshape(x.shape)
        scale, zero = (None if a is None else a[..., 0] for a in (scale, zero))
    else:
        codes, scale, zero = _encode_rows(x, coding, static)
    return Store(packing.pack(codes, coding.bits), scale, zero, static)


def decode_vectors(store: Store, coding: Coding, dim: int) -> tuple[jax.Array, jax.Array | None]:
    """The inverse: float32 `[.., T, D]` and, where a token and head has one scale and nothing else, that scale
    `[.., T]`, which the vectors are still to be multiplied with: the products of attention do so on their results."""
    if coding.is_float:
        return _widened(store.codes[0]), None
    codes = packing.unpack(store.codes, coding.bits, dim)
    if isinstance(coding.format, str):
        assert store.scale is not None
        return jnp.asarray(lloyd_max(coding.bits), jnp.float32)[codes], store.scale[..., 0].astype(jnp.float32)
    fmt = coding.format
    if coding.tokens > 1:
        spread = lambda a: jnp.repeat(a.astype(jnp.float32), coding.tokens, axis=-2)
        values = decode_codes(codes, fmt)
        values = values if store.zero_point is None else values - spread(store.zero_point)
        return values * spread(store.scale), None
    if fmt.symmetric and fmt.block == "channel" and fmt.outer_block is None:
        assert store.scale is not None
        return decode_codes(codes, fmt), store.scale[..., 0].astype(jnp.float32)
    return decode(codes, _params(store, fmt), fmt), None


def _widened(x: jax.Array) -> jax.Array:
    """To float32. bfloat16 by its bits: XLA:CPU would multiply in bfloat16, which is slow before jax 0.11."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _params(store: Store, fmt: Format) -> BlockParams:
    given = () if store.static is None else (store.static[:, None, None],)
    if fmt.block == "tensor":
        assert given
        return BlockParams(given[0], None)
    assert store.scale is not None
    return BlockParams(store.scale, store.zero_point, given)


def _encode_rows(
    rows: jax.Array, coding: Coding, static: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Codes uint8 like `rows`, scales and zero points: one for each block along the last axis."""
    fmt = coding.format
    if isinstance(fmt, str):
        return _encode_lloyd(rows, coding.bits)
    given = None if static is None else (static[:, None, None],)
    if fmt.block == "tensor":
        assert given is not None
        # An infinity would be clipped to the largest number of the format without a word.
        rows = jnp.where(jnp.isfinite(rows), rows, jnp.nan)
        return encode(rows, BlockParams(given[0], None), fmt), None, None
    if coding.search or fmt.four_over_six:
        factors = _SEARCHED if coding.search else (1.0,)
        shifts = (0.0,) if fmt.zero_dtype == "uint8" else _SHIFTS
        params = search_params(rows, fmt, factors, outer=given, shifts=shifts)
    else:
        params = block_params(*block_extremes(rows, fmt), fmt, outer=given)
    return encode(rows, params, fmt), _marked(params.scale, rows, fmt), params.zero_point


def _marked(scale: jax.Array, rows: jax.Array, fmt: Format) -> jax.Array:
    """NaN for the scale of a block with a number that is not finite: no code stands for one, and a range from extremes
    loses it where the compiler's minimum and maximum do (XLA:CPU's fast ones)."""
    bad = reduce_blocks(jnp.where(jnp.isfinite(rows), 0.0, 1.0), fmt, jnp.max) > 0
    return jnp.where(bad, jnp.asarray(jnp.nan, scale.dtype), scale)


def _encode_lloyd(rows: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, None]:
    """Codes of rows in units of their root mean square, and the scale that is best for these codes (least squares)."""
    table = lloyd_max(bits)
    rms = jnp.sqrt(_ordered_sum(rows * rows) / rows.shape[-1])
    codes = search(rows * (1 / jnp.where(rms == 0, 1, rms)), table)
    values = jnp.asarray(table, jnp.float32)[codes]
    scale = _ordered_sum(rows * values) / _ordered_sum(values * values)
    return codes, scale.astype(jnp.bfloat16), None


def _ordered_sum(x: jax.Array) -> jax.Array:
    """Sums over the last axis, `[.., 1]`, in an order that does not depend on the program around it."""
    x = jax.lax.optimization_barrier(x)
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = jnp.concatenate([folded, x[..., 2 * half :]], axis=-1) if n % 2 else folded
    return x


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2**bits values that quantize a standard normal number with the least squared error (Max 1960), ascending.

    Lloyd's iteration: a value is the mean of its cell, a cell ends half-way between two values.
    """
    from scipy.stats import norm

    values = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(2000):
        ends = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        values = -np.diff(norm.pdf(ends)) / np.diff(norm.cdf(ends))
    values = (values - values[::-1]) / 2
    return tuple(float(np.float32(v)) for v in values)


def empty_store(coding: Coding, lead: tuple[int, int], length: int, dim: int, static: jax.Array | None) -> Store:
    """A Store of zeros for `length` positions; `lead` is (batch or pages, kv_heads)."""
    one = jax.eval_shape(
        lambda x: encode_vectors(x, coding, static), jax.ShapeDtypeStruct((*lead, length, dim), jnp.float32)
    )
    zeros = jax.tree.map(lambda a: jnp.full(a.shape, blank(a.dtype)), one._replace(static=None))
    return zeros._replace(static=static)


def static_scale(coding: Coding, heads: int, given: jax.Array | float | None) -> jax.Array | None:
    """`[kv_heads]` float32 for a coding with a static scale: what was given, or the format's usual one.

    1 for 8-bit floats; for e4m3 scales what maps the range 0.01 to 2688 / 16 of the largest numbers of a block onto
    theirs, 1/16.
    """
    if not coding.static:
        return None
    assert isinstance(coding.format, Format)
    usual = 1.0 if coding.format.block == "tensor" else 1 / 16
    return jnp.broadcast_to(jnp.array(usual if given is None else given, jnp.float32), (heads,))
