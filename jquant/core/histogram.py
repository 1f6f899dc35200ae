"""The histogram of a matmul's input, and the static range that it gives.

The bins are those of the floats themselves: sign, exponent and the first bits of the mantissa. They depend on nothing
that was seen, so histograms of batches and devices are added, and each bin is as narrow as its numbers are small.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.activation import Activation
from jquant.core.errors import RecipeError
from jquant.core.formats import ELEMENTS, BlockParams, block_params, decode, encode
from jquant.core.qtensor import QTensor

if TYPE_CHECKING:
    from jquant.core.stats import Stats

_MANTISSA = 5  # a bin's width is at most 1/32 of its numbers
_FIRST, _LAST = -32, 32  # binary exponents; what is smaller or larger counts in the bin at the end
BINS = (_LAST - _FIRST) << _MANTISSA
_OFFSET = (127 + _FIRST) << _MANTISSA


# Of more numbers than this in one batch some are counted, evenly over tokens and channels: XLA:CPU counts 20 in a us.
_COUNTED = 2**16


class Histogram(NamedTuple):
    """Of the finite numbers in the input of each of `batch` matrices.

    Attributes:
      counts: float32 `[*batch, 2 * BINS]`, negative numbers first, ascending. Of a batch with many numbers, a sample's.
      low, high: the extremes, float32 `[*batch]`; zero is always between them.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array


def histogram(x: jax.Array, mask: jax.Array | None = None) -> Histogram:
    """The histogram of `x` `[*batch, tokens, n]`; with a bool mask `[*batch, tokens]`, of those tokens."""
    x = x.astype(jnp.float32)
    counted = jnp.isfinite(x) if mask is None else jnp.isfinite(x) & mask[..., None]
    x = jnp.where(counted, x, 0)
    low, high = jnp.min(x, axis=(-2, -1), initial=0.0), jnp.max(x, axis=(-2, -1), initial=0.0)
    lead, size = x.shape[:-2], math.prod(x.shape[:-2])
    step = _stride(x.shape[-2] * x.shape[-1], x.shape[-1])
    x, counted = (a.reshape(size, math.prod(a.shape[-2:]))[:, ::step] for a in (x, counted))
    # int32: a float32 count stops at 2**24.
    at = _bin(x) + jnp.arange(size, dtype=jnp.int32)[:, None] * (2 * BINS)
    counts = jnp.zeros(size * 2 * BINS, jnp.int32).at[at].add(counted.astype(jnp.int32))
    return Histogram(counts.reshape(*lead, 2 * BINS).astype(jnp.float32), low, high)


