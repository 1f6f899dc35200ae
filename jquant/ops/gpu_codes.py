"""The product of two operands of codes on an NVIDIA GPU: the kernel of `pallas_kernels.low_precision_matmul`.

It knows scales, no zero points. With the letters of `ops.low_precision`:

    out = r ( K  -  sum_g A_g s_g y_g  -  z (S - sum_g |g| s_g y_g) )

K is what the kernel computes, sum_g s_g sum_(k in g) a_k u_k; A_g the sum of the input's codes over a group; and
S = sum_g s_g sum_(k in g) u_k is K for an input of ones: one more row, so that the weight is still read once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import BlockParams, Format
from jquant.core.qtensor import QTensor
from jquant.ops import parted
from jquant.ops.gpu import OUT
from jquant.ops.operands import Side, floats8, integers
from pallas_kernels.low_precision_matmul import low_precision_matmul
from pallas_kernels.low_precision_matmul.triton import why_not as why_no_kernel

OPERANDS = {"int": integers, "fp8": floats8}


def _weights(kind: str, codes: jax.Array, zero: jax.Array | None, fmt: Format) -> Side:
    """The weight as the kernel reads it: codes of 8 bits as they are kept, with no pass over them."""
    side = OPERANDS[kind](codes, zero, fmt)
    return side._replace(codes=codes) if kind == "int" and fmt.bits == 8 and not fmt.symmetric else side


class Operand(NamedTuple):
    """Codes `[*batch, tokens, n]` or `[*batch, *others, n]`, and what multiplies them and what is taken from them.

    Codes are int8 (those of a weight also uint8: 128 more) or fp8; the scale is float32, the zero point int32 or None,
    both `[*batch, tokens, 1]` or `[*batch, *others (or 1), blocks]`.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class _How(NamedTuple):
    group_size: int | None
    out_dtype: Any
    interpret: bool


def why_not(codes: jax.Array, q: QTensor, kind: str, out_dtype: Any) -> str | None:
    """Why a GPU does not run the kernel for a product of `codes` with `q`; None where it does."""
    assert q.activation is not None
    if parted.explicit(codes, *q.codes):
        return "a mesh with explicit axes"
    if jnp.dtype(out_dtype).name not in OUT:
        return f"the result is {jnp.dtype(out_dtype).name}"
    if 0 in (codes.size, q.size):
        return "an empty product"
    input_dtype, weight_dtype = (_dtype(kind, fmt) for fmt in (q.activation.format, q.format))
    return why_no_kernel(input_dtype, weight_dtype, q.format.group_size)


def _dtype(kind: str, fmt: Format) -> Any:
    """Of the operand that codes of a format become."""
    code, zero = jax.ShapeDtypeStruct((1, 1), jnp.uint8), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    side = lambda code, zero: OPERANDS[kind](code, None if fmt.symmetric else zero, fmt).codes
    return jax.eval_shape(side, code, zero).dtype


def dot(
    codes: jax.Array, params: BlockParams, q: QTensor, kind: str, *, batch: Sequence[int] = (), out_dtype: Any,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """The product of a rounded input with the codes of `q`: `[*batch axes, tokens, *other kept axes]`.

    Args:
      codes, params: as `encode_input` gives them.
      q, batch: as for `ops.low_precision.dot`.
      kind: of `OPERANDS`.
      out_dtype: of the result.
      interpret: run the kernel on any machine, slowly.
    """
    assert q.activation is not None
    first = [q.kept.index(a) for a in batch]
    each = lambda a: jnp.broadcast_to(a, (*codes.shape[:-1], 1))
    scale, zero = q.row_params()
    input_zero = None if params.zero_point is None else each(params.zero_point)
    a = OPERANDS[kind](codes, input_zero, q.activation.format)
    u = _weights(kind, q.unpacked(), zero, q.format)
    x = Operand(a.codes, each(params.scale.astype(jnp.float32)), a.zero)
    w = jax.tree.map(lambda a: jnp.moveaxis(a, first, range(len(first))), Operand(u.codes, scale, u.zero))
    how = _How(q.format.group_size, jnp.dtype(out_dtype), interpret)
    return parted.product(x, w, parted.Static(_kernel, how, len(batch), q.format.group_size))


def _kernel(x: Operand, w: Operand, how: _How) -> jax.Array:
    """One matrix: `[tokens, rows]`."""
    exact = x.zero is None and w.zero is None
    one = 0 if x.zero is None else 1
    ones = jnp.ones((one, x.codes.shape[-1]), x.codes.dtype)
    scale = jnp.pad(x.scale, [(0, one), (0, 0)], constant_values=1)
    out = low_precision_matmul(
        jnp.concatenate([x.codes, ones]), w.codes, scale, w.scale, group_size=how.group_size,
        out_dtype=how.out_dtype if exact else jnp.float32, interpret=how.interpret,
    )  # fmt: skip
    if exact:
        return out
    sums, last = out[: len(x.codes)], out[len(x.codes) :]
    return (sums - x.scale * _of_zeros(x, w, how.group_size, last)).astype(how.out_dtype)


def _of_zeros(x: Operand, w: Operand, group: int | None, ones: jax.Array) -> jax.Array:
    """What the zero points add to the sums, without the input's scale: float32 `[tokens, rows]`. `ones` is S."""
    n = x.codes.shape[-1]
    group = min(group or n, n)
    out, shift = jnp.zeros((), jnp.float32), None
    if w.zero is not None:
        shift = w.scale * w.zero.astype(jnp.float32)  # s y, [rows, blocks]
        padded = jnp.pad(x.codes, [(0, 0), (0, -n % group)])
        sums = jnp.sum(padded.reshape(len(padded), -1, group), axis=-1, dtype=jnp.int32).astype(jnp.float32)
        out = jnp.matmul(sums, shift.T, precision=lax.Precision.HIGHEST)
    if x.zero is not None:
        if shift is not None:
            # No array of NumPy may be in what is cut over a mesh.
            sizes = jnp.minimum(group, n - group * jnp.arange(-(-n // group)))
            ones = ones - jnp.sum(shift * sizes.astype(jnp.float32), axis=-1)
        out = out + x.zero.astype(jnp.float32) * ones
    return out
