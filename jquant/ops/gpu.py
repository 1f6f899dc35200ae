"""The product with a QTensor on an NVIDIA GPU: the kernel of `pallas_kernels.quantized_matmul`.

It reads the arrays of a QTensor as they lie: rows of packed codes, one or more scales for each.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType

from jquant.core.qtensor import QTensor
from jquant.core.scales import scale_values
from jquant.ops.shards import on_shards
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.elements import ELEMENTS
from pallas_kernels.quantized_matmul.triton import why_not as why_no_kernel

# A part of a row that a device may hold has whole words of every plane.
_PART = 32
_OUT = ("bfloat16", "float16", "float32")


class Weight(NamedTuple):
    """Codes `[*batch, *others, bytes]`; scales and zero points `[*batch, *others (or 1), blocks]`."""

    planes: tuple[jax.Array, ...]
    scale: jax.Array
    zero: jax.Array | None


class _Static(NamedTuple):
    """What is known of a product beside its arrays: `batch` leading axes hold separate products."""

    batch: int
    element: str
    group_size: int | None
    out_dtype: Any
    interpret: bool


def why_not(x: jax.Array, q: QTensor, batch: Sequence[int], weight_dtype: Any, out_dtype: Any) -> str | None:
    """Why a GPU does not run the kernel for a product; None where it does.

    Args:
      x, q, batch: as for `ops.dot`; `q` has no side.
      weight_dtype: of the weight when it is multiplied.
      out_dtype: of the result.
    """
    if any(AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in (x, *q.codes)):
        return "a mesh with explicit axes"
    if q.format.element not in ELEMENTS:
        return f"{q.format.element} has no kernel"
    if jnp.dtype(weight_dtype) != x.dtype:
        return f"the input is {x.dtype}, the weight {jnp.dtype(weight_dtype).name}"
    if jnp.dtype(out_dtype).name not in _OUT:
        return f"the result is {jnp.dtype(out_dtype).name}"
    rows = math.prod(s for a, s in zip(q.kept, q.codes[0].shape) if a not in batch)
    return why_no_kernel(q.format.element, q.format.group_size, q.row_length, rows, x.dtype)


def dot(
    x: jax.Array, q: QTensor, *, batch: Sequence[int] = (), out_dtype: Any = None, interpret: bool = False
) -> jax.Array:
    """`ops.dot` by the kernel, the codes of `q` alone: `[*batch axes, tokens, *other kept axes]`.

    Each device of a mesh multiplies its own tokens, batch axes and rows; where it holds a part of every row, the
    results of the parts are added. No weight is sent.

    Args:
      x, q, batch: as for `ops.dot`.
      out_dtype: of the result; that of `x` by default.
      interpret: run the kernel on any machine, slowly.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    weight, after = arrays(q, batch)
    dtype = out_dtype if after is None else jnp.dtype(jnp.float32)
    out = _product(x, weight, _Static(len(batch), q.format.element, q.format.group_size, dtype, interpret))
    if after is None:
        return out
    return (out * jnp.expand_dims(after[..., 0], len(batch))).astype(out_dtype)


def arrays(q: QTensor, batch: Sequence[int] = ()) -> tuple[Weight, jax.Array | None]:
    """What the kernel reads, and float32 `[*batch, *others (or 1), 1]` that multiplies its result, or None.

    Scales of a tile are repeated for its rows. Scales of a second level are multiplied out where they are not those of
    whole rows.
    """
    q = q.check().untiled()
    first = [q.kept.index(a) for a in batch]
    place = lambda a: jnp.moveaxis(a, first, range(len(first)))
    scale, after = q.scale, None
    if q.outer and q.format.scale_dtype != "uint8" and q.format.outer_block in ("tensor", "channel"):
        after = place(q.outer[0].astype(jnp.float32))
    elif q.outer:
        scale = scale_values(q.scale, q.outer, q.format)
    return jax.tree.map(place, Weight(q.codes, scale, q.zero_point)), after


@partial(jax.jit, static_argnames="how", inline=True)  # layers of the same shapes are traced once
def _product(x: jax.Array, w: Weight, how: _Static) -> jax.Array:
    """`x` `[*batch, tokens, n]`: each device's part of it, with a batching rule."""
    leaves, tree = jax.tree.flatten((x, w))

    def run(*leaves: jax.Array) -> tuple[jax.Array]:
        x, w = jax.tree.unflatten(tree, leaves)
        return (_kernel(x, w, how),)

    ins, out, sizes = _axes(x, w, how)
    parted = custom_vmap(on_shards(run, leaves, ins, [out], sizes=sizes, summed="k"))

    def mapped(size: int, in_batched: Any, *leaves: jax.Array) -> Any:
        x, w = jax.tree.unflatten(tree, leaves)
        is_x, is_w = jax.tree.unflatten(tree, in_batched)
        if not any(jax.tree.leaves(is_w)):  # more rows: the weight is still read once
            out = _product(_join(x, how.batch), w, how)
            return (_part(out, how.batch, size),), (True,)
        every = lambda a, is_mapped: a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
        more = how._replace(batch=how.batch + 1)
        return (_product(every(x, is_x), jax.tree.map(every, w, is_w), more),), (True,)

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


def _kernel(x: jax.Array, w: Weight, how: _Static) -> jax.Array:
    """The kernel, its axes put together as it takes them."""
    others = w.planes[0].shape[how.batch : -1]

    def rows(a: jax.Array) -> jax.Array:  # [*batch, *others, m] -> [*batch, rows, m]
        whole = jnp.broadcast_to(a, (*w.planes[0].shape[:-1], a.shape[-1]))
        return whole.reshape(*whole.shape[: how.batch], -1, whole.shape[-1])

    def run(x: jax.Array, w: Weight) -> jax.Array:
        static: dict[str, Any] = how._asdict()
        del static["batch"]
        return quantized_matmul(x, *w, **static)

    for _ in range(how.batch):
        run = jax.vmap(run)
    out = run(x, jax.tree.map(rows, w))
    return out.reshape(*out.shape[:-1], *others)


def _axes(x: jax.Array, w: Weight, how: _Static) -> tuple[list[str], str, dict[str, int]]:
    """For `on_shards`: letters of the axes of each array and of the result, and in how many parts they can be cut.

    t: tokens; k: contracted, cut where groups and words end together; the kept axes of the weight from A on.
    """
    kept = dict(zip("ABCDEFGHIJ", w.planes[0].shape[:-1]))
    n, unit = x.shape[-1], math.lcm(how.group_size or 1, _PART)
    k, blocks = ("-" if n % unit else "k"), ("-" if n % unit or how.group_size is None else "k")
    names, lead = "".join(kept), "".join(kept)[: how.batch]

    def of(a: jax.Array, last: str) -> str:
        return "".join(c if size == kept[c] else "-" for c, size in zip(kept, a.shape)) + last

    weight = [*(of(p, k) for p in w.planes), of(w.scale, blocks), *([] if w.zero is None else [of(w.zero, blocks)])]
    sizes = kept | {"t": x.shape[-2]} | ({} if n % unit else {"k": n // unit})
    return [f"{lead}t{k}", *weight], f"{lead}t{names[how.batch :]}", sizes
