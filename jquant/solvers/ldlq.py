"""The column sweep of GPTQ in its closed form, LDLQ: rounding with linear feedback, blocked so that matmuls do the work
(QuIP, arXiv 2307.13304; the letters are those of `gptq`).

    target_k = W_k + sum_{j<k} E_j U_jk,    Q_k = round(target_k),    E = W - Q

Everything here is transposed, `[n, m]`, so that a column of the weight is contiguous, and padded to whole blocks with
columns that are coupled to nothing. Blocks are nested: each level adds to the targets of its next part, by one matmul,
the feedback of the errors made inside the level so far.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import BlockParams, Format, decode_codes, encode_scaled, row_params
from jquant.solvers.linalg import HIGHEST, unit_upper_inverse

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
      w: the weight, `[k, m]`.
      d: the diagonal of D, `[k]`.
      added: what was added to the diagonal of H before it was factored, `[k]`.
      block: `[k]`, int32: the row of `Scales` that holds for a column.
    """

    w: jax.Array
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


def pad(columns: Columns, u: jax.Array, plan: Plan) -> tuple[Columns, jax.Array]:
    """Appends columns that are coupled to nothing, up to `plan.padded`."""
    more = plan.padded - plan.n
    columns = jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), columns)
    return columns, jnp.pad(u, (0, more))


# Corrected weight of a group, [g, m] -> its scales, [1, m], and as they are stored, [1, M].
Choose = Callable[[jax.Array], tuple[Scales, Stored]]


