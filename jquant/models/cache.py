"""The key/value cache of a decoder: `{"length": int32 [batch], "layers": {"0": KVCache, ...}}`, of any format."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jquant import kv_cache
from jquant.kv_cache import CacheFormat
from jquant.kv_cache.scales import largest, scales_of
from jquant.models.config import Config
from jquant.models.decoder import Decoder, build
from jquant.models.errors import ModelError
from jquant.trace.execute import quantized


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
    params: Any, config: Config, batches: Iterable[ArrayLike], skip: int = 4
) -> dict[str, dict[str, jax.Array]]:
    """What eases the rounding of keys, found on a text: `init_cache(..., **key_settings(...))`.

    `center`, the mean key of a layer: a constant vector in all keys changes no softmax, but it widens the range that
    codes must span; keys have one, as rope hardly turns their slow channels (SageAttention, arXiv 2410.02367). `gain`,
    for each channel the square root of rms(key - center) / rms(query): where a rotation spreads the error evenly over
    the channels, the error of scores is sum(q^2 gain^2) sum(k^2 / gain^2) up to a factor, and by Cauchy-Schwarz this
    choice makes it least.

    A text must be read in windows as long as the contexts that the cache will hold: over a longer one rope turns the
    slow channels further, and with them the mean. SmolLM2 with a "fine4" cache, on a later part of the same text,
    windows of 2048 tokens: 0.0125 nats per token with settings of 32 windows of 512 tokens, 0.0105 of 16 of 1024,
    0.0093 of 8 of 2048. There too: exact gains instead of powers of two take 2 % off, exponents other than 1/2 of the
    gain's ratio (0.4, 0.6) add 1 to 3 %; a full matrix in the place of the gain takes 1 % off, not worth its product.

    Args:
      params: the parameters of a decoder, float or quantized.
      config: its config.
      batches: tokens to read, int32 `[batch, length]`, longer than `skip`.
      skip: so many first tokens do not count; their keys are unlike all others (keep them in float: `sinks`).

    Returns:
      {"center": by layer, "gain": by layer}, each float32 `[kv_heads, head_dim]`.

    Raises:
      ModelError: no batch, or one without a token behind the skipped ones.
    """
    module = Decoder(config, moments_behind=skip)
    read = jax.jit(quantized(lambda p, tokens: module.apply({"params": p}, tokens, mutable=["moments"])[1]["moments"]))
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


def static_scales(
    params: Any,
    config: Config,
    batches: Iterable[ArrayLike],
    format: str | CacheFormat,
    *,
    center: dict[str, jax.Array] | None = None,
    gain: dict[str, jax.Array] | None = None,
) -> dict[str, dict[str, jax.Array]]:
    """The scales of a format that are given beforehand, found on a text: `init_cache(..., **static_scales(...))`.

    One for a layer, key or value, and head, as `kv_cache.static_scales` finds them in the cache of any model: the
    largest magnitude that is encoded, sinks excepted, gets the largest number of the format. That is the range of a
    static activation (`Activation(static=True)`), and what `calibrate(..., attention=format)` finds without a cache.
    Here the text is read into one: so centers and gains may go with a rotation.

    Args:
      params: the parameters of a decoder, float or quantized.
      config: its config.
      batches: tokens to read, int32 `[batch, length]`, longer than the format's sinks.
      format: of the cache, such as "fp8_e4m3-tensor" or "nvfp4".
      center, gain: by layer, those that the cache is to have (`key_settings`).

    Returns:
      {"key_scale": by layer, "value_scale": by layer}, float32 `[kv_heads]`; without those that the format has no use
      for, so {} for one that has no static scale.

    Raises:
      ModelError: no batch, or one without a token behind the sinks.
    """
    fmt = kv_cache.parse(format)
    if not (fmt.keys.static or fmt.values.static):
        return {}
    apply = quantized(build(config))

    @jax.jit
    def read(params: Any, tokens: jax.Array) -> dict[str, dict[str, jax.Array]]:
        cache = init_cache(config, tokens.shape[0], tokens.shape[1], "float32")
        layers = apply(params, tokens, cache=cache, logits_at=jnp.array([-1]))[1]["layers"]
        own = lambda name: (None if center is None else center[name], None if gain is None else gain[name])
        return {n: largest(c, fmt, *own(n)) for n, c in layers.items()}

    total = None
    for tokens in map(jnp.asarray, batches):
        if tokens.shape[1] <= fmt.sinks:
            raise ModelError(f"static_scales: a batch of {tokens.shape[1]} tokens has none behind {fmt.sinks} sinks")
        found = read(params, tokens)
        total = found if total is None else jax.tree.map(jnp.maximum, total, found)
    if total is None:
        raise ModelError("static_scales needs at least one batch of tokens")
    scales = {n: scales_of(layer, fmt) for n, layer in total.items()}
    return {which: {n: layer[which] for n, layer in scales.items()} for which in scales["0"]}
