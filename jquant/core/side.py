"""`Side`: a float matrix of low rank that stands beside the codes of a weight and is added to them.

It is held as two thin factors, S = A B, and a product reads them one after the other, x S^T = (x B^T) A^T: with r
columns that costs r (m + n) multiplications for a token, and S itself is never made.

A side may also take what it carries out of the input: with a third factor C the codes Q are multiplied with

    x' = x - t C,    t = x B^T,    and the product is    x' Q^T + t A^T

so that what rounds an input rounds x' only. With unrounded inputs that is a product with Q + (A - Q C^T) B, which
is what such a QTensor stands for.

The kept axes stand in both factors, in order and in front, as in the arrays of a `QTensor`; so a kept axis is sliced,
scanned, vmapped or sharded on all of them at once. The rows of a matrix share B, which has ones in place of their axes.
"""

from collections.abc import Sequence
from functools import partial
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
      taken: C, of the shape of B, or None for a side that leaves its input whole.
    """

    left: Any
    right: Any
    taken: Any = None

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def words(self) -> str:
        """What it is, for reports."""
        return f"side of rank {self.rank}{'' if self.taken is None else ' taken out of the input'}"


jax.export.register_namedtuple_serialization(Side, serialized_name="jquant.Side")


def problem_of(side: Side, kept: Sequence[int], n: int) -> str:
    """Why a side does not belong to codes of kept axes of the sizes `kept` and rows of length n, or ""."""
    left, right, taken = side
    for array in jax.tree.leaves(side):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return f"its side holds {array.dtype}, not floats"
    own = all(s in (1, k) for s, k in zip(right.shape, kept, strict=False))
    if left.shape[:-1] != tuple(kept) or right.shape[len(kept) :] != (side.rank, n) or not own:
        return f"its side of shapes {left.shape} and {right.shape} does not belong to {n} codes for each of {kept}"
    if taken is not None and taken.shape != right.shape:
        return f"what its side takes out of the input has the shape {taken.shape}, not {right.shape}"
    return ""


def _own(side: Side) -> list[int]:
    """Positions of the kept axes along which B differs."""
    return [i for i, size in enumerate(side.right.shape[:-2]) if size != 1]


def _squeezed(factor: Any) -> jax.Array:
    """B or C, `[*own axes, r, n]`."""
    shape = factor.shape
    return factor.reshape([*(size for size in shape[:-2] if size != 1), *shape[-2:]])


def rows(side: Side, codes: jax.Array) -> jax.Array:
    """What codes that stand for Q, `[*kept, n]`, and the side stand for together, float32 `[*kept, n]`."""
    kept, own = list(range(side.left.ndim - 1)), _own(side)
    r, n = len(kept), len(kept) + 1
    dot = partial(jnp.einsum, precision=HIGHEST)
    left, right = side.left.astype(jnp.float32), _squeezed(side.right).astype(jnp.float32)
    if side.taken is not None:
        left = left - dot(codes, [*kept, n], _squeezed(side.taken).astype(jnp.float32), [*own, r, n], [*kept, r])
    return codes + dot(left, [*kept, r], right, [*own, r, n], [*kept, n])


class _Letters(NamedTuple):
    """Names of the axes for `jnp.einsum`."""

    kept: list[int]
    own: list[int]
    middle: list[int]
    r: int
    n: int
    tokens: int


def _letters(side: Side, first: Sequence[int]) -> _Letters:
    kept, own = list(range(side.left.ndim - 1)), _own(side)
    r, n, tokens = (len(kept) + i for i in range(3))
    return _Letters(kept, own, [*first, *(i for i in own if i not in first), tokens, r], r, n, tokens)


def _how(x: jax.Array, precision: Any) -> dict[str, Any]:
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return {"precision": precision, "preferred_element_type": wide}


def can_take(side: Side, first: Sequence[int]) -> bool:
    """Whether an input whose batch axes are the kept axes at `first` has an axis for each that B and C differ along."""
    return set(_own(side)) <= set(first)


def thin(x: jax.Array, side: Side, first: Sequence[int], precision: Any = None) -> jax.Array:
    """t = x B^T, in the dtype of `x`, summed in float32 (float64 if `x` is).

    Args:
      x: `[*batch axes, tokens, n]`.
      side: the factors.
      first: positions, among the kept axes, of the batch axes: those that `x` has too.
      precision: as for `jax.lax.dot_general`.

    Returns:
      `[*batch axes, *other axes that B differs along, tokens, r]`.
    """
    a, right = _letters(side, first), _squeezed(side.right).astype(x.dtype)
    out = jnp.einsum(x, [*first, a.tokens, a.n], right, [*a.own, a.r, a.n], a.middle, **_how(x, precision))
    return out.astype(x.dtype)


def taken_out(x: jax.Array, t: jax.Array, side: Side, first: Sequence[int], precision: Any = None) -> jax.Array:
    """x' = x - t C, of the shape and dtype of `x`, for a side that `can_take`. t is what `thin` gives."""
    a, taken = _letters(side, first), _squeezed(side.taken).astype(x.dtype)
    what = jnp.einsum(t, a.middle, taken, [*a.own, a.r, a.n], [*first, a.tokens, a.n], **_how(x, precision))
    return (x.astype(what.dtype) - what).astype(x.dtype)


def spread(t: jax.Array, side: Side, first: Sequence[int], precision: Any = None) -> jax.Array:
    """t A^T for what `thin` gives: `[*batch axes, tokens, *other kept axes]`, float32 (float64)."""
    a, left = _letters(side, first), side.left.astype(t.dtype)
    rest = [i for i in a.kept if i not in first]
    return jnp.einsum(t, a.middle, left, [*a.kept, a.r], [*first, a.tokens, *rest], **_how(t, precision))


def zeros_beside(kept: Sequence[int], own: Sequence[int], like: Side) -> Side:
    """A side of zeros for codes `[*kept, n]`, of the rank, n and dtypes of another; B differs along the axes `own`."""
    lead = [size if i in own else 1 for i, size in enumerate(kept)]
    left = jnp.zeros((*kept, like.rank), like.left.dtype)
    wide = lambda a: None if a is None else jnp.zeros((*lead, *a.shape[-2:]), a.dtype)
    return Side(left, wide(like.right), wide(like.taken))
