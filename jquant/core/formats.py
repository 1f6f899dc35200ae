"""Encoding and decoding by a `Format`: pure functions on rows.

Everything here works on rows: arrays `[..., n]` whose last axis is the flattened contracted axes of a weight. A block
of the format is a run of elements of a row (the last may be shorter), a tile of several rows by such a run, a whole row
("channel"), or everything but `stacked` leading axes ("tensor"). Arithmetic is in float32:

    symmetric, floats, codebooks   value = element(code) * scale
    with a zero point              value = (code - zero_point) * scale

Rounding multiplies by the reciprocal of the scale, and scales by the reciprocal of the top: XLA turns a division by a
broadcast into that anyway, but in some programs only, and the same weight must get the same bits in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.elements import ELEMENTS, NF4_VALUES, Element, code_table, decode_codes, encode_scaled
from jquant.core.format_type import PRESETS, Format, parse_format
from jquant.core.scales import Outer, choose_outer, safe, scale_values, spread_rows, store_scale

__all__ = [
    "ELEMENTS", "FOUR_OVER_SIX", "NF4_VALUES", "PRESETS", "BlockParams", "Element", "Format", "block_counts",
    "block_error", "block_extremes", "block_params", "code_table", "compute_params", "decode", "decode_codes", "encode",
    "encode_scaled", "parse_format", "reduce_blocks", "row_params", "spread", "store_zero", "to_blocks",
]  # fmt: skip

FOUR_OVER_SIX = 6 / 4  # a block's second candidate: a range that much wider


class BlockParams(NamedTuple):
    """What a block stores beside its codes.

    Attributes:
      scale: `[..., M, blocks]`, in the format's scale dtype. M are the rows; with tiles, the rows of tiles; for
        "tensor" blocks `[*stacked, 1, ..., 1]`.
      zero_point: the same shape, in the format's zero dtype, or None for symmetric formats.
      outer: the second level of scales (see `core.scales`), empty without one.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    outer: Outer = ()


jax.export.register_namedtuple_serialization(BlockParams, serialized_name="jquant.BlockParams")


# --- blocks ---


def to_blocks(rows: jax.Array, fmt: Format) -> jax.Array:
    """`[..., n]` -> `[..., blocks, block]`, zeros behind the last, shorter group (no extreme changes by them)."""
    n, size = rows.shape[-1], fmt.group_size
    if size is None:
        return rows[..., None, :]
    pad = -n % size
    if pad:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, pad)])
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)


