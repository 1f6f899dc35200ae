"""Triangular factorizations for the second-order solvers: H = U D U^T by a single Cholesky factorization.

LAPACK's own routines reach a small part of a CPU's matmul rate, the less the busier the machine, so what is large is
done by matmuls here. Everything runs on every device.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

HIGHEST = lax.Precision.HIGHEST  # never TF32 or bf16 passes: a solver's float32 is float32 on every device
MAX_DAMPING = 10.0


def udu(
    h: jax.Array, added: jax.Array | float = 0.0, unit: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """H / unit + diag(added) = U D U^T with U unit upper triangular and D diagonal.

    With R = U D^1/2 upper triangular, H = R R^T is a Cholesky factorization that begins in the last corner. It goes by
    block columns from the last to the first, each updated by those to its right:

        R_jj R_jj^T = H_jj - sum_{k>j} R_jk R_jk^T,    R_ij = (H_ij - sum_{k>j} R_ik R_jk^T) R_jj^-T  for i < j

    Args:
      h: `[n, n]`, symmetric positive definite; below its diagonal nothing is read.
      added: `[n]` or a scalar.
      unit: a scalar.

    Returns:
      U `[n, n]` and the diagonal of D `[n]`, in the dtype of `h`. Where the sum isn't numerically definite, D isn't
      finite (nor wherever U isn't: each of its entries goes into a later corner).
    """
    n = len(h)
    count = 1 if n < 256 else 4 if n < 2048 else 8  # more would be longer to compile
    cuts = [n * i // count for i in range(count + 1)]
    added = jnp.broadcast_to(jnp.asarray(added, h.dtype), n)
    u, diagonals = jnp.zeros_like(h), jnp.ones(0, h.dtype)
    for start, stop in reversed(list(zip(cuts, cuts[1:], strict=False))):
        panel = h[:stop, start:stop] / unit
        if stop < n:  # R_ik R_jk^T = U_ik D_k U_jk^T
            panel = panel - jnp.matmul(u[:stop, stop:], (u[start:stop, stop:] * diagonals).T, precision=HIGHEST)
        corner = row_major(panel[start:] + jnp.diag(added[start:stop]))[::-1, ::-1]
        corner = jnp.tril(lax.linalg.cholesky(corner, symmetrize_input=False))
        diagonal = jnp.diagonal(corner)[::-1]
        square = jnp.triu(corner[::-1, ::-1] / diagonal, 1) + jnp.eye(stop - start, dtype=h.dtype)
        if start:
            above = jnp.matmul(panel[:start], lower_inverse(corner)[::-1, ::-1].T / diagonal, precision=HIGHEST)
            u = lax.dynamic_update_slice(u, above, (0, start))
        u = lax.dynamic_update_slice(u, square, (start, start))
        diagonals = jnp.concatenate([diagonal**2, diagonals])
    return u, diagonals


def row_major(a: jax.Array) -> jax.Array:
    """A matrix that XLA is to hold row by row. LAPACK wants contiguous columns, a transposition is free as a layout:
    left alone, XLA would give either layout to all that the matrix is made of, at the cost of slow copies."""
    return with_layout_constraint(a, Layout(major_to_minor=(0, 1)))


def lower_inverse(lower: jax.Array) -> jax.Array:
    """The inverse of a lower triangular matrix `[n, n]`: by halves, and small ones by forward substitution."""
    if (n := len(lower)) > 256:
        half = n // 2
        top, bottom = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
        corner = -jnp.matmul(jnp.matmul(bottom, lower[half:, :half], precision=HIGHEST), top, precision=HIGHEST)
        return jnp.block([[top, jnp.zeros((half, n - half), lower.dtype)], [corner, bottom]])
    eye, below = jnp.eye(len(lower), dtype=lower.dtype), jnp.tril(lower, -1)

    def row(k, inverse):
        return inverse.at[k].set((eye[k] - jnp.dot(below[k], inverse, precision=HIGHEST)) / lower[k, k])

    return lax.fori_loop(0, len(lower), row, jnp.zeros_like(lower))


def unit_upper_inverse(u: jax.Array) -> jax.Array:
    """The inverse of a unit upper triangular `[n, n]`; on and below its diagonal nothing is read."""
    reverse = jnp.triu(u, 1)[::-1, ::-1] + jnp.eye(len(u), dtype=u.dtype)
    return lower_inverse(reverse)[::-1, ::-1]


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
      U `[n, n]`, the diagonal of D `[n]`, and the damping used, a scalar. All in the dtype of `h`.
    """
    last = 1.01 * max(MAX_DAMPING, damp)

    def attempt(state):  # one factorization in the program, so that it compiles once
        _, _, used, damping = state
        identity = lambda h: (jnp.eye(len(h), dtype=h.dtype), jnp.ones_like(h[0]))
        u, d = lax.cond(damping <= last, lambda h: udu(h, added + damping, unit), identity, h)
        return u, d, jnp.where(damping <= last, damping, used), jnp.maximum(10 * damping, 1e-6)

    first = jnp.asarray(damp, h.dtype)
    start = (h, jnp.full_like(h[0], jnp.nan), first, first)
    return lax.while_loop(lambda state: ~jnp.isfinite(state[1]).all(), attempt, start)[:3]
