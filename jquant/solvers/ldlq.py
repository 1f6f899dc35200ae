"""The column sweep of GPTQ in its closed form, LDLQ: rounding with linear feedback, blocked so that matmuls do the work
(QuIP, arXiv 2307.13304; the letters are those of `gptq`).

    target_k = W_k + sum_{j<k} E_j U_jk,    Q_k = round(target_k),    E = W - Q

Everything here is transposed, W and E `[n, m]` and U^T `[n, n]`, so that a column of the weight, and what it needs of
U, is contiguous; and padded to whole blocks with columns that are coupled to nothing. Blocks are nested: each level
adds to the targets of its next part, by one matmul, the feedback of the errors made inside the level so far.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import BlockParams, Format, decode_codes, encode_scaled, row_params
from jquant.solvers.linalg import HIGHEST, dot, unit_lower_inverse

SUPER = 512  # columns between two passes over all earlier errors: long enough for matmuls to run at full rate
TILE = 8  # columns whose targets and errors stay in the nearest caches


class Plan(NamedTuple):
    """Sizes of the nested blocks, static. Each divides the one before it.

    Attributes:
      n: the number of columns, padding not counted.
      padded: the number of columns, padding counted.
      sizes: from `SUPER`-like to `TILE`-like.
      group: the one of `sizes` at whose start scales are chosen; None where they are given.
    """

    n: int
    padded: int
    sizes: tuple[int, ...]
    group: int | None


def make_plan(n: int, block_size: int, group: int | None) -> Plan:
    """The plan for n columns, blocks of about `block_size`, and scales chosen at the start of every `group` columns."""
    if group is None:
        block = min(block_size, n)
        tile = _divisor_near(block, TILE)
        sizes = [block, tile]
    else:
        block = max(block_size // group, 1) * group
        tile = _divisor_near(group, min(TILE, block_size))
        sizes = [block, group, tile]
    blocks = -(-n // block)
    together = -(-blocks // max(1, round(blocks * block / SUPER)))  # blocks in a super block
    distinct = tuple(dict.fromkeys([together * block, *sizes]))  # equal levels are one level
    return Plan(n, -(-blocks // together) * together * block, distinct, group)


def _divisor_near(n: int, goal: int) -> int:
    """The divisor of n whose ratio to `goal` is nearest to 1."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(math.log(d / goal)))


class Columns(NamedTuple):
    """What a stretch of k columns brings along.

    Attributes:
      d: the diagonal of D, `[k]`.
      added: what was added to the diagonal of H before it was factored, `[k]`.
      block: `[k]`, int32: the row of `Scales` that holds for a column.
    """

    d: jax.Array
    added: jax.Array
    block: jax.Array


class Scales(NamedTuple):
    """Scales to calculate with, `[blocks, m]`, in the dtype of the weight.

    Attributes:
      scale: the scale.
      inverse: its reciprocal; 0 for a zero block, which then gets the code of zero whatever the target.
      zero: the zero point, or None.
    """

    scale: jax.Array
    inverse: jax.Array
    zero: jax.Array | None


Stored = tuple[jax.Array, jax.Array | None]  # scales and zero points as a format stores them


class Swept(NamedTuple):
    """What a sweep returns.

    Attributes:
      error: E, `[k, m]`.
      codes: uint8 `[k, m]`; of a whole sweep, `[m, k]`.
      loss: E H E^T of each row, H without what was added: sum of D_k (target_k - Q_k)^2 - added_k E_k^2, `[m]`.
      params: the scales and zero points chosen at the start of groups, `[groups, M]`, as the format stores them; None
        where they were given.
    """

    error: jax.Array
    codes: jax.Array
    loss: jax.Array
    params: Stored | None


def pad(columns: Columns, ut: jax.Array, plan: Plan) -> tuple[Columns, jax.Array]:
    """Appends columns that are coupled to nothing, up to `plan.padded`."""
    if not (more := plan.padded - plan.n):
        return columns, ut
    return jax.tree.map(lambda x: jnp.pad(x, (0, more)), columns), jnp.pad(ut, (0, more))


