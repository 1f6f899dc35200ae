"""A kernel for one matrix, as a product with batch axes, in parts on the devices of a mesh, with a batching rule."""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType

from jquant.ops.platform import on_cuda
from jquant.ops.shards import on_shards

# A part of a row that a device may hold has whole words of every plane.
_PART = 32


class Static(NamedTuple):
    """What is known of a product beside its arrays.

    Attributes:
      kernel: `(x, w, how) -> [tokens, rows]` for the arrays of one matrix: x `[tokens, m]`, w `[rows, m]`.
      how: for the kernel.
      batch: so many leading axes of all arrays hold separate products.
      group_size: elements of a row of the weight that share a scale; None where all do.
    """

    kernel: Callable[[Any, Any, Any], jax.Array]
    how: Hashable
    batch: int
    group_size: int | None


@partial(jax.jit, static_argnames="static", inline=True)  # layers of the same shapes are traced once
def product(x: Any, w: Any, static: Static) -> jax.Array:
    """`[*batch, tokens, *others]`: each device multiplies its own tokens, batch axes and rows.

    Where it holds a part of every row, the results of the parts are added. No weight is sent.

    Args:
      x: arrays `[*batch, tokens, m]`, the first of them with all n contracted elements.
      w: arrays `[*batch, *others (or 1), m]`, the first of them with every kept axis; an m that is not 1 goes with n.
    """
    leaves, tree = jax.tree.flatten((x, w))

    def run(*leaves: jax.Array) -> tuple[jax.Array]:
        x, w = jax.tree.unflatten(tree, leaves)
        return (_whole(x, w, static),)

    ins, out, sizes = _axes(x, w, static)
    parted = custom_vmap(on_shards(partial(on_cuda, run), leaves, ins, [out], sizes=sizes, summed="k"))

    def mapped(size: int, in_batched: Any, *leaves: jax.Array) -> Any:
        x, w = jax.tree.unflatten(tree, leaves)
        is_x, is_w = jax.tree.unflatten(tree, in_batched)
        every = lambda a, is_mapped: a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
        x = jax.tree.map(every, x, is_x)
        if not any(jax.tree.leaves(is_w)):  # more rows: the weight is still read once
            out = product(jax.tree.map(lambda a: _join(a, static.batch), x), w, static)
            return (_part(out, static.batch, size),), (True,)
        return (product(x, jax.tree.map(every, w, is_w), static._replace(batch=static.batch + 1)),), (True,)

    parted.def_vmap(mapped)
    return parted(*leaves)[0]


def _join(x: jax.Array, batch: int) -> jax.Array:
    """`[size, *batch, tokens, n]` -> `[*batch, size tokens, n]`."""
    x = jnp.moveaxis(x, 0, batch)
    return x.reshape(*x.shape[:batch], -1, x.shape[-1])


def _part(out: jax.Array, batch: int, size: int) -> jax.Array:
    """`[*batch, size tokens, *others]` -> `[size, *batch, tokens, *others]`."""
    out = out.reshape(*out.shape[:batch], size, -1, *out.shape[batch + 1 :])
    return jnp.moveaxis(out, batch, 0)


def _whole(x: Any, w: Any, static: Static) -> jax.Array:
    """The kernel, the axes of its arrays put together as it takes them."""
    kept = jax.tree.leaves(w)[0].shape[:-1]
    others = kept[static.batch :]

    def rows(a: jax.Array) -> jax.Array:  # [*batch, *others or 1, m] -> [*batch, rows, m]
        whole = jnp.broadcast_to(a, (*kept, a.shape[-1]))
        return whole.reshape(*whole.shape[: static.batch], -1, whole.shape[-1])

    run = lambda x, w: static.kernel(x, w, static.how)
    for _ in range(static.batch):
        run = jax.vmap(run)
    out = run(x, jax.tree.map(rows, w))
    return out.reshape(*out.shape[:-1], *others)


def _axes(x: Any, w: Any, static: Static) -> tuple[list[str], str, dict[str, int]]:
    """For `on_shards`: letters of the axes of each array and of the result, and in how many parts they can be cut.

    t: tokens; k: contracted, cut where groups and words end together; the kept axes of the weight from A on.
    """
    inputs, weights = jax.tree.leaves(x), jax.tree.leaves(w)
    kept = dict(zip("ABCDEFGHIJ", weights[0].shape[:-1]))
    n, unit = inputs[0].shape[-1], unit_of(static.group_size)
    names, lead = "".join(kept), "".join(kept)[: static.batch]
    last = lambda a: "-" if n % unit or n == unit or a.shape[-1] == 1 else "k"

    def of(a: jax.Array) -> str:
        return "".join(c if size == kept[c] else "-" for c, size in zip(kept, a.shape)) + last(a)

    sizes = kept | {"t": inputs[0].shape[-2], "k": max(1, n // unit)}
    ins = [*(f"{lead}t{last(a)}" for a in inputs), *map(of, weights)]
    return ins, f"{lead}t{names[static.batch :]}", sizes


def unit_of(group_size: int | None) -> int:
    """Elements of a row at whose multiples it may be cut."""
    return math.lcm(group_size or 1, _PART)


def explicit(*arrays: Any) -> bool:
    """Whether one lies on a mesh whose axes are in types: no rule says how a kernel is cut over those."""
    return any(AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in arrays)
