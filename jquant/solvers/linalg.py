"""The one factorization that the second-order solvers share: H = U D U^T, by a single Cholesky factorization.

XLA's own Cholesky is used as it is: on a CPU a hand-blocked one built on matmuls was no faster at n = 4096.
"""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST  # never TF32 or bf16 passes: a solver's float32 is float32 on every device
MAX_DAMPING = 10.0


def udu(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H = U D U^T with U unit upper triangular and D diagonal.

    The Cholesky factor of H with rows and columns reversed is lower triangular; reversed back it is upper triangular.

    Args:
      h: `[n, n]`, symmetric positive definite.

    Returns:
      U `[n, n]` and the diagonal of D `[n]`, in the dtype of `h`; not finite if `h` isn't numerically definite.
    """
    root = lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    diagonal = jnp.diagonal(root)
    return jnp.triu(root) / diagonal, diagonal**2


def damped_udu(h: jax.Array, damp: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`udu(h + damping I)` with the smallest damping of damp, 10 damp, 100 damp, ... that makes it finite.

    Args:
      h: `[n, n]`, symmetric, with a mean diagonal of about 1.
      damp: the first damping tried. After 0 comes 1e-6; after `MAX_DAMPING` U = D = I is returned.

    Returns:
      U `[n, n]`, the diagonal of D `[n]`, and the damping used, a scalar. All in the dtype of `h`.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def unfinished(state):
        u, d, _, following = state
        return ~(jnp.isfinite(d).all() & jnp.isfinite(u).all()) & (following <= MAX_DAMPING * 1.01)

    def attempt(state):
        _, _, _, damping = state
        return *udu(h + damping * eye), damping, jnp.maximum(10 * damping, 1e-6)

    first = jnp.asarray(damp, h.dtype)
    start = (jnp.full_like(h, jnp.nan), jnp.full_like(h[0], jnp.nan), first, first)
    u, d, damping, _ = lax.while_loop(unfinished, attempt, start)
    finite = jnp.isfinite(d).all() & jnp.isfinite(u).all()
    return jnp.where(finite, u, eye), jnp.where(finite, d, 1), damping


def unit_upper_inverse(u: jax.Array) -> jax.Array:
    """The inverse of a unit upper triangular `[n, n]`, by back substitution; on and below its diagonal nothing is read.

    In plain loops: for the many small blocks of a sweep, LAPACK's triangular solve took a hundred times as long.
    """
    n = u.shape[0]
    eye = jnp.eye(n, dtype=u.dtype)
    above = jnp.triu(u, 1)

    def row(i, inverse):
        k = n - 1 - i
        return inverse.at[k].set(eye[k] - jnp.dot(above[k], inverse, precision=HIGHEST))

    return lax.fori_loop(0, n, row, jnp.zeros_like(u))