def _stride(numbers: int, channels: int) -> int:
    """Every how many numbers one is counted: no common factor with the channels, so that all of them are met."""
    step = max(1, -(-numbers // _COUNTED))
    while math.gcd(step, channels) > 1:
        step += 1
    return step


def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Of both sets of tokens together."""
    return Histogram(a.counts + b.counts, jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def _bin(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> (23 - _MANTISSA)
    size = jnp.clip(bits - _OFFSET, 0, BINS - 1)
    return jnp.where(x < 0, BINS - 1 - size, BINS + size)


def _edges() -> np.ndarray:
    """The lower ends of the bins of positive numbers and the upper end of the last: float32 `[BINS + 1]`."""
    ends = (np.arange(BINS + 1, dtype=np.int32) + _OFFSET) << (23 - _MANTISSA)
    return np.concatenate([[0], ends.view(np.float32)[1:]]).astype(np.float32)


# --- ranges ---


def find_range(seen: Histogram, act: Activation) -> tuple[jax.Array, jax.Array]:
    """The range `low <= 0 <= high`, float32 `[*batch]`, of a static activation; for a symmetric one it is even."""
    low, high = _RANGES[act.range](seen, act)
    return (-jnp.maximum(-low, high), jnp.maximum(-low, high)) if act.symmetric else (low, high)


def _max(seen: Histogram, act: Activation) -> tuple[jax.Array, jax.Array]:
    return seen.low, seen.high


def _percentile(seen: Histogram, act: Activation) -> tuple[jax.Array, jax.Array]:
    negative, positive = jnp.flip(seen.counts[..., :BINS], -1), seen.counts[..., BINS:]
    if act.symmetric:
        top = _quantile(negative + positive, act.percentile)
        top = jnp.minimum(top, jnp.maximum(-seen.low, seen.high))
        return -top, top
    total = jnp.sum(seen.counts, axis=-1)
    beyond = total * (1 - act.percentile / 100)
    return -jnp.minimum(_quantile_beyond(negative, beyond), -seen.low), jnp.minimum(
        _quantile_beyond(positive, beyond), seen.high
    )


def _quantile(counts: jax.Array, percentile: float) -> jax.Array:
    return _quantile_beyond(counts, jnp.sum(counts, axis=-1) * (1 - percentile / 100))


def _quantile_beyond(counts: jax.Array, beyond: jax.Array) -> jax.Array:
    """The size above which `beyond` numbers lie, evenly spread in their bin; 0 where fewer do. `[*batch]`."""
    edges = jnp.asarray(_edges())
    above = jnp.flip(jnp.cumsum(jnp.flip(counts, -1), -1), -1)  # numbers in this bin or a later one
    at = jnp.sum(above > beyond[..., None], axis=-1) - 1
    safe = jnp.maximum(at, 0)
    pick = lambda a: jnp.take_along_axis(a, safe[..., None], -1)[..., 0]
    share = jnp.clip((pick(above) - beyond) / jnp.maximum(pick(counts), 1), 0, 1)
    return jnp.where(at < 0, 0, edges[safe] + share * (edges[safe + 1] - edges[safe]))


_FACTORS = np.exp2(-np.arange(0, 8, 1 / 12)).astype(np.float32)  # 1 first: equal errors keep the whole range


def _mse(seen: Histogram, act: Activation) -> tuple[jax.Array, jax.Array]:
    """The extremes shrunk by the factor with the least squared error."""
    low, high = seen.low, seen.high
    if act.symmetric:
        low, high = -jnp.maximum(-low, high), jnp.maximum(-low, high)
    errors = jax.lax.map(lambda f: _error(seen.counts, low * f, high * f, act), jnp.asarray(_FACTORS))
    best = jnp.asarray(_FACTORS)[jnp.argmin(errors, axis=0)]
    return low * best, high * best


def _error(counts: jax.Array, low: jax.Array, high: jax.Array, act: Activation) -> jax.Array:
    """The squared error of all numbers under a range, `[*batch]`."""
    edges = _edges()
    middle = (edges[1:] + edges[:-1]) / 2
    middle = np.concatenate([-middle[::-1], middle])
    width = np.concatenate([np.diff(edges)[::-1], np.diff(edges)])
    fmt = act.format
    params = block_params(low[..., None], high[..., None], fmt)
    x = jnp.broadcast_to(jnp.asarray(middle), counts.shape)
    error = (x - decode(encode(x, params, fmt), params, fmt)) ** 2
    if ELEMENTS[fmt.element].kind == "int":
        # In a bin wider than a step the numbers lie anywhere in the steps.
        reached = (x >= low[..., None]) & (x <= high[..., None])
        error = jnp.where(reached & (width > params.scale), params.scale**2 / 12, error)
    return jnp.sum(counts * error, axis=-1)


_RANGES: dict[str, Callable[[Histogram, Activation], tuple[jax.Array, jax.Array]]] = {
    "max": _max,
    "percentile": _percentile,
    "mse": _mse,
}


def static_range(path: str, act: Activation, stats: "Mapping[str, Stats]", q: QTensor, batch: Any) -> BlockParams:
    """The `activation_params` of a QTensor whose input was calibrated.

    Args:
      path: the leaf, for messages and in `stats`.
      act: a static activation.
      stats: with histograms, by path.
      q: its weight.
      batch: the axes of `q` whose entries have ranges of their own (experts, stacked layers).

    Raises:
      RecipeError: no token was seen, or what was seen has other batch axes.
    """
    seen = stats[path].histogram if path in stats else None
    if seen is None:
        raise RecipeError(
            f"{path}: the range of its input ({act}) was never observed; calibrate it (a histogram of its input), or "
            "use a dynamic range"
        )
    sizes = tuple(q.shape[a] for a in batch)
    if seen.low.shape != sizes:
        raise RecipeError(
            f"{path}: its uses share axes with their inputs in different ways, so that its input has no static range "
            f"({act}); use a dynamic range"
        )
    return range_params(seen, act, q, batch)


def range_params(seen: Histogram, act: Activation, q: QTensor, batch: Any) -> BlockParams:
    """Scale and zero point of a static range, `[*kept, 1]`, ones in place of the kept axes that are not in `batch`."""
    shape = [q.shape[k] if k in batch else 1 for k in q.kept]
    return jax.tree.map(lambda a: a.reshape(*shape, 1), _range_params(seen, act))


@partial(jax.jit, static_argnums=1)
def _range_params(seen: Histogram, act: Activation) -> BlockParams:
    low, high = find_range(seen, act)
    return block_params(low[..., None], high[..., None], act.format)
