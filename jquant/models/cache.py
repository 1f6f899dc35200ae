"""The key/value cache of a decoder: `{"length": int32 [batch], "layers": {"0": KVCache, ...}}`, of any format."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jquant import kv_cache
from jquant.kv_cache import CacheFormat
from jquant.models.config import Config
from jquant.models.errors import ModelError


def init_cache(
    config: Config, batch: int, length: int, format: str | CacheFormat = "float32", **settings: Any
) -> dict[str, Any]:
    """An empty cache for `length` positions of each of `batch` sequences.

    Args:
      config: the model's.
      batch, length: its size.
      format: how keys and values are stored: "float32", "int8", "int4-g64-asym-rot", ...; see `kv_cache.parse`.
      settings: of `kv_cache.init`, for every layer; one that is a dict by layer ("0", "1", ...) gives each its own
        (static scales, centers).
    """

    def layer(name: str) -> kv_cache.KVCache:
        own = {k: v[name] if isinstance(v, dict) else v for k, v in settings.items()}
        return kv_cache.init(batch, length, config.num_kv_heads, config.head_dim, format, **own)

    layers = {str(i): layer(str(i)) for i in range(config.num_layers)}
    # An array of its own: two leaves of one buffer can't both be donated.
    return {"length": layers["0"].length + 0, "layers": layers}


def cache_length(cache: dict[str, Any]) -> int:
    """The number of positions a sequence has room for (static)."""
    return int(cache["layers"]["0"].capacity)


def key_centers(
    apply: Callable[..., Any], params: Any, config: Config, batches: Iterable[jax.Array], skip: int = 4
) -> dict[str, jax.Array]:
    """The mean key of every layer, float32 `[kv_heads, head_dim]` by layer: `init_cache(..., center=key_centers(...))`.

    A constant vector in all keys changes no softmax, but it widens the range that codes must span; keys have one, as
    rope hardly turns their slow channels (SageAttention, arXiv 2410.02367, smooths keys so).

    Args:
      apply, params, config: the model.
      batches: tokens to read, int32 `[batch, length]`.
      skip: so many first tokens do not count; their keys are unlike all others (and stay in float with `sinks`).

    Raises:
      ModelError: no batch has a token behind the skipped ones.
    """

    @jax.jit
    def sums(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        _, cache = apply(params, tokens, cache=init_cache(config, *tokens.shape), logits_at=jnp.array([-1]))
        return {n: c.keys.codes[0][:, :, skip:].sum(axis=(0, 2)) for n, c in cache["layers"].items()}

    total, count = None, 0
    for tokens in map(jnp.asarray, batches):
        found = sums(params, tokens)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += tokens.shape[0] * max(tokens.shape[1] - skip, 0)
    if total is None or count == 0:
        raise ModelError(f"key_centers needs batches of more than {skip} tokens")
    return jax.tree.map(lambda a: a / count, total)
