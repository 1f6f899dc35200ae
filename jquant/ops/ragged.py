"""Products whose rows belong to different experts, one run of rows for each: `lax.ragged_dot` on codes.

Expert by expert, in blocks of rows: what is decoded is at most one expert, and of an expert without rows nothing is
read. A GPU multiplies a few rows by all experts in one kernel instead, the rows of other experts being zeros: a loop
whose length it does not know makes it wait for the host at every expert.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jquant.core import kept
from jquant.core.qtensor import QTensor
from jquant.ops import parted
from jquant.ops.choice import How
from jquant.ops.dot import dot as dense_dot
from jquant.ops.platform import opaque
from jquant.ops.shards import on_shards

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
    if 0 in (x.size, q.size):
        return plain(x, q, sizes), How("no elements")
    dtype = jax.eval_shape(plain, x, q, sizes).dtype
    few, found = x.shape[0] <= _FEW, []

    def at_once(x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array:
        def product(x: jax.Array, q: QTensor) -> jax.Array:
            out, ran = dense_dot(x, q, batch=(_EXPERTS,), **how)
            found.append(ran)
            return out

        return _at_once(product, x, q, sizes).astype(dtype)

    def in_turn(x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array:
        def product(x: jax.Array, q: QTensor) -> jax.Array:
            out, ran = dense_dot(x, q, **how | ({"kernels": "never"} if few else {}))
            found.append(ran)
            return out

        (starts, ends), q, run = _ends(sizes), q.check().untiled(), partial(_in_turn, product, dtype)
        if how["kernels"] == "never" or parted.explicit(x, *q.codes):
            return run(x, q, starts, ends)
        return _parted(run, x, q, starts, ends)

    # Chosen when the program is lowered, for the platform it is lowered for.
    choose = partial(lax.platform_dependent, default=in_turn, **({"cuda": at_once} if few else {}))
    run = jax.custom_jvp(lambda *args: choose(*args))
    run.defjvp(lambda primals, tangents: (run(*primals), jax.jvp(plain, primals, tangents)[1]))
    jax.eval_shape(at_once if few else in_turn, x, q, sizes)  # says how; outside of jit only one branch is traced
    return run(x, q, sizes), found[0]._replace(text=f"expert by expert, {found[0].text}")


def apart(x: jax.Array, q: QTensor, sizes: jax.Array, precision: Any) -> tuple[jax.Array, jax.Array]:
    """`ops.dot.apart` of rows `[m, n]`, each with the factors of its expert: x' `[m, n]` and t `[m, r]`."""
    assert q.side is not None
    right, taken = (_of_experts(a, q, x.dtype) for a in (q.side.right, q.side.taken))
    thin = partial(_thin, sizes=sizes, precision=precision)
    t = thin(x, right.swapaxes(-1, -2)).astype(x.dtype)
    what = thin(t, taken)
    return (x.astype(what.dtype) - what).astype(x.dtype), t


def beside(
    run: Callable[[QTensor, Any], tuple[jax.Array, How]], t: jax.Array, q: QTensor, sizes: jax.Array, precision: Any
) -> tuple[jax.Array, How]:
    """`ops.dot.beside` of such rows."""
    assert q.side is not None
    left = q.side.left.reshape(q.side.left.shape[0], -1, q.side.rank).astype(t.dtype)
    more = _thin(t, left.swapaxes(-1, -2), sizes, precision)
    out, how = run(q.replace(side=None), None)
    return out + more.astype(out.dtype), how._replace(text=f"{how.text}; beside it a {q.side.words}")


def _of_experts(factor: Any, q: QTensor, dtype: Any) -> jax.Array:
    """B or C, `[experts, r, n]`."""
    r, n = factor.shape[-2:]
    return jnp.broadcast_to(factor, (q.codes[0].shape[0], *factor.shape[1:])).reshape(-1, r, n).astype(dtype)


def _thin(x: jax.Array, w: jax.Array, sizes: jax.Array, precision: Any) -> jax.Array:
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return lax.ragged_dot(x, w, sizes, precision=precision, preferred_element_type=wide)


def _ends(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    return ends - sizes.astype(jnp.int32), ends


def block_rows(m: int, experts: int) -> int:
    """Rows of a block: about twice those of an expert that has its share."""
    share = 1 << max(2 * m // experts - 1, 0).bit_length()
    return min(m, max(8, min(512, share)))


def _parted(run: Callable[..., jax.Array], x: jax.Array, q: QTensor, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """`run`: each device of a mesh multiplies by its own experts, rows and parts of rows; what they give is added."""
    leaves, tree = jax.tree.flatten((x, q, starts, ends))
    ins, sizes = _axes(x, q)
    flat = partial(opaque, lambda *leaves: (run(*jax.tree.unflatten(tree, leaves)),))
    run_parted = custom_vmap(on_shards(flat, leaves, ins, ["-n"], sizes=sizes, summed="ek"))

    def mapped(size: int, in_batched: Any, *leaves: jax.Array) -> Any:
        axes = [0 if is_mapped else None for is_mapped in in_batched]
        return jax.vmap(flat, axes, axis_size=size)(*leaves), (True,)

    run_parted.def_vmap(mapped)
    return run_parted(*leaves)[0]


def _axes(x: jax.Array, q: QTensor) -> tuple[list[str], dict[str, int]]:
    """For `on_shards`. e: experts; n: rows of a weight; k: contracted, cut where groups and words end together."""
    (experts, rows), length = q.codes[0].shape[:-1], q.row_length
    unit = parted.unit_of(q.format.group_size)
    whole = bool(q.outer) or q.side is not None or length % unit != 0 or length == unit

    def of(a: jax.Array) -> str:
        middle = "n" if a.shape[1] == rows > 1 else "-"
        last = "-" if whole or a.shape[-1] == 1 else "k"
        return ("e" if a.shape[0] == experts else "-") + middle + "-" * (a.ndim - 3) + last

    ins = ["-" + ("-" if whole else "k"), *map(of, jax.tree.leaves(q)), "e", "e"]
    return ins, {"e": experts, "n": rows, "k": max(1, length // unit)}


def _in_turn(
    product: Callable[..., jax.Array], dtype: Any, x: jax.Array, q: QTensor, starts: jax.Array, ends: jax.Array
) -> jax.Array:
    m, experts, rows = x.shape[0], q.shape[_EXPERTS], math.prod(q.codes[0].shape[1:-1])
    size = block_rows(m, experts)

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
