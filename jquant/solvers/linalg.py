"""Triangular factorizations for the second-order solvers: H = U D U^T by a single Cholesky factorization.

Matmuls do what is large. LAPACK's own routines reach a small part of a CPU's matmul rate, and one that runs in several
threads costs more than its own time: the threads of OpenBLAS, which is what jaxlib has, wait for more by spinning, and
XLA's products share the cores with them for as long. So LAPACK gets matrices that OpenBLAS gives to one thread.
Everything runs on every device.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

HIGHEST = lax.Precision.HIGHEST  # never TF32 or bf16 passes: a solver's float32 is float32 on every device
MAX_DAMPING = 10.0
LEAF = 128  # for 256 OpenBLAS takes several threads


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b."""
    return jnp.matmul(a, b, precision=HIGHEST)


def udu(
    h: jax.Array, added: jax.Array | float = 0.0, unit: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """H / unit + diag(added) = U D U^T with U unit upper triangular and D diagonal.

    U is returned, and made, transposed: a row of U^T is what one column of a weight needs. With R = U D^1/2 upper
    triangular, H = R R^T is a Cholesky factorization that begins in the last corner. It goes by block rows of R^T from
    the last to the first, each updated by those below it:

        R_jj R_jj^T = H_jj - sum_{k>j} R_jk R_jk^T,    R_ij^T = R_jj^-1 (H_ji - sum_{k>j} R_jk R_ik^T) for i < j

    Args:
      h: `[n, n]`, symmetric positive definite; above its diagonal nothing is read.
      added: `[n]` or a scalar.
      unit: a scalar.

    Returns:
      U^T `[n, n]` and the diagonal of D `[n]`, in the dtype of `h`. Where the sum isn't numerically definite, D isn't
      finite (nor wherever U isn't: each of its entries goes into a later corner).
    """
    n = len(h)
    count = 1 if n < 256 else 4 if n < 2048 else round(n / 512)
    size = -(-n // count)
    more = count * size - n
    added = jnp.pad(jnp.broadcast_to(jnp.asarray(added, h.dtype), n), (0, more), constant_values=1)
    h = jnp.pad(h, (0, more)) if more else h
    at = lambda a, j, i: lax.dynamic_slice(a, (j * size, i * size), (size, size))
    put = lambda a, block, j, i: lax.dynamic_update_slice(a, block, (j * size, i * size))

    def block_row(step, state):
        ut, d = state
        j = count - 1 - step

        def update(k, panel):  # R_jk R_ik^T = U_jk D_k U_ik^T
            right = (at(ut, k, j) * lax.dynamic_slice_in_dim(d, k * size, size)[:, None]).T
            less = lambda i, panel: put(panel, at(panel, 0, i) - dot(right, at(ut, k, i)), 0, i)
            return lax.fori_loop(0, j + 1, less, panel)

        panel = lax.fori_loop(j + 1, count, update, lax.dynamic_slice_in_dim(ut, j * size, size) / unit)
        corner = row_major(at(panel, 0, j) + jnp.diag(lax.dynamic_slice_in_dim(added, j * size, size)))
        lower = cholesky(corner.T[::-1, ::-1])  # R_jj from its last corner
        diagonal = jnp.diagonal(lower)[::-1, None]
        inverse = lower_inverse(lower)[::-1, ::-1] / diagonal
        panel = lax.fori_loop(0, j, lambda i, panel: put(panel, dot(inverse, at(panel, 0, i)), 0, i), panel)
        square = jnp.tril(lower.T[::-1, ::-1] / diagonal, -1) + jnp.eye(size, dtype=h.dtype)
        row = jnp.where(jnp.arange(count * size) < j * size, panel, 0)
        ut = put(lax.dynamic_update_slice(ut, row, (j * size, 0)), square, j, j)
        return ut, lax.dynamic_update_slice(d, diagonal[:, 0] ** 2, (j * size,))

    # In the place of H: a row of blocks is read once, when it is its turn.
    ut, d = lax.fori_loop(0, count, block_row, (h, jnp.zeros_like(h[0])))
    return ut[:n, :n], d[:n]


def cholesky(a: jax.Array) -> jax.Array:
    """L, lower triangular with a = L L^T; above the diagonal of `a` `[n, n]` nothing is read. LAPACK gets blocks."""
    n = len(a)
    count = -(-n // LEAF)
    size = -(-n // count)
    a, rows = _with_ones(a, count * size), jnp.arange(count * size)

    def block_column(j, state):
        a, lower = state
        at = j * size
        corner = jnp.tril(lax.linalg.cholesky(lax.dynamic_slice(a, (at, at), (size, size)), symmetrize_input=False))
        column = dot(lax.dynamic_slice_in_dim(a, at, size, axis=1), lower_inverse(corner).T)
        column = jnp.where(rows[:, None] < at + size, 0, column)
        lower = lax.dynamic_update_slice(lower, column, (0, at))
        return a - dot(column, column.T), lax.dynamic_update_slice(lower, corner, (at, at))

    return lax.fori_loop(0, count, block_column, (a, jnp.zeros_like(a)))[1][:n, :n]


def row_major(a: jax.Array) -> jax.Array:
    """A matrix that XLA is to hold row by row. LAPACK wants contiguous columns, a transposition is free as a layout:
    left alone, XLA would give either layout to all that the matrix is made of, at the cost of slow copies."""
    return with_layout_constraint(a, Layout(major_to_minor=(0, 1)))


def transposed_rows(count: int, rows: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    """`rows(0, count).T`, `rows(at, few)` being rows of `[few, k]` from `at` on.

    Few rows at a time, what a cache line holds: where the rows of an array lie a power of two apart, XLA's own
    transposition on a CPU would fetch each line from memory as often as it holds numbers.
    """
    few = min(16, count)
    like = jax.eval_shape(lambda at: rows(at, few), jnp.arange(1)[0])

    def move(i, out):
        at = jnp.minimum(i * few, count - few)  # the last rows may be moved twice
        return lax.dynamic_update_slice(out, rows(at, few).T, (0, at))

    return lax.fori_loop(0, -(-count // few), move, jnp.zeros((like.shape[1], count), like.dtype))


def lower_inverse(lower: jax.Array) -> jax.Array:
    """The inverse of a lower triangular `[n, n]`: of small blocks on its diagonal, then of two neighbours at a time."""
    n = len(lower)
    levels = max(0, math.ceil(math.log2(n / 32)))
    size = -(-n // 2**levels)
    lower = _with_ones(lower, size << levels)
    inverses = _small_inverses(_blocks(lower, size, 0))
    while size < len(lower):
        below = _blocks(lower, size, -1)[::2]
        top, bottom = inverses[::2], inverses[1::2]
        corner = -dot(dot(bottom, below), top)
        inverses = jnp.block([[top, jnp.zeros_like(top)], [corner, bottom]])
        size *= 2
    return inverses[0, :n, :n]


def _with_ones(a: jax.Array, n: int) -> jax.Array:
    """A matrix `[k, k]` as the first corner of an `[n, n]` that is the identity in the other."""
    if (more := n - len(a)) == 0:
        return a
    return jnp.pad(a, (0, more)) + jnp.diag((jnp.arange(n) >= len(a)).astype(a.dtype))


def _blocks(a: jax.Array, size: int, offset: int) -> jax.Array:
    """The blocks `[count, size, size]` on the diagonal of a matrix (offset 0) or just below it (-1)."""
    count = len(a) // size
    blocks = a.reshape(count, size, count, size)
    rows = jnp.arange(-offset, count)
    return blocks[rows, :, rows + offset]


def _small_inverses(lower: jax.Array) -> jax.Array:
    """The inverses of lower triangular `[count, n, n]`, by forward substitution in all of them at once."""
    n = lower.shape[-1]
    eye, below = jnp.eye(n, dtype=lower.dtype), jnp.tril(lower, -1)

    def row(k, inverses):
        sums = jnp.einsum("cj,cjn->cn", below[:, k], inverses, precision=HIGHEST)
        return inverses.at[:, k].set((eye[k] - sums) / lower[:, k, k, None])

    return lax.fori_loop(0, n, row, jnp.zeros_like(lower))


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """The inverse of a unit lower triangular `[n, n]`; on and above its diagonal nothing is read."""
    return lower_inverse(jnp.tril(lower, -1) + jnp.eye(len(lower), dtype=lower.dtype))


def damped_udu(
    h: jax.Array, damp: float, added: jax.Array | float = 0.0, unit: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`udu(h, added + damping, unit)` with the smallest damping of damp, 10 damp, 100 damp, ... that makes it finite.

    Args:
      h: `[n, n]`, symmetric; H / unit has a mean diagonal of about 1.
      damp: the first damping tried. After 0 comes 1e-6; after `MAX_DAMPING` U = D = I is returned.
      added: `[n]` or a scalar, added to the diagonal in any case.
      unit: a scalar.

    Returns:
      U^T `[n, n]`, the diagonal of D `[n]`, and the damping used, a scalar. All in the dtype of `h`.
    """
    last = 1.01 * max(MAX_DAMPING, damp)

    def attempt(state):  # one factorization in the program, so that it compiles once
        _, _, used, damping = state
        identity = lambda h: (jnp.eye(len(h), dtype=h.dtype), jnp.ones_like(h[0]))
        ut, d = lax.cond(damping <= last, lambda h: udu(h, added + damping, unit), identity, h)
        return ut, d, jnp.where(damping <= last, damping, used), jnp.maximum(10 * damping, 1e-6)

    first = jnp.asarray(damp, h.dtype)
    start = (h, jnp.full_like(h[0], jnp.nan), first, first)
    return lax.while_loop(lambda state: ~jnp.isfinite(state[1]).all(), attempt, start)[:3]
