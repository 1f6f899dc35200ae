"""Products of activations with a QTensor."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core import side as _side
from jquant.core.qtensor import QTensor

DECODED = "XLA: codes decoded into the product"
ONE_ROW = "on a CPU one pass over the packed codes; elsewhere " + DECODED


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
    if q.side is not None:
        run = lambda q, wide: dot(x, q, batch=batch, cast=cast, precision=precision, preferred=preferred or wide)
        return beside(run, x, q, batch, precision)

    def decoded(x: jax.Array, q: QTensor) -> jax.Array:
        rows = cast(q.rows().astype(q.dtype))
        first = [q.kept.index(a) for a in batch]
        b = len(first)
        numbers = (((x.ndim - 1,), (rows.ndim - 1,)), (tuple(range(b)), tuple(first)))
        return jax.lax.dot_general(x, rows, numbers, precision=precision, preferred_element_type=preferred)

    if batch or not reads_one_row(x, q):
        return decoded(x, q), DECODED
    dtype = jax.eval_shape(decoded, x, q).dtype
    # Chosen when the program is lowered, for the platform it is lowered for.
    out = jax.lax.platform_dependent(x, q, cpu=lambda x, q: one_row(x, q).astype(dtype), default=decoded)
    return out, ONE_ROW


def beside(
    run: Callable[[QTensor, Any], tuple[jax.Array, str]], x: jax.Array, q: QTensor, batch: Sequence[int], precision: Any
) -> tuple[jax.Array, str]:
    """A product of `x` `[*batch axes, tokens, n]` with codes and with the side of `q`, which is never made an array.

    Args:
      run: `(q without its side, dtype to sum in) ->` the product with the codes, and its name.
    """
    assert q.side is not None
    more = _side.product(x, q.side, [q.kept.index(a) for a in batch], precision)
    out, name = run(q.replace(side=None), more.dtype)
    return out + more.astype(out.dtype), f"{name}; beside it a side of rank {q.side.rank}, as two thin products"


def reads_one_row(x: jax.Array, q: QTensor) -> bool:
    """Whether `one_row` can do the product: one token, 4- or 8-bit integers, groups that divide the row."""
    fmt, n = q.format, q.row_length
    fits = fmt.group_size is None or (n % fmt.group_size == 0 and fmt.group_size % 2 == 0)
    return x.shape[:-1] == (1,) and fmt.element in ("int4", "int8") and n % 2 == 0 and fits


def one_row(x: jax.Array, q: QTensor) -> jax.Array:
    """`x` `[1, n]` with the codes of `q`: float32 `[1, *kept]`.

    A product with one vector is bound by memory, and XLA:CPU writes a decoded weight out before it multiplies (four to
    eight times the bytes of the codes). Here codes are multiplied as they are, scales and zero points act on the sums
    of whole groups:

        sum_k (u_k - z) s x_k  =  s (sum_k u_k x_k  -  z sum_k x_k)
    """
    fmt, n = q.format, q.row_length
    half = 2 ** (fmt.bits - 1) if fmt.symmetric else 0  # two's complement, shifted to start at zero
    codes, row = q.codes[0] ^ np.uint8(half * (1 if fmt.bits == 8 else 17)), x[0].astype(jnp.float32)
    group = fmt.group_size or n
    blocks = (*codes.shape[:-1], n // group, group * fmt.bits // 8)
    if fmt.bits == 8:
        terms = codes.astype(jnp.float32) * row
    else:
        even, odd = row[0::2], row[1::2]
        terms = (codes & np.uint8(15)).astype(jnp.float32) * even + (codes >> np.uint8(4)).astype(jnp.float32) * odd
    sums = jnp.sum(terms.reshape(blocks), axis=-1)
    scale, zero_point = q.row_params()
    zero = jnp.float32(half) if zero_point is None else zero_point
    sums = sums - zero * jnp.sum(row.reshape(n // group, group), axis=-1)
    return jnp.sum(sums * scale, axis=-1)[None]
