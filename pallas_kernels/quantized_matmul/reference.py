"""The definition of right: plain jnp, float32, one line for each step of the formula.

out[m, n] = sum_k x[m, k] (value(code[n, k]) - zero_point[n, k // group]) scale[n, k // group]
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.elements import element, plane_widths, values


def pack(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Codes (uint8 `[..., n]`, each below `2**bits`) as planes of bytes: uint8 `[..., ceil(n * width / 8)]` each.

    Consecutive codes fill a byte from its low bits up. It is the layout the kernels read.
    """
    planes, left = [], bits
    for width in plane_widths(bits):
        left -= width
        per = 8 // width
        part = (codes >> np.uint8(left)) & np.uint8(2**width - 1)
        part = jnp.pad(part, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
        part = part.reshape(*part.shape[:-1], -1, per) << np.arange(0, 8, width, dtype=np.uint8)
        planes.append(jnp.sum(part, axis=-1, dtype=jnp.uint8))
    return tuple(planes)


def unpack(planes: tuple[jax.Array, ...], bits: int, count: int) -> jax.Array:
    """The inverse of `pack`: uint8 `[..., count]`."""
    out, left = jnp.zeros((*planes[0].shape[:-1], count), jnp.uint8), bits
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        left -= width
        part = (plane[..., None] >> np.arange(0, 8, width, dtype=np.uint8)) & np.uint8(2**width - 1)
        out = out | (part.reshape(*plane.shape[:-1], -1)[..., :count] << np.uint8(left))
    return out


def dequantize(
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None,
    name: str,
    group_size: int | None,
    count: int,
) -> jax.Array:
    """The weight: float32 `[..., N, count]`.

    Args:
      planes: codes, as `pack` makes them, `[..., N, bytes]`.
      scale: `[..., N (or 1), blocks]`, any float dtype.
      zero_point: the same shape, or None.
      name: of the element.
      group_size: elements of a row that share a scale; None where the whole row does.
      count: elements of a row.
    """
    table = jnp.asarray(values(name, zero_point is None))
    codes = unpack(planes, element(name).bits, count)
    w = table[codes]
    block = jnp.zeros(count, jnp.int32) if group_size is None else jnp.arange(count) // group_size
    if zero_point is not None:
        w = w - zero_point.astype(jnp.float32)[..., block]
    return w * scale.astype(jnp.float32)[..., block]


def quantized_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    element: str,
    group_size: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`x` `[..., K]` times the transposed weight: `[..., N]`, calculated in float32."""
    w = dequantize(planes, scale, zero_point, element, group_size, x.shape[-1])
    out = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w, precision="highest")
    return out.astype(out_dtype or x.dtype)
