"""Blocks of arrays in a Triton kernel: which one a program has, and how it is read where it reaches over the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

TOGETHER = 8


def program(m: int, n: int, block_m: int, block_n: int) -> tuple[Any, Any]:
    """The block of activations and that of the weight of a program, by the first axis of the grid.

    Programs that run at a time share the L2 cache: `TOGETHER` blocks of activations meet each block of the weight
    before the next one is read.
    """
    across, down, index = pl.cdiv(n, block_n), pl.cdiv(m, block_m), pl.program_id(0)
    together = min(TOGETHER, down)
    group, inside = index // (together * across), index % (together * across)
    height = jnp.minimum(down - group * together, together)
    return group * together + inside % height, inside // height


def indices(where: Any) -> jax.Array:
    """The indices of a slice `pl.ds(start, size)`."""
    return where.start + jnp.arange(where.size)


def mask(rows: tuple[Any, int], columns: tuple[Any, int], together: int = 1) -> jax.Array | None:
    """True where a block lies in the array; None where no block reaches over the end.

    Args:
      rows, columns: the slice of each axis, and the size of the array along it.
      together: blocks of columns that are read in one step, so that some may lie behind the end.
    """
    (r, last_r), (c, last_c) = rows, columns
    masks = []
    if last_r % r.size:
        masks.append(jnp.broadcast_to((indices(r) < last_r)[:, None], (r.size, c.size)))
    if last_c % (c.size * together):
        masks.append(jnp.broadcast_to((indices(c) < last_c)[None, :], (r.size, c.size)))
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def load(ref: Any, where: tuple[Any, ...], inside: jax.Array | None) -> jax.Array:
    """A block, zero where `inside` is False."""
    return plt.load(ref.at[where], mask=inside, other=None if inside is None else np.zeros((), ref.dtype))