def reduce_blocks(rows: jax.Array, fmt: Format, how: Callable[..., jax.Array], stacked: int = 0) -> jax.Array:
    """One number for every block of `[..., m, n]`: the shape of `BlockParams.scale`.

    Args:
      rows: the numbers.
      fmt: the format.
      how: `jnp.min`, `jnp.max` or `jnp.sum`, zero included: blocks at the ends are filled up with zeros.
      stacked: for "tensor" blocks, how many leading axes hold separate tensors.
    """
    how = partial(how, initial=0.0)
    blocked = to_blocks(rows, fmt)
    if fmt.block == "tensor":
        return how(blocked, axis=tuple(range(stacked, blocked.ndim)), keepdims=True)[..., 0]
    tile = fmt.tile_rows
    if tile == 1 or rows.ndim < 2:
        return how(blocked, axis=-1)
    pad = -rows.shape[-2] % tile
    if pad:
        blocked = jnp.pad(blocked, [(0, 0)] * (rows.ndim - 2) + [(0, pad), (0, 0), (0, 0)])
    m = blocked.shape[-3]
    return how(blocked.reshape(*rows.shape[:-2], m // tile, tile, *blocked.shape[-2:]), axis=(-3, -1))


def block_counts(shape: tuple[int, ...], fmt: Format, stacked: int = 0) -> np.ndarray:
    """How many elements of `[..., m, n]` each block has, float32, broadcasting against `BlockParams.scale`."""
    if fmt.block == "tensor":
        return np.asarray(np.prod(shape[stacked:]), np.float32)

    def cut(length: int, size: int) -> np.ndarray:
        return np.minimum(size, length - np.arange(0, max(length, 1), size))

    columns = cut(shape[-1], fmt.group_size or max(shape[-1], 1))
    if fmt.tile_rows == 1 or len(shape) < 2:
        return columns.astype(np.float32)
    return (cut(shape[-2], fmt.tile_rows)[:, None] * columns).astype(np.float32)


def block_extremes(rows: jax.Array, fmt: Format, stacked: int = 0) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum of every block, zero always included, float32 `[..., M, blocks]`.

    Of ternary formats -mean and +mean of the absolute values: their range is not that of the numbers (BitNet b1.58).
    """
    rows = rows.astype(jnp.float32)
    if fmt.element == "ternary":
        total = reduce_blocks(jnp.abs(rows), fmt, _pairwise_sum, stacked)
        mean = total / np.maximum(block_counts(rows.shape, fmt, stacked), 1)
        return -mean, mean
    return reduce_blocks(rows, fmt, jnp.min, stacked), reduce_blocks(rows, fmt, jnp.max, stacked)


def _pairwise_sum(x: jax.Array, axis: int | tuple[int, ...], keepdims: bool = False, initial: float = 0.0) -> jax.Array:
    """A sum in one order, whatever the program around it: the bits of `jnp.sum` depend on what XLA fuses it with."""
    axes = (axis,) if isinstance(axis, int) else axis
    kept = [a for a in range(x.ndim) if a not in {b % x.ndim for b in axes}]
    flat = jnp.moveaxis(x, kept, range(len(kept))).reshape(*(x.shape[a] for a in kept), -1)
    while (n := flat.shape[-1]) > 1:
        half = n // 2
        both = flat[..., :half] + flat[..., half : 2 * half]
        flat = jax.lax.optimization_barrier(jnp.concatenate([both, flat[..., 2 * half :]], axis=-1))
    total = initial + jnp.sum(flat, axis=-1)  # of one or of none
    return jnp.expand_dims(total, axis) if keepdims else total


# --- scales ---


def block_params(
    low: jax.Array, high: jax.Array, fmt: Format, outer: Outer | None = None, stacked: int = 0
) -> BlockParams:
    """Scale and zero point that spread the codes of `fmt` over the range `low <= 0 <= high` of each block.

    Args:
      low, high: float32 `[..., M, blocks]`.
      fmt: the format.
      outer: the second level of scales; None to choose it from these ranges.
      stacked: where it is chosen for whole tensors, how many leading axes hold separate ones.
    """
    element = ELEMENTS[fmt.element]
    absmax = jnp.maximum(-low, high)
    top = 2**element.bits - 1
    # halves: high - low may overflow
    ideal = absmax * (1 / element.top) if fmt.symmetric else (high * 0.5 - low * 0.5) * (2 / top)
    if outer is None:
        outer = choose_outer(ideal, fmt, stacked)
    scale = store_scale(ideal, absmax, fmt, outer)
    if fmt.symmetric:
        return BlockParams(scale, None, outer)
    return BlockParams(scale, store_zero(-low / safe(scale_values(scale, outer, fmt)), fmt), outer)


def store_zero(zero: jax.Array, fmt: Format) -> jax.Array:
    """Zero points in the dtype of the format: within its codes, and one of them unless they may lie between."""
    if fmt.zero_dtype == "uint8":
        zero = jnp.round(zero)
    return jnp.clip(zero, 0, 2**fmt.bits - 1).astype(fmt.zero_dtype)


def compute_params(rows: jax.Array, fmt: Format, stacked: int = 0) -> BlockParams:
    """Scales and zero points from the extremes of the blocks of `rows` (`[..., n]`), round-to-nearest's choice.

    Args:
      rows: `[..., n]`, any float dtype.
      fmt: the format.
      stacked: for what a whole tensor shares, how many leading axes hold separate tensors (layers, experts).
    """
    low, high = block_extremes(rows, fmt, stacked)
    params = block_params(low, high, fmt, stacked=stacked)
    if not fmt.four_over_six:
        return params
    wide = block_params(low * FOUR_OVER_SIX, high * FOUR_OVER_SIX, fmt, params.outer)
    rows = rows.astype(jnp.float32)
    error = partial(block_error, rows, fmt=fmt, unit=params, stacked=stacked)
    better = error(wide) < error(params)
    return params._replace(scale=jnp.where(better, wide.scale, params.scale))


def block_error(
    rows: jax.Array,
    params: BlockParams,
    fmt: Format,
    unit: BlockParams,
    weight: jax.Array | None = None,
    stacked: int = 0,
) -> jax.Array:
    """Squared error of every block of `rows` (float32) rounded to nearest under `params`: the shape of `params.scale`.

    It is in units of the squared scale of `unit`, which no tiny or huge weight takes out of float32's range. `weight`,
    broadcasting against `rows`, weights the squares.
    """
    size = spread(1 / safe(row_params(unit, fmt, _rows_of(rows.shape))[0]), fmt, rows.shape[-1])
    error = ((rows - decode(encode(rows, params, fmt), params, fmt)) * size) ** 2
    return reduce_blocks(error if weight is None else error * weight, fmt, jnp.sum, stacked)


def row_params(params: BlockParams, fmt: Format, m: int) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point to calculate with, float32 `[..., m or 1, blocks]`: a tile's for each of its rows."""
    scale = spread_rows(scale_values(params.scale, params.outer, fmt), fmt.tile_rows, m)
    if params.zero_point is None:
        return scale, None
    return scale, spread_rows(params.zero_point.astype(jnp.float32), fmt.tile_rows, m)


def spread(per_block: jax.Array, fmt: Format, n: int) -> jax.Array:
    """Repeats a per-block value for the elements of its block: `[..., blocks]` -> `[..., n]` (or `[..., 1]`)."""
    return spread_groups(per_block, fmt.group_size, n)


def spread_groups(per_block: jax.Array, size: int | None, n: int) -> jax.Array:
    """`spread` for blocks of `size` elements, None for one block."""
    if size is None:
        return per_block
    out = jnp.broadcast_to(per_block[..., None], (*per_block.shape, size))
    return out.reshape(*per_block.shape[:-1], per_block.shape[-1] * size)[..., :n]


# --- codes ---


def _rows_of(shape: tuple[int, ...]) -> int:
    return shape[-2] if len(shape) > 1 else 1


def encode(rows: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    """Rounds `rows` (`[..., n]`) to codes (uint8 `[..., n]`) under the given scales."""
    n = rows.shape[-1]
    scale, zero_point = row_params(params, fmt, _rows_of(rows.shape))
    zero = 0.0 if zero_point is None else spread(zero_point, fmt, n)
    return encode_scaled(rows.astype(jnp.float32) * spread(1 / safe(scale), fmt, n), zero, fmt)


def decode(codes: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    """The float32 values `[..., n]` that `codes` (uint8 `[..., n]`) stand for."""
    n = codes.shape[-1]
    scale, zero_point = row_params(params, fmt, _rows_of(codes.shape))
    values = decode_codes(codes, fmt)
    if zero_point is not None:
        values = values - spread(zero_point, fmt, n)
    return values * spread(scale, fmt, n)
