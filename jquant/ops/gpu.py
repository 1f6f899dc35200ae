"""The product with a QTensor on an NVIDIA GPU: the kernel of `pallas_kernels.quantized_matmul`.

It reads the arrays of a QTensor as they lie: rows of packed codes, one or more scales for each.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.qtensor import QTensor
from jquant.core.scales import scale_values
from jquant.ops import parted
from pallas_kernels.quantized_matmul import quantized_matmul, rings
from pallas_kernels.quantized_matmul.elements import ELEMENTS
from pallas_kernels.quantized_matmul.tilings import FEW
from pallas_kernels.quantized_matmul.triton import small_groups, weight_of
from pallas_kernels.quantized_matmul.triton import why_not as why_no_kernel

OUT = ("bfloat16", "float16", "float32")


class Weight(NamedTuple):
    """Codes `[*batch, *others, bytes]`; scales and zero points `[*batch, *others (or 1), blocks]`."""

    planes: tuple[jax.Array, ...]
    scale: jax.Array
    zero: jax.Array | None


class _How(NamedTuple):
    """The static arguments of the kernel."""

    element: str
    group_size: int | None
    out_dtype: Any
    exact: bool
    interpret: bool


def why_not(
    x: jax.Array, q: QTensor, batch: Sequence[int], weight_dtype: Any, out_dtype: Any, dtype: Any = None
) -> str | None:
    """Why a GPU does not run the kernel for a product; None where it does.

    Args:
      x, q, batch: as for `ops.dot`; `q` has no side.
      weight_dtype: of the weight when it is multiplied.
      out_dtype: of the result.
      dtype: of the input when it is multiplied; that of `x` by default.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if parted.explicit(x, *q.codes):
        return "a mesh with explicit axes"
    if q.format.element not in ELEMENTS:
        return f"{q.format.element} has no kernel"
    if jnp.dtype(weight_dtype) != dtype:
        return f"the input is {dtype}, the weight {jnp.dtype(weight_dtype).name}"
    if jnp.dtype(out_dtype).name not in OUT:
        return f"the result is {jnp.dtype(out_dtype).name}"
    rows = math.prod(s for a, s in zip(q.kept, q.codes[0].shape) if a not in batch)
    return why_no_kernel(q.format.element, q.format.group_size, q.row_length, rows, dtype)


def writes_out(x: jax.Array) -> bool:
    """Whether the kernel decodes the weight into memory for XLA's product, rather than multiplying itself."""
    return x.shape[-2] > FEW and x.dtype.itemsize == 2


def hopper(x: jax.Array, q: QTensor, batch: Sequence[int]) -> bool:
    """Whether a Hopper GPU runs a kernel of its own, through Mosaic, where others run Triton's; `why_not` has none."""
    w, _ = jax.eval_shape(lambda q: arrays(q, batch), q)
    rows = lambda a: jax.ShapeDtypeStruct((math.prod(a.shape[len(batch) : -1]), a.shape[-1]), a.dtype)
    planes, scale, zero = jax.tree.map(rows, w)
    return rings.preferred("h100", q.format.element, q.format.group_size, x, planes, scale, zero)


def why_not_exact(x: jax.Array, q: QTensor, batch: Sequence[int], out_dtype: Any) -> str | None:
    """`why_not` for an input of codes, which are numbers of bfloat16, where the product of the codes is to be exact.

    Scales of small groups multiply the weight's codes, rounded to bfloat16, not the sums.
    """
    bf16, fmt, n = jnp.dtype("bfloat16"), q.format, q.row_length
    if x.shape[-2] > FEW:
        return f"more than {FEW} rows, for which the kernel of packed codes is not made"
    reason = why_not(x, q, batch, bf16, out_dtype, bf16)
    if reason is not None or fmt.blocks(n) == 1:
        return reason
    if small_groups(weight_of(fmt.element, fmt.group_size, n, None, bf16)):
        return f"groups of {fmt.group_size}, whose scales the kernel of packed codes rounds to bfloat16"
    return None


def dot(
    x: jax.Array,
    q: QTensor,
    *,
    batch: Sequence[int] = (),
    out_dtype: Any = None,
    exact: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`ops.dot` by the kernel, the codes of `q` alone: `[*batch axes, tokens, *other kept axes]`.

    Each device of a mesh multiplies its own tokens, batch axes and rows; where it holds a part of every row, the
    results of the parts are added. No weight is sent.

    Args:
      x, q, batch: as for `ops.dot`.
      out_dtype: of the result; that of `x` by default.
      exact: the weight is not rounded, however many rows a `vmap` makes of those of `x`: see `why_not_exact`.
      interpret: run the kernel on any machine, slowly.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    weight, after = arrays(q, batch)
    dtype = out_dtype if after is None else jnp.dtype(jnp.float32)
    how = _How(q.format.element, q.format.group_size, dtype, exact, interpret)
    out = parted.product((x,), weight, parted.Static(_kernel, how, len(batch), q.format.group_size))
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


def _kernel(x: tuple[jax.Array], w: Weight, how: _How) -> jax.Array:
    static: dict[str, Any] = how._asdict()
    return quantized_matmul(x[0], w.planes, w.scale, w.zero, **static)
