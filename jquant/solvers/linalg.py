"""Triangular factorizations for the second-order solvers: H = U D U^T by a single Cholesky factorization.

LAPACK's own routines reach a small part of a CPU's matmul rate, the less the busier the machine, so what is large is
done by matmuls here. Everything runs on every device.
"""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST  # never TF32 or bf16 passes: a solver's float32 is float32 on every device
MAX_DAMPING = 10.0


def cholesky(a: jax.Array) -> jax.Array:
    """The lower triangular L with A = L L^T, by block columns, each updated by those to its left.

    Args:
      a: `[n, n]`, symmetric positive definite; its upper triangle is not read.

    Returns:
      L, `[n, n]`, not finite if `a` isn't numerically definite.
    """
    n = len(a)
    count = 1 if n < 256 else 4 if n < 2048 else 8  # more would be longer to compile
    cuts = [n * i // count for i in range(count + 1)]
    panels: list[jax.Array] = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        panel = a[start:, start:stop]
        for left in panels:
            left = left[start - n :]
            panel = panel - jnp.matmul(left, left[: stop - start].T, precision=HIGHEST)
        top = jnp.tril(lax.linalg.cholesky(panel[: stop - start], symmetrize_input=False))
        below = jnp.matmul(panel[stop - start :], lower_inverse(top).T, precision=HIGHEST) if stop < n else panel[:0]
        panels.append(jnp.concatenate([top, below]))
    return jnp.concatenate([jnp.pad(p, ((n - len(p), 0), (0, 0))) for p in panels], axis=1)


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


def udu(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H = U D U^T with U unit upper triangular and D diagonal.

    The Cholesky factor of H with rows and columns reversed is lower triangular; reversed back it is upper triangular.

    Args:
      h: `[n, n]`, symmetric positive definite.

    Returns:
      U `[n, n]` and the diagonal of D `[n]`, in the dtype of `h`; not finite if `h` isn't numerically definite.
    """
    root = cholesky(h[::-1, ::-1])[::-1, ::-1]
    diagonal = jnp.diagonal(root)
    return jnp.triu(root / diagonal, 1) + jnp.eye(len(h), dtype=h.dtype), diagonal**2


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
        return ~(jnp.isfinite(d).all() & jnp.isfinite(u).all()) & (following <= 1.01 * max(MAX_DAMPING, damp))

    def attempt(state):
        _, _, _, damping = state
        return *udu(h + damping * eye), damping, jnp.maximum(10 * damping, 1e-6)

    first = jnp.asarray(damp, h.dtype)
    start = (jnp.full_like(h, jnp.nan), jnp.full_like(h[0], jnp.nan), first, first)
    u, d, damping, _ = lax.while_loop(unfinished, attempt, start)
    finite = jnp.isfinite(d).all() & jnp.isfinite(u).all()
    return jnp.where(finite, u, eye), jnp.where(finite, d, 1), damping

