"""The key/value cache of a decoder: `{"length": int32 [batch], "layers": {"0": KVCache, ...}}`, of any format."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jquant import kv_cache
from jquant.kv_cache import CacheFormat
from jquant.models.config import Config
from jquant.models.decoder import Decoder
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


def key_settings(
    params: Any, config: Config, batches: Iterable[jax.Array], skip: int = 4
) -> dict[str, dict[str, jax.Array]]:
    """What eases the rounding of keys, found on a text: `init_cache(..., **key_settings(...))`.

    `center`, the mean key of a layer: a constant vector in all keys changes no softmax, but it widens the range that
    codes must span; keys have one, as rope hardly turns their slow channels (SageAttention, arXiv 2410.02367). `gain`,
    for each channel the square root of rms(key - center) / rms(query): where a rotation spreads the error evenly over
    the channels, the error of scores is sum(q^2 gain^2) sum(k^2 / gain^2) up to a factor, and by Cauchy-Schwarz this
    choice makes it least.

    Args:
      params: the float parameters of a decoder.
      config: its config.
      batches: tokens to read, int32 `[batch, length]`, longer than `skip`.
      skip: so many first tokens do not count; their keys are unlike all others (keep them in float: `sinks`).

    Returns:
      {"center": by layer, "gain": by layer}, each float32 `[kv_heads, head_dim]`.

    Raises:
      ModelError: no batch, or one without a token behind the skipped ones.
    """
    module = Decoder(config, moments_behind=skip)
    read = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens, mutable=["moments"])[1]["moments"])
    total, count = None, 0
    for tokens in map(jnp.asarray, batches):
        if tokens.shape[1] <= skip:
            raise ModelError(f"key_settings: a batch of {tokens.shape[1]} tokens has none behind the first {skip}")
        found = read(params, tokens)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += tokens.shape[0] * (tokens.shape[1] - skip)
    if total is None:
        raise ModelError("key_settings needs at least one batch of tokens")
    each = {n: _ease(*(a / count for a in layer["attention"]["sums"][0])) for n, layer in total["layers"].items()}
    return {"center": {n: c for n, (c, _) in each.items()}, "gain": {n: g for n, (_, g) in each.items()}}


def _ease(k: jax.Array, k2: jax.Array, q2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Center and gain from the means of k, k^2 and q^2."""
    variance = jnp.maximum(k2 - k * k, 0)
    floor = 1e-6 * jnp.max(variance, axis=-1, keepdims=True), 1e-6 * jnp.max(q2, axis=-1, keepdims=True)
    gain = (jnp.maximum(variance, floor[0]) / jnp.maximum(q2, floor[1])) ** 0.25
    return k, jnp.where(jnp.isfinite(gain) & (gain > 0), gain, 1)
