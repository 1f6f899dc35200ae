"""Codes <-> bytes: sub-byte codes really packed along the last axis.

A code of b bits is cut into planes whose widths are powers of two: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, high
bits first. Each plane is packed on its own, consecutive codes from the low bits of a byte up. So 4-bit codes are
exactly XLA's own int4 order (a bitcast, not a shuffle), 3-bit codes take 3 bits, every plane is read with a shift and a
mask, and each plane can be sliced or sharded along any axis.
"""

import jax
import jax.numpy as jnp
import numpy as np


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, widest (and highest bits) first: `plane_widths(3) == (2, 1)`."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def codes_per_byte(bits: int) -> int:
    """How many codes share a byte of the first (widest) plane."""
    return 8 // plane_widths(bits)[0]


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of one packed row of `count` codes."""
    return sum(-(-count * w // 8) for w in plane_widths(bits))


def _pack_plane(codes: jax.Array, width: int) -> jax.Array:
    if width == 8:
        return codes
    per = 8 // width
    pad = -codes.shape[-1] % per
    if pad:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)])
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per, per)
    out = codes[..., 0]
    for i in range(1, per):
        out = out | (codes[..., i] << np.uint8(i * width))
    return out


def _unpack_plane(packed: jax.Array, width: int, count: int) -> jax.Array:
    if width == 8:
        return packed
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**width - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * len(shifts))[..., :count]


def pack(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Packs `codes` (uint8 `[..., n]`, each below `2**bits`): uint8 `[..., ceil(n * width / 8)]` for each plane."""
    planes, left = [], bits
    for width in plane_widths(bits):
        left -= width
        planes.append(_pack_plane((codes >> np.uint8(left)) & np.uint8(2**width - 1), width))
    return tuple(planes)


def unpack(planes: tuple[jax.Array, ...], bits: int, count: int) -> jax.Array:
    """The inverse of `pack`: uint8 codes `[..., count]`."""
    out, left = None, bits
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        left -= width
        part = _unpack_plane(plane, width, count)
        part = part << np.uint8(left) if left else part  # XLA would make a copy of the codes by shifting nothing
        out = part if out is None else out | part
    assert out is not None
    return out