def sweep(
    columns: Columns,
    u: jax.Array,
    scales: Scales | None,
    choose: Choose,
    fmt: Format,
    plan: Plan,
    first: jax.Array | None = None,
) -> Swept:
    """Rounds all columns.

    Args:
      columns: of `plan.padded` columns.
      u: U, `[padded, padded]`, unit upper triangular.
      scales: the given scales, or None where `plan.group` says when to choose them.
      choose: how to choose them.
      fmt: the format.
      plan: the block sizes.
      first: `[m]`: what is added to the target of the first column.
    """
    size, m = plan.sizes[0], columns.w.shape[1]
    level = partial(_level, sizes=plan.sizes, choose=choose, fmt=fmt, plan=plan)

    def step(carry, i):
        # One array for the weight and the errors: what is swept is no longer needed as a weight.
        w_then_e, codes, loss = carry
        at = i * size
        part = Columns(*(lax.dynamic_slice_in_dim(x, at, size) for x in columns._replace(w=w_then_e)))
        f = feedback(w_then_e, u, i, i, size)
        if first is not None:
            f = f.at[0].add(jnp.where(i == 0, first, 0))
        out = level(f, part, lax.dynamic_slice(u, (at, at), (size, size)), scales)
        w_then_e = lax.dynamic_update_slice_in_dim(w_then_e, out.error, at, 0)
        codes = _transposed_into(codes, out.codes, at)
        return (w_then_e, codes, loss + out.loss), out.params

    start = columns.w, jnp.zeros((m, plan.padded), jnp.uint8), jnp.zeros(m, columns.w.dtype)
    (error, codes, loss), params = lax.scan(step, start, jnp.arange(plan.padded // size))
    if first is not None:  # the loss is of the weight, not of the target
        loss = loss + columns.d[0] * (error[0] ** 2 - (error[0] + first) ** 2)
    return Swept(error, codes, loss, jax.tree.map(_merge, params))


def _transposed_into(codes: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """`codes` `[m, k]` with `part` `[size, m]` in its columns from `at` on; few at a time, which the caches hold."""
    few = math.gcd(len(part), 16)

    def move(i, codes):
        columns = lax.dynamic_slice_in_dim(part, i * few, few)
        return lax.dynamic_update_slice_in_dim(codes, columns.T, at + i * few, 1)

    return lax.fori_loop(0, len(part) // few, move, codes)


def feedback(
    e: jax.Array, u: jax.Array, i: jax.Array, stop: jax.Array, size: int, which: jax.Array | None = None
) -> jax.Array:
    """sum over blocks j < stop of U[j, i]^T E[j], `[size, m]`: what their errors add to the targets of block i; or to
    those of its columns `which` `[k]` only, `[k, m]`."""

    def add(j, total):
        u_ji = lax.dynamic_slice(u, (j * size, i * size), (size, size))
        u_ji = u_ji if which is None else u_ji[:, which]
        return total + dot(u_ji, lax.dynamic_slice_in_dim(e, j * size, size))

    rows = size if which is None else len(which)
    return lax.fori_loop(0, stop, add, jnp.zeros((rows, e.shape[1]), e.dtype))


def _level(
    f: jax.Array,
    columns: Columns,
    u: jax.Array,
    scales: Scales | None,
    sizes: tuple[int, ...],
    choose: Choose,
    fmt: Format,
    plan: Plan,
) -> Swept:
    """Sweeps `sizes[0]` columns, f `[sizes[0], m]` being the feedback from all before them and u their block of U."""
    params = None
    if sizes[0] == plan.group:
        scales, params = choose(corrected(f, columns.w, u))
        columns = columns._replace(block=jnp.zeros_like(columns.block))
    if len(sizes) == 1:
        assert scales is not None
        return _tile(f, columns, u, scales, fmt)._replace(params=params)
    part = sizes[1]

    def step(carry, xs):
        error, loss = carry
        at, f_part, columns_part = xs
        if part >= 64:  # a product for each part before this one, else one with them all
            f_part = f_part + feedback(error, u, at // part, at // part, part)
        else:
            f_part = f_part + dot(lax.dynamic_slice_in_dim(u, at, part, axis=1), error)
        u_part = lax.dynamic_slice(u, (at, at), (part, part))
        out = _level(f_part, columns_part, u_part, scales, sizes[1:], choose, fmt, plan)
        carry = lax.dynamic_update_slice_in_dim(error, out.error, at, 0), loss + out.loss
        return carry, (out.codes, out.params)

    start = jnp.zeros_like(f), jnp.zeros_like(f[0])
    xs = (jnp.arange(0, sizes[0], part), *jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), (f, columns)))
    (error, loss), rest = lax.scan(step, start, xs)
    codes, inner = jax.tree.map(_merge, rest)
    return Swept(error, codes, loss, inner if params is None else params)


def _tile(f: jax.Array, columns: Columns, u: jax.Array, scales: Scales, fmt: Format) -> Swept:
    """Sweeps column by column."""
    w, d, added, block = columns
    at = lambda rows: jax.tree.map(lambda x: x[rows], scales)

    def column(k, state):
        error, targets = state
        target = w[k] + f[k] + dot(u[:, k], error)
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


def corrected(f: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
    """The weight that GPTQ would hold when a group starts, `[g, m]`: W_g + (E_prev U_prev,g) inv(U_gg), transposed."""
    return w + dot(unit_upper_inverse(u), f)


def as_scales(params: BlockParams, fmt: Format, m: int, dtype: jnp.dtype) -> Scales:
    """`Scales` of a weight `[m, n]` from what its format stores."""
    both = row_params(params, fmt, m)
    wide = lambda a: jnp.broadcast_to(a, (m, a.shape[1])).T.astype(dtype)
    scale, zero = wide(both[0]), None if both[1] is None else wide(both[1])
    return Scales(scale, jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale)), zero)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b."""
    if a.ndim == 2 and a.shape[1] >= 64:  # an array of its own for XLA's product, not a transposed operand
        a = lax.optimization_barrier(a.T)
        return jnp.matmul(a, b, precision=HIGHEST)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=HIGHEST)


def _merge(x: jax.Array) -> jax.Array:
    """`[parts, k, m]` -> `[parts k, m]`."""
    return x.reshape(-1, *x.shape[2:])
