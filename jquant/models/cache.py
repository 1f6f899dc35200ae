"""The key/value cache as a plain pytree of static shapes: `{"length": int32 [], "layers": {"0": {"k", "v"}, ...}}`.

The decoder touches a layer's entry only through `append` and `read`, so another format of cache is another pair of
these. Heads come before positions: the products of attention then read keys and values without a transposed copy.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.models.config import Config


def init_cache(config: Config, batch: int, length: int, dtype: Any = "float32") -> dict[str, Any]:
    """An empty cache for `length` positions; keys and values are [batch, num_kv_heads, length, head_dim]."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    layers = {str(i): {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for i in range(config.num_layers)}
    return {"length": jnp.zeros((), jnp.int32), "layers": layers}


def cache_length(cache: dict[str, Any]) -> int:
    """The number of positions a cache has room for (static)."""
    return int(cache["layers"]["0"]["k"].shape[-2])


def append(entry: dict[str, jax.Array], k: jax.Array, v: jax.Array, start: jax.Array | int) -> dict[str, jax.Array]:
    """Writes k and v [batch, num_kv_heads, tokens, head_dim] at the positions from `start` on."""
    new = {"k": k, "v": v}
    return {n: jax.lax.dynamic_update_slice_in_dim(entry[n], new[n].astype(entry[n].dtype), start, -2) for n in new}


def read(entry: dict[str, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """All keys and values of a layer, [batch, num_kv_heads, length, head_dim]; positions not yet written are zero."""
    return entry["k"].astype(dtype), entry["v"].astype(dtype)
