"""`Stats`: what calibration accumulated at a site. A pytree of float32 sums; adding two is merging two batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jquant.core.histogram import Histogram, merge_histograms
from jquant.core.kv_stats import KVStats


class Stats(NamedTuple):
    """Sums over the tokens (rows x of the site's input, `[tokens, n]`) that calibration saw.

    `batch` are the axes of the weight that are neither contracted nor produced by the matmul: experts, stacked layers.
    n is the length of the flattened contracted axes, in the order of `QTensor` rows. All float32.

    Attributes:
      gram: `[*batch, n, n]`, the sum of x x^T, or None where no method asked for it.
      abs_sum: `[*batch, n]`, the sum of |x|, or None.
      absmax: `[*batch, n]`, the largest |x|, or None.
      tokens: `[*batch]`, the number of tokens.
      histogram: of all |x| and their signs, for static ranges, or None where none was asked for.
      cross: `[*batch, n, n]`, the sum of d x^T, or None. d is what the float model's input is more than x, the
        quantized model's: only a walk on both streams knows it.
      peak: `[*batch, n]`, the largest |x| in tokens of the root mean square 1, or None: what a scale per token meets.
    """

    gram: jax.Array | None
    abs_sum: jax.Array | None
    absmax: jax.Array | None
    tokens: jax.Array
    histogram: Histogram | None = None
    cross: jax.Array | None = None
    peak: jax.Array | None = None

    @property
    def mean_abs(self) -> jax.Array:
        """Mean |x| per channel, `[*batch, n]`; zeros where no token was seen."""
        if self.abs_sum is None:
            raise ValueError('Stats: no abs_sum was accumulated; a method that reads mean_abs says needs={"mean_abs"}')
        return self.abs_sum / jnp.maximum(self.tokens, 1.0)[..., None]


_S = TypeVar("_S", Stats, KVStats)


def merge(a: _S, b: _S) -> _S:
    """The stats of both sets of tokens together; what one of them does not have, the result does not."""
    if isinstance(a, KVStats):
        return a.merge(b)
    add = partial(jax.tree.map, jnp.add)
    return Stats(
        _both(add, a.gram, b.gram),
        _both(add, a.abs_sum, b.abs_sum),
        _both(jnp.maximum, a.absmax, b.absmax),
        a.tokens + b.tokens,
        _both(merge_histograms, a.histogram, b.histogram),
        _both(add, a.cross, b.cross),
        _both(jnp.maximum, a.peak, b.peak),
    )


def _both(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return None if a is None or b is None else combine(a, b)


def without(stats: Stats, right: jax.Array, taken: jax.Array) -> Stats:
    """The statistics of x' = x - (x B^T) C, of what is left of inputs out of which a side takes what it carries.

        gram = P^T H P,    cross = X P,    with P = I - B^T C

    and X the sum of d x^T: what the float model's input is more, is as before. Sums of |x| and its extremes do not say
    what those of x' are: there are none. Of a diagonal entry of the Gram matrix there remains at least what float32
    can't tell from zero.

    Args:
      stats: with batch axes alike, `[batch, n, n]` and so on.
      right: B, `[batch, r, n]`.
      taken: C, `[batch, r, n]`.
    """
    dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    down = taken.swapaxes(-1, -2)  # C^T
    gram, cross = stats.gram, stats.cross
    if gram is not None:
        right, taken, down = (a.astype(gram.dtype) for a in (right, taken, down))
        part = dot(gram, right.swapaxes(-1, -2))  # H B^T
        left = gram - dot(part, taken)
        left = left - dot(down, dot(right, left))
        floor = _FLOAT32 * jnp.diagonal(gram, axis1=-2, axis2=-1)
        gram = (left + left.swapaxes(-1, -2)) / 2 + floor[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    if cross is not None:
        cross = cross - dot(dot(cross, right.swapaxes(-1, -2)), taken)
    return Stats(gram, None, None, stats.tokens, cross=cross)


_FLOAT32 = 2.0**-20


def checked_gram(name: str, rows: jax.Array, stats: Stats | None) -> jax.Array:
    """The Gram matrices `[batch, n, n]` that the method `name` needs for rows `[batch, m, n]`, or a ValueError."""
    gram = None if stats is None else stats.gram
    return _checked(name, rows, gram, "Gram matrix", "calibrate with needs={'gram'}")


def checked_cross(name: str, rows: jax.Array, stats: Stats | None) -> jax.Array:
    """The cross matrices, likewise."""
    cross = None if stats is None else stats.cross
    return _checked(name, rows, cross, "cross matrix", "only the walk of `quantize`, which runs both models, has it")


def _checked(name: str, rows: jax.Array, matrix: jax.Array | None, what: str, where: str) -> jax.Array:
    batch, _, n = rows.shape
    if matrix is None:
        raise ValueError(f"{name}: needs stats with a {what}; {where}")
    if matrix.shape != (batch, n, n):
        raise ValueError(f"{name}: rows {rows.shape} need a {what} {(batch, n, n)}, not {matrix.shape}")
    return matrix
