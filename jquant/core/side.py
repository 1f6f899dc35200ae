"""`Side`: a float matrix of low rank that stands beside the codes of a weight and is added to them.

It is held as two thin factors, S = A B, and a product reads them one after the other, x S^T = (x B^T) A^T: with r
columns that costs r (m + n) multiplications for a token, and S itself is never made.

The kept axes stand in both factors, in order and in front, as in the arrays of a `QTensor`; so a kept axis is sliced,
scanned, vmapped or sharded on all of them at once. The rows of a matrix share B, which has ones in place of their axes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


class Side(NamedTuple):
    """The factors of S.

    Attributes:
      left: A, `[*kept, r]`, float.
      right: B, `[*kept, r, n]`, float, ones in place of the kept axes that share it: the rows of a matrix do, experts
        and stacked layers have one each.
    """

    left: Any
    right: Any

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


jax.export.register_namedtuple_serialization(Side, serialized_name="jquant.Side")


def problem_of(side: Side, kept: Sequence[int], n: int) -> str:
    """Why a side does not belong to codes of kept axes of the sizes `kept` and rows of length n, or ""."""
    left, right = side
    for array in side:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return f"its side holds {array.dtype}, not floats"
    own = all(s in (1, k) for s, k in zip(right.shape, kept, strict=False))
    if left.shape[:-1] != tuple(kept) or right.shape[len(kept) :] != (side.rank, n) or not own:
        return f"its side of shapes {left.shape} and {right.shape} does not belong to {n} codes for each of {kept}"
    return ""


def _own(side: Side) -> list[int]:
    """Positions of the kept axes along which B differs."""
    return [i for i, size in enumerate(side.right.shape[:-2]) if size != 1]


def _squeezed(side: Side) -> jax.Array:
    """B, `[*own axes, r, n]`."""
    shape = side.right.shape
    return side.right.reshape([*(shape[i] for i in _own(side)), *shape[-2:]])


def rows(side: Side) -> jax.Array:
    """S as rows, float32 `[*kept, n]`."""
    kept = list(range(side.left.ndim - 1))
    r, n = len(kept), len(kept) + 1
    wide = [a.astype(jnp.float32) for a in (side.left, _squeezed(side))]
    return jnp.einsum(wide[0], [*kept, r], wide[1], [*_own(side), r, n], [*kept, n], precision=HIGHEST)


def product(x: jax.Array, side: Side, first: Sequence[int], precision: Any = None) -> jax.Array:
    """x S^T: two thin products in the dtype of `x`, summed in float32 (float64 if `x` is).

    Args:
      x: `[*batch axes, tokens, n]`.
      side: the factors.
      first: positions, among the kept axes, of the batch axes: those that `x` has too.
      precision: as for `jax.lax.dot_general`.

    Returns:
      `[*batch axes, tokens, *other kept axes]`, float32 (float64).
    """
    kept, own = list(range(side.left.ndim - 1)), _own(side)
    r, n, tokens = (len(kept) + i for i in range(3))
    left, right = (a.astype(x.dtype) for a in (side.left, _squeezed(side)))
    how = {"precision": precision, "preferred_element_type": jnp.float64 if x.dtype == jnp.float64 else jnp.float32}
    middle = [*first, *(i for i in own if i not in first), tokens, r]
    thin = jnp.einsum(x, [*first, tokens, n], right, [*own, r, n], middle, **how).astype(x.dtype)
    rest = [i for i in kept if i not in first]
    return jnp.einsum(thin, middle, left, [*kept, r], [*first, tokens, *rest], **how)


def zeros_beside(kept: Sequence[int], own: Sequence[int], like: Side) -> Side:
    """A side of zeros for codes `[*kept, n]`, of the rank, n and dtypes of another; B differs along the axes `own`."""
    lead = [size if i in own else 1 for i, size in enumerate(kept)]
    left = jnp.zeros((*kept, like.rank), like.left.dtype)
    return Side(left, jnp.zeros((*lead, *like.right.shape[-2:]), like.right.dtype))
