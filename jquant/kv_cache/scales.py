"""Static scales, found on a text: the largest magnitude that is encoded gets the largest number of the format.

The numbers of the text are those in a float cache, or what `jquant.calibrate(..., attention=...)` saw of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.elements import ELEMENTS
from jquant.core.errors import CacheError
from jquant.core.formats import Format
from jquant.core.kv_stats import KVStats
from jquant.kv_cache.cache import KVCache, eased
from jquant.kv_cache.format import CacheFormat, Coding, parse
from jquant.kv_cache.rotation import rotate


def static_scales(
    seen: KVCache | KVStats | Mapping[str, Any],
    format: str | CacheFormat,
    *,
    center: Any = None,
    gain: Any = None,
) -> dict[str, Any]:
    """The scales of a format that are given beforehand: `init(..., format, **static_scales(seen, format))`.

    From a float cache and from the statistics of the keys and values that it holds they are the same.

    Args:
      seen: a float cache ("float32", neither a ring nor in pages) into which a text was read. Or the `KVStats` of an
        attention; or all of `jquant.calibrate(..., attention=...)`, whose attentions are the layers "0", "1", ...
      format: of the cache to come, such as "fp8_e4m3-tensor" or "nvfp4". With sinks, or turned before it is encoded, it
        must have been given to `calibrate`: which of the numbers those are can't be told from the largest of all.
      center, gain: those that it is to have, `[kv_heads, head_dim]`; by layer where `seen` is all of `calibrate`.

    Returns:
      "key_scale" and "value_scale", float32 `[kv_heads]` (behind the axes of stacked layers; `[1]`, one scale for all
      heads, where they could not be told apart); without those that the format has no use for. 1 over the largest
      number where nothing but zeros was read. For all of `calibrate`, each by layer, as `models.init_cache` takes them.

    Raises:
      CacheError: the cache does not hold floats in the order of their positions; the statistics are those of another
        format, or those of turned keys and there is a center or a gain; there are none.
    """
    fmt = parse(format)
    if isinstance(seen, KVCache):
        return scales_of(largest(_float_cache(seen), fmt, center, gain), fmt)
    if isinstance(seen, KVStats):
        return scales_of(largest_seen(seen, fmt, center, gain), fmt)
    layers = dict(enumerate(stats for stats in seen.values() if isinstance(stats, KVStats)))
    if not layers:
        raise CacheError("static_scales: there are no statistics of an attention; calibrate(..., attention=True)")
    own = lambda given, i: given[str(i)] if isinstance(given, Mapping) else given
    found = {str(i): scales_of(largest_seen(s, fmt, own(center, i), own(gain, i)), fmt) for i, s in layers.items()}
    return {which: {i: scales[which] for i, scales in found.items()} for which in found["0"]}


def _float_cache(cache: KVCache) -> KVCache:
    if not (cache.format.keys.is_float and cache.format.values.is_float) or cache.ring or cache.table is not None:
        raise CacheError(
            f"static_scales: needs a float cache, neither a ring nor in pages, to read the largest numbers from; got "
            f"{cache.format}"
        )
    return cache


def largest(cache: KVCache, fmt: CacheFormat, center: Any = None, gain: Any = None) -> dict[str, jax.Array]:
    """The largest magnitudes of what a format encodes, sinks excepted, `[kv_heads]`, for each static scale it has."""
    behind = lambda store: store.codes[0][:, :, fmt.sinks :]
    ways = {
        "key_scale": (fmt.keys, lambda: eased(behind(cache.keys), center, gain)),
        "value_scale": (fmt.values, lambda: behind(cache.values)),
    }
    turned = {n: rotate(read(), coding.rotations, fmt.seed) for n, (coding, read) in ways.items() if coding.static}
    return {n: jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2, 3)) for n, x in turned.items()}


def largest_seen(stats: KVStats, fmt: CacheFormat, center: Any = None, gain: Any = None) -> dict[str, jax.Array]:
    """`largest`, of what calibration saw.

    All that is done to a number before it is encoded but the rotation is monotone: the largest magnitude is that of
    the smallest or of the largest number of its channel.
    """
    _check_seen(stats, fmt, center is not None or gain is not None)
    ends = {
        "key_scale": (fmt.keys, lambda: eased(jnp.stack([stats.key_min, stats.key_max], axis=-2), center, gain)),
        "value_scale": (fmt.values, lambda: jnp.stack([stats.value_min, stats.value_max], axis=-2)),
    }
    return {n: jnp.max(jnp.abs(read()), axis=(-2, -1)) for n, (coding, read) in ends.items() if coding.static}


def _check_seen(stats: KVStats, fmt: CacheFormat, changed: bool) -> None:
    static = [n for n in ("keys", "values") if getattr(fmt, n).static]
    turns = {n: getattr(fmt, n).rotations for n in static}
    what = lambda f: (f.sinks, *(getattr(f, n).rotations for n in static), f.seed * any(turns.values()))
    if static and what(stats.format or parse("float32")) != what(fmt):
        raise CacheError(
            f"static_scales: the statistics are those of {stats.format or 'all keys and values, as they are'}, but "
            f"{fmt} encodes others; calibrate(..., attention={str(fmt)!r})"
        )
    if changed and turns.get("keys"):
        raise CacheError(
            f"static_scales: {fmt} turns keys, and their center and gain come before that; read the text into a float "
            "cache, and give that instead"
        )


def scales_of(found: dict[str, jax.Array], fmt: CacheFormat) -> dict[str, jax.Array]:
    """The scales for these largest magnitudes."""
    codings = {"key_scale": fmt.keys, "value_scale": fmt.values}
    return {n: jnp.where(a > 0, a, 1) / _top(codings[n]) for n, a in found.items()}


def _top(coding: Coding) -> float:
    """The largest number of a format with a static scale, that scale not counted."""
    assert isinstance(coding.format, Format)
    top = ELEMENTS[coding.format.element].top
    return top if coding.format.block == "tensor" else top * float(jnp.finfo(jnp.float8_e4m3fn).max)


def observed(k: jax.Array, v: jax.Array, fmt: CacheFormat | None) -> tuple[KVStats, jax.Array]:
    """What calibration notes of keys and values `[B, K, L, D]` for a format (None: of all, as they are).

    Returns:
      The statistics, and how many channels of keys and of values hold a number that is not finite, int32 `[2]`.

    Raises:
      CacheError: no more tokens than the format has sinks.
    """
    sinks = 0 if fmt is None else fmt.sinks
    if min(k.shape[2], v.shape[2]) <= sinks:
        raise CacheError(
            f"calibrate: an attention over {k.shape[2]} tokens has none behind the {sinks} sinks of {fmt}; give longer "
            "batches"
        )
    ends, bad = [], []
    for x, name in ((k, "keys"), (v, "values")):
        x = x[:, :, sinks:].astype(jnp.float32)
        bad.append(jnp.sum(jnp.any(~jnp.isfinite(x), axis=(0, 1, 2)), dtype=jnp.int32))
        x = x if fmt is None else rotate(x, getattr(fmt, name).rotations, fmt.seed)
        ends += [jnp.min(x, axis=(0, 2)), jnp.max(x, axis=(0, 2))]
    count = jnp.asarray(k.shape[0] * (k.shape[2] - sinks), jnp.float32)
    return KVStats(ends[0], ends[1], ends[2], ends[3], count, fmt), jnp.stack(bad)
