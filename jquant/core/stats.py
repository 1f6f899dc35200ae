"""`Stats`: what calibration accumulated at a site. A pytree of float32 sums; adding two is merging two batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Stats(NamedTuple):
    """Sums over the tokens (rows x of the site's input, `[tokens, n]`) that calibration saw.

    `batch` are the axes of the weight that are neither contracted nor produced by the matmul: experts, stacked layers.
    n is the length of the flattened contracted axes, in the order of `QTensor` rows. All float32.

    Attributes:
      gram: `[*batch, n, n]`, the sum of x x^T, or None where no method asked for it.
      abs_sum: `[*batch, n]`, the sum of |x|.
      absmax: `[*batch, n]`, the largest |x|.
      tokens: `[*batch]`, the number of tokens.
    """

    gram: jax.Array | None
    abs_sum: jax.Array
    absmax: jax.Array
    tokens: jax.Array

    @property
    def mean_abs(self) -> jax.Array:
        """Mean |x| per channel, `[*batch, n]`; zeros where no token was seen."""
        return self.abs_sum / jnp.maximum(self.tokens, 1.0)[..., None]


def merge(a: Stats, b: Stats) -> Stats:
    """The stats of both sets of tokens together."""
    gram = None if a.gram is None or b.gram is None else a.gram + b.gram
    return Stats(gram, a.abs_sum + b.abs_sum, jnp.maximum(a.absmax, b.absmax), a.tokens + b.tokens)
