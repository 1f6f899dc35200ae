"""Where things lie: slots of a row, or of the pages that a block table gives to a sequence (vLLM, arXiv 2309.06180).

Arrays are `[rows, kv_heads, slots, x]`: rows are sequences, or pages of a pool. An index past the end writes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp


def blank(dtype: Any) -> jax.Array:
    """What empty memory holds: zero, or of powers of two (e8m0, which have none: a zero becomes NaN) the smallest."""
    zero = jnp.zeros((), jnp.uint8)
    e8m0 = jnp.dtype(dtype) == jnp.float8_e8m0fnu
    return jax.lax.bitcast_convert_type(zero, jnp.float8_e8m0fnu) if e8m0 else zero.astype(dtype)


def put(old: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Writes `new` `[B, K, L, x]` into `slots` (int32 `[B, L]`) of `old` `[B, K, T, x]`."""
    return jax.vmap(lambda o, s, n: o.at[:, s].set(n, mode="drop"))(old, slots, new)


def take(a: jax.Array, slots: jax.Array) -> jax.Array:
    """`a` `[B, K, T, x]` at `slots` (int32 `[B, L]`): `[B, K, L, x]`."""
    return jax.vmap(lambda a, s: jnp.take(a, s, axis=1, mode="clip"))(a, slots)


def put_in_pages(old: jax.Array, table: jax.Array, slots: jax.Array, valid: jax.Array, new: jax.Array) -> jax.Array:
    """As `put`, `old` `[P, K, slots of a page, x]` a pool and `table` int32 `[B, pages]`; only where `valid`."""
    page, within = slots // old.shape[2], slots % old.shape[2]
    pages = jnp.take_along_axis(table, jnp.clip(page, 0, table.shape[1] - 1), axis=1)
    pages = jnp.where(valid & (pages >= 0), pages, old.shape[0])
    rows = new.swapaxes(1, 2).reshape(-1, *new.shape[1:2], new.shape[3])  # [B * L, K, x]
    return old.at[pages.reshape(-1), :, within.reshape(-1)].set(rows, mode="drop")


def put_pages(old: jax.Array, pages: jax.Array, new: jax.Array) -> jax.Array:
    """Writes one sequence `[K, T, x]` into its `pages` (int32 `[pages]`, -1 for none) of a pool."""
    split = new.reshape(new.shape[0], pages.shape[0], old.shape[2], new.shape[2]).swapaxes(0, 1)
    return old.at[jnp.where(pages < 0, old.shape[0], pages)].set(split, mode="drop")


def read(a: jax.Array, table: jax.Array | None, start: jax.Array, count: int) -> jax.Array:
    """The slots from `start` on of all sequences, `[B, K, count, x]`; with pages `start` and `count` are whole pages.

    A page that a sequence does not have is read as zeros: other sequences' numbers must not get in, not even times 0.
    """
    if a.dtype == jnp.bfloat16:  # XLA:CPU would turn the whole array into float32, for every block
        bits = read(jax.lax.bitcast_convert_type(a, jnp.uint16), table, start, count)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    if table is None:
        return jax.lax.dynamic_slice_in_dim(a, start, count, axis=2)
    size = a.shape[2]
    pages = jax.lax.dynamic_slice_in_dim(table, start // size, count // size, axis=1)
    found = a.at[jnp.maximum(pages, 0)].get(mode="clip")  # [B, pages, K, size, x]
    found = jnp.where((pages < 0)[..., None, None, None], blank(a.dtype), found)
    found = found.swapaxes(1, 2)
    return found.reshape(*found.shape[:2], count, a.shape[3])


def allocate(table: jax.Array, needed: jax.Array, pool: int) -> tuple[jax.Array, jax.Array]:
    """Gives every sequence so many pages as it needs, free ones of the pool in ascending order.

    Args:
      table: int32 `[B, pages]`.
      needed: int32 `[B]`, pages that each sequence is to have (those that have more keep them).
      pool: how many pages there are.

    Returns:
      The table, and bool `[B]`: whether there were enough. Sequences are served in order.
    """
    have = jnp.sum(table >= 0, axis=1, dtype=jnp.int32)
    used = jnp.zeros(pool, bool).at[jnp.where(table < 0, pool, table)].set(True, mode="drop")
    free = jnp.argsort(used, stable=True).astype(jnp.int32)
    want = jnp.maximum(needed - have, 0)
    ends = jnp.cumsum(want, dtype=jnp.int32)
    enough = (ends <= pool - jnp.sum(used, dtype=jnp.int32)) | (want == 0)
    column = jnp.arange(table.shape[1], dtype=jnp.int32)
    new = (column >= have[:, None]) & (column < needed[:, None]) & enough[:, None]
    rank = column - have[:, None] + (ends - want)[:, None]
    return jnp.where(new, free[jnp.clip(rank, 0, pool - 1)], table), enough
