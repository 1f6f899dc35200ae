"""Products whose rows belong to different experts, one run of rows for each: `lax.ragged_dot` on codes.

Expert by expert, in blocks of rows: what is decoded is at most one expert, and of an expert without rows nothing is
read. A GPU multiplies a few rows by all experts in one kernel instead, the rows of other experts being zeros: a loop
whose length it does not know makes it wait for the host at every expert.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core import kept
from jquant.core.qtensor import QTensor
from jquant.ops.choice import How
from jquant.ops.dot import dot as dense_dot

_EXPERTS = -3
# Rows of a GPU's program that are multiplied by every expert.
_FEW = 64


def dot(
    x: jax.Array, q: QTensor, sizes: jax.Array, plain: Callable[[jax.Array, QTensor, jax.Array], jax.Array], **how: Any
) -> tuple[jax.Array, How]:
    """`[m, rows of the weight]`: each row of `x` times the weight of its expert; zeros where it has none.

    Args:
      x: `[m, n]`, the rows of the first expert, those of the second one, and so on.
      q: the weights, three axes, the first of them the experts.
      sizes: int `[experts]`, how many rows each has.
      plain: the same on the decoded weights, for the derivative and the dtype.
      how: of `ops.dot`: `cast`, `precision`, `preferred`, `kernels`.
    """
    q = q.replace(activation=None, activation_params=None)  # the input has been rounded before
    found: list[How] = []

    def product(x: jax.Array, q: QTensor, batch: tuple[int, ...] = ()) -> jax.Array:
        out, ran = dense_dot(x, q, batch=batch, **how)
        found.append(ran)
        return out

    def in_turn(x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array:
        return _in_turn(product, x, q, sizes, dtype)

    def at_once(x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array:
        return _at_once(lambda x, q: product(x, q, (_EXPERTS,)), x, q, sizes).astype(dtype)

    dtype = jax.eval_shape(plain, x, q, sizes).dtype
    more = {"cuda": at_once} if 0 < x.shape[0] <= _FEW else {}
    run = jax.custom_jvp(lambda *args: lax.platform_dependent(*args, default=in_turn, **more))
    run.defjvp(lambda primals, tangents: (run(*primals), jax.jvp(plain, primals, tangents)[1]))
    if 0 in (x.size, q.size):
        return plain(x, q, sizes), How("no elements")
    out = run(x, q, sizes)
    ran = found[-1]
    return out, ran._replace(text=f"expert by expert, {ran.text}")


def _ends(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    return ends - sizes.astype(jnp.int32), ends


def block_rows(m: int, experts: int) -> int:
    """Rows of a block: about twice those of an expert that has its share."""
    share = 1 << max(2 * m // experts - 1, 0).bit_length()
    return min(m, max(8, min(512, share)))


def _in_turn(product: Callable[..., jax.Array], x: jax.Array, q: QTensor, sizes: jax.Array, dtype: Any) -> jax.Array:
    m, experts, rows = x.shape[0], q.shape[_EXPERTS], math.prod(q.codes[0].shape[1:-1])
    size = block_rows(m, experts)
    starts, ends = _ends(sizes)

    def expert(e: jax.Array, out: jax.Array) -> jax.Array:
        mine = kept.remove_axis(kept.slice_axis(q, _EXPERTS, e, 1), _EXPERTS)

        def block(i: jax.Array, out: jax.Array) -> jax.Array:
            first = starts[e] + i * size
            at = jnp.minimum(first, m - size)  # the last block begins before its first row
            new = product(lax.dynamic_slice_in_dim(x, at, size), mine).astype(dtype)
            row = at + jnp.arange(size)
            old = lax.dynamic_slice_in_dim(out, at, size)
            own = ((row >= first) & (row < ends[e]))[:, None]
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, new, old), at, 0)

        return lax.fori_loop(0, -(-(ends[e] - starts[e]) // size), block, out)

    return lax.fori_loop(0, experts, expert, jnp.zeros((m, rows), dtype))


def _at_once(product: Callable[..., jax.Array], x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array:
    starts, ends = _ends(sizes)
    row = jnp.arange(x.shape[0])
    own = (row >= starts[:, None]) & (row < ends[:, None])  # [experts, m]
    out = product(jnp.where(own[..., None], x, jnp.zeros((), x.dtype)), q)
    return jnp.sum(jnp.where(own[..., None], out, jnp.zeros((), out.dtype)), axis=0)
