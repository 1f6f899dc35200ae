"""A weight of any rank as a solver sees it: a batch of matrices; and its answer as a QTensor."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.formats import BlockParams, Format
from jquant.core.method import Rounding
from jquant.core.qtensor import QTensor, from_codes, to_rows
from jquant.core.side import Side


class Problem(NamedTuple):
    """A weight in the solvers' terms: `rows` `[batch, m, n]`, and how to bring the answer back."""

    rows: jax.Array
    contracted: tuple[int, ...]
    batch_positions: tuple[int, ...]
    kept_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


def as_problem(w: jax.Array, contracted: tuple[int, ...], batch: tuple[int, ...]) -> Problem:
    """The rows of `w`, the kept axes `batch` (negative) in front: what a solver takes."""
    rows = to_rows(w, contracted)
    kept = [a for a in range(-w.ndim, 0) if a not in contracted]
    first = tuple(kept.index(a) for a in batch)
    kept_shape = rows.shape[:-1]
    rows = jnp.moveaxis(rows, first, range(len(first)))
    size = math.prod(kept_shape[i] for i in first)
    rows = rows.reshape(size, -1, rows.shape[-1])
    return Problem(rows, contracted, first, kept_shape, w.shape, w.dtype)


def bring_back(problem: Problem, a: jax.Array) -> jax.Array:
    """`[batch, m, x]` -> `[*kept, x]`; the last kept axis may be shorter (tiles), or all of them 1."""
    first = problem.batch_positions
    rest = [problem.kept_shape[i] for i in range(len(problem.kept_shape)) if i not in first]
    if a.shape[1] == 1:
        rest = [1] * len(rest)
    elif rest:
        rest[-1] = a.shape[1] // math.prod(rest[:-1])
    sizes = [*(problem.kept_shape[i] for i in first), *rest]
    return jnp.moveaxis(a.reshape(*sizes, a.shape[-1]), range(len(first)), first)


def finish(problem: Problem, done: Rounding, fmt: Format) -> QTensor:
    """The QTensor that a solver's answer for a single weight stands for."""
    assert done.params is not None and done.codes is not None
    params: BlockParams = jax.tree.map(lambda a: bring_back(problem, a), done.params)
    q = from_codes(bring_back(problem, done.codes), params, fmt, problem.contracted, problem.shape, problem.dtype)
    side = done.sides[0] if done.sides else None
    return q if side is None else q.replace(side=_side(problem, side))


def _side(problem: Problem, side: Side) -> Side:
    """`[batch, m, r]` and `[batch, r, n]` -> `[*kept, r]` and `[*kept, r, n]`, the latter with ones for the rows."""

    def wide(a: jax.Array) -> jax.Array:
        flat = bring_back(problem, a.reshape(a.shape[0], 1, -1))
        return flat.reshape(*flat.shape[:-1], *a.shape[1:])

    return Side(bring_back(problem, side.left), *jax.tree.map(wide, tuple(side[1:])))