# The number of a block -> the weight's columns there, [sizes[0], m]; zeros for those that were appended.
Weight = Callable[[jax.Array], jax.Array]
# Corrected weight of a group, [g, m] -> its scales, [1, m], and as they are stored, [1, M].
Choose = Callable[[jax.Array], tuple[Scales, Stored]]


def sweep(
    weight: Weight,
    columns: Columns,
    ut: jax.Array,
    scales: Scales | None,
    choose: Choose,
    fmt: Format,
    plan: Plan,
    m: int,
    first: jax.Array | None = None,
) -> Swept:
    """Rounds all columns.

    Args:
      weight: W, of m rows.
      columns: of `plan.padded` columns.
      ut: U^T, `[padded, padded]`, unit lower triangular.
      scales: the given scales, or None where `plan.group` says when to choose them.
      choose: how to choose them.
      fmt: the format.
      plan: the block sizes.
      m: the number of rows.
      first: `[m]`: what is added to the target of the first column.
    """
    size = plan.sizes[0]
    level = partial(_level, sizes=plan.sizes, choose=choose, fmt=fmt, plan=plan)

    def step(carry, i):
        error, codes, loss = carry
        at = i * size
        w, part = weight(i), jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, size), columns)
        f = feedback(error, ut, i, size)
        if first is not None:
            f = f.at[0].add(jnp.where(i == 0, first, 0))
        out = level(f, w, part, lax.dynamic_slice(ut, (at, at), (size, size)), scales)
        error = lax.dynamic_update_slice_in_dim(error, out.error, at, 0)
        codes = _transposed_into(codes, out.codes, at)
        return (error, codes, loss + out.loss), out.params

    start = jnp.zeros((plan.padded, m), ut.dtype), jnp.zeros((m, plan.padded), jnp.uint8), jnp.zeros(m, ut.dtype)
    (error, codes, loss), params = lax.scan(step, start, jnp.arange(plan.padded // size))
    if first is not None:  # the loss is of the weight, not of the target
        loss = loss + columns.d[0] * (error[0] ** 2 - (error[0] + first) ** 2)
    return Swept(error, codes, loss, jax.tree.map(_merge, params))


def round_to_nearest(
    weight: Weight, columns: Columns, scales: Scales, fmt: Format, plan: Plan, room: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """E of W rounded to nearest, `[padded, m]`, in the place of `room`; and sum of added_k E_k^2, `[m]`."""
    size = plan.sizes[0]

    def step(i, state):
        room, total = state
        w, part = weight(i), jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size), columns)
        e = w - round_columns(w, jax.tree.map(lambda x: x[part.block], scales), fmt)[1]
        return lax.dynamic_update_slice_in_dim(room, e, i * size, 0), total + dot(part.added, e**2)

    return lax.fori_loop(0, plan.padded // size, step, (room, jnp.zeros_like(room[0])))


def _transposed_into(codes: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """`codes` `[m, k]` with `part` `[size, m]` in its columns from `at` on; few at a time, which the caches hold."""
    few = math.gcd(len(part), 16)

    def move(i, codes):
        columns = lax.dynamic_slice_in_dim(part, i * few, few)
        return lax.dynamic_update_slice_in_dim(codes, columns.T, at + i * few, 1)

    return lax.fori_loop(0, len(part) // few, move, codes)


def feedback(e: jax.Array, ut: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """sum over blocks j < i of U[j, i]^T E[j], `[size, m]`: what their errors add to the targets of block i."""
    return product(lax.dynamic_slice_in_dim(ut, i * size, size), e, i, size)


def product(rows: jax.Array, e: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """rows E, `[k, m]`, of the first `count` blocks of E alone; rows `[k, n]`."""

    def add(j, total):
        part = lax.dynamic_slice_in_dim(rows, j * size, size, axis=1)
        return total + dot(part, lax.dynamic_slice_in_dim(e, j * size, size))

    return lax.fori_loop(0, count, add, jnp.zeros((len(rows), e.shape[1]), e.dtype))


def _level(
    f: jax.Array,
    w: jax.Array,
    columns: Columns,
    ut: jax.Array,
    scales: Scales | None,
    sizes: tuple[int, ...],
    choose: Choose,
    fmt: Format,
    plan: Plan,
) -> Swept:
    """Sweeps the `sizes[0]` columns of w; f `[sizes[0], m]` is the feedback from all before, ut their block of U^T."""
    params = None
    if sizes[0] == plan.group:
        scales, params = choose(corrected(f, w, ut))
        columns = columns._replace(block=jnp.zeros_like(columns.block))
    if len(sizes) == 1:
        assert scales is not None
        return _tile(f, w, columns, ut, scales, fmt)._replace(params=params)
    part = sizes[1]

    def step(carry, xs):
        error, loss = carry
        at, f_part, w_part, columns_part = xs
        if part >= 64:  # a product for each part before this one, else one with them all
            f_part = f_part + feedback(error, ut, at // part, part)
        else:
            f_part = f_part + dot(lax.dynamic_slice_in_dim(ut, at, part), error)
        ut_part = lax.dynamic_slice(ut, (at, at), (part, part))
        out = _level(f_part, w_part, columns_part, ut_part, scales, sizes[1:], choose, fmt, plan)
        carry = lax.dynamic_update_slice_in_dim(error, out.error, at, 0), loss + out.loss
        return carry, (out.codes, out.params)

    start = jnp.zeros_like(f), jnp.zeros_like(f[0])
    parts = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), (f, w, columns))
    xs = (jnp.arange(0, sizes[0], part), *parts)
    (error, loss), rest = lax.scan(step, start, xs)
    codes, inner = jax.tree.map(_merge, rest)
    return Swept(error, codes, loss, inner if params is None else params)


def _tile(f: jax.Array, w: jax.Array, columns: Columns, ut: jax.Array, scales: Scales, fmt: Format) -> Swept:
    """Sweeps column by column."""
    d, added, block = columns
    at = lambda rows: jax.tree.map(lambda x: x[rows], scales)

    def column(k, state):
        error, targets = state
        target = w[k] + f[k] + dot(ut[k], error)
        q = round_columns(target, at(block[k]), fmt)[1]
        return error.at[k].set(w[k] - q), targets.at[k].set(target)

    error, targets = lax.fori_loop(0, w.shape[0], column, (jnp.zeros_like(w), jnp.zeros_like(w)))
    # Once more for all columns together, not in the loop: there each of its results would round on its own.
    codes, q = round_columns(targets, at(block), fmt)
    loss = jnp.dot(d, (targets - q) ** 2, precision=HIGHEST) - jnp.dot(added, error**2, precision=HIGHEST)
    return Swept(error, codes, loss, None)


def round_columns(target: jax.Array, scales: Scales, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Codes (uint8) and values of `target` rounded to nearest; scales broadcast against it."""
    scale, inverse, zero = scales
    scaled = (target * inverse).astype(jnp.float32)
    code = encode_scaled(scaled, 0.0 if zero is None else zero.astype(jnp.float32), fmt)
    value = decode_codes(code, fmt).astype(target.dtype)
    return code, (value if zero is None else value - zero) * scale


def corrected(f: jax.Array, w: jax.Array, ut: jax.Array) -> jax.Array:
    """The weight that GPTQ would hold when a group starts, `[g, m]`: W_g + (E_prev U_prev,g) inv(U_gg), transposed."""
    return w + dot(unit_lower_inverse(ut), f)


def as_scales(params: BlockParams, fmt: Format, m: int, dtype: jnp.dtype) -> Scales:
    """`Scales` of a weight `[m, n]` from what its format stores."""
    both = row_params(params, fmt, m)
    wide = lambda a: jnp.broadcast_to(a, (m, a.shape[1])).T.astype(dtype)
    scale, zero = wide(both[0]), None if both[1] is None else wide(both[1])
    return Scales(scale, jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale)), zero)


def _merge(x: jax.Array) -> jax.Array:
    """`[parts, k, m]` -> `[parts k, m]`."""
    return x.reshape(-1, *x.shape[2:])
