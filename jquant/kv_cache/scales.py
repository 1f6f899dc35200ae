"""Static scales, found on a text: the largest magnitude that is encoded gets the largest number of the format."""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.elements import ELEMENTS
from jquant.core.errors import CacheError
from jquant.core.formats import Format
from jquant.kv_cache.cache import KVCache, eased
from jquant.kv_cache.format import CacheFormat, Coding, parse
from jquant.kv_cache.rotation import rotate


def static_scales(
    cache: KVCache, format: str | CacheFormat, *, center: Any = None, gain: Any = None
) -> dict[str, jax.Array]:
    """The scales of a format that are given beforehand: `init(..., format, **static_scales(cache, format))`.

    Args:
      cache: a float cache ("float32", neither a ring nor in pages) into which a text was read.
      format: of the cache to come, such as "fp8_e4m3-tensor" or "nvfp4".
      center, gain: those that it is to have, `[kv_heads, head_dim]`.

    Returns:
      "key_scale" and "value_scale", float32 `[kv_heads]`; without those that the format has no use for. 1 over the
      largest number where nothing but zeros was read.

    Raises:
      CacheError: the cache does not hold floats in the order of their positions.
    """
    fmt = parse(format)
    if not (cache.format.keys.is_float and cache.format.values.is_float) or cache.ring or cache.table is not None:
        raise CacheError(
            f"static_scales: needs a float cache, neither a ring nor in pages, to read the largest numbers from; got "
            f"{cache.format}"
        )
    return scales_of(largest(cache, fmt, center, gain), fmt)


def largest(cache: KVCache, fmt: CacheFormat, center: Any = None, gain: Any = None) -> dict[str, jax.Array]:
    """The largest magnitudes of what a format encodes, sinks excepted, `[kv_heads]`, for each static scale it has."""
    behind = lambda store: store.codes[0][:, :, fmt.sinks :]
    ways = {
        "key_scale": (fmt.keys, lambda: eased(behind(cache.keys), center, gain)),
        "value_scale": (fmt.values, lambda: behind(cache.values)),
    }
    turned = {n: rotate(read(), coding.rotations, fmt.seed) for n, (coding, read) in ways.items() if coding.static}
    return {n: jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2, 3)) for n, x in turned.items()}


def scales_of(found: dict[str, jax.Array], fmt: CacheFormat) -> dict[str, jax.Array]:
    """The scales for these largest magnitudes."""
    codings = {"key_scale": fmt.keys, "value_scale": fmt.values}
    return {n: jnp.where(a > 0, a, 1) / _top(codings[n]) for n, a in found.items()}


def _top(coding: Coding) -> float:
    """The largest number of a format with a static scale, that scale not counted."""
    assert isinstance(coding.format, Format)
    top = ELEMENTS[coding.format.element].top
    return top if coding.format.block == "tensor" else top * float(jnp.finfo(jnp.float8_e4m3fn).max)
