"""Products of activations with a QTensor."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jquant.core.qtensor import QTensor


def dot(
    x: jax.Array,
    q: QTensor,
    *,
    batch: Sequence[int] = (),
    cast: Callable[[jax.Array], jax.Array] = lambda w: w,
    precision: Any = None,
    preferred: Any = None,
) -> tuple[jax.Array, str]:
    """Contracts the last axis of `x` with the contracted axes of `q`.

    Args:
      x: `[*batch axes, tokens, n]`.
      q: the weight, n elements along its contracted axes.
      batch: axes of `q` that `x` has too, in front (experts).
      cast: the casts that the weight goes through before the product.
      precision, preferred: as for `jax.lax.dot_general`.

    Returns:
      `[*batch axes, tokens, *other kept axes]`, and the name of the implementation.
    """
    rows = cast(q.rows().astype(q.dtype))
    first = [q.kept.index(a) for a in batch]
    b = len(first)
    numbers = (((x.ndim - 1,), (rows.ndim - 1,)), (tuple(range(b)), tuple(first)))
    out = jax.lax.dot_general(x, rows, numbers, precision=precision, preferred_element_type=preferred)
    return out, "XLA: codes decoded into the product"
