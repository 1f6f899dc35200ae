"""Codes as the operands of a product in low precision: int8 or float8."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jquant.core.formats import ELEMENTS, BlockParams, Format, decode, decode_codes


class Side(NamedTuple):
    """One operand as it is multiplied. Its last axis is contracted.

    Attributes:
      codes: int8 or float8, `[..., n]`.
      zero: int32 zero point, `[..., blocks]`, or None.
    """

    codes: jax.Array
    zero: jax.Array | None


def integers(codes: jax.Array, zero: jax.Array | None, fmt: Format) -> Side:
    """uint8 codes of an integer format as int8, the zero point moved with them."""
    half = 2 ** (fmt.bits - 1)
    if fmt.symmetric:
        signed = lax.bitcast_convert_type(codes, jnp.int8)
        return Side(signed if fmt.bits == 8 else (signed ^ np.int8(half)) - np.int8(half), None)
    assert zero is not None
    move = 128 if fmt.bits == 8 else 0
    return Side(lax.bitcast_convert_type(codes ^ np.uint8(move), jnp.int8), zero.astype(jnp.int32) - move)


def floats8(codes: jax.Array, zero: jax.Array | None, fmt: Format) -> Side:
    """uint8 codes as numbers of fp8: those of a float format, or integers of up to four bits, less their zero point."""
    element = ELEMENTS[fmt.element]
    if element.kind == "float":
        return Side(lax.bitcast_convert_type(codes, jnp.dtype(element.storage)), None)
    values = decode_codes(codes, fmt)
    if zero is not None:
        blocks = BlockParams(jnp.ones(zero.shape, jnp.float32), zero)
        values = decode(codes, blocks, Format(fmt.element, fmt.group_size or "channel", symmetric=False))
    return Side(values.astype(jnp.float8_e4m3fn), None)
