"""Steps on the orthogonal group by the Cayley transform (Li et al., arXiv 2002.01113; SpinQuant, arXiv 2405.16406).

R `[..., n, n]` is orthogonal, G = dL/dR. To first order exp(U) R, U skew, changes L by <skew(G R^T), U>: that skew
matrix is the gradient, and a step goes to (I - U/2)^-1 (I + U/2) R. Two departures from the papers, both towards what
they approximate: the momentum is kept as a skew matrix, which stays a tangent wherever R goes (there it is M = W R,
projected again at each step), and the transform is solved for, where they take two steps of a fixed point.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def skew(a: jax.Array, ones: bool = False) -> jax.Array:
    """(a - a^T) / 2; with `ones` its part that maps the vector of ones to zero."""
    w = (a - jnp.swapaxes(a, -1, -2)) / 2
    if ones:
        rows = jnp.mean(w, axis=-1, keepdims=True)  # the mean of all entries of a skew matrix is zero
        w = w - rows + jnp.swapaxes(rows, -1, -2)
    return w


def tangent(g: jax.Array, r: jax.Array, ones: bool = False) -> jax.Array:
    """The gradient in the skew matrices: <tangent, U> is the change of L along (I + U) R, U skew (and U 1 = 0)."""
    return skew(_dot(g, jnp.swapaxes(r, -1, -2)), ones)


def bounded(u: jax.Array, most: float = 1.0) -> jax.Array:
    """U, shortened where its 1-norm is above `most`: the papers' bound 2q / |W| of the step, q = 1/2."""
    norm = jnp.max(jnp.sum(jnp.abs(u), axis=-2, keepdims=True), axis=-1, keepdims=True)
    return u * jnp.minimum(1.0, most / jnp.maximum(norm, jnp.finfo(u.dtype).tiny)).astype(u.dtype)


def cayley(u: jax.Array) -> jax.Array:
    """(I - U/2)^-1 (I + U/2): orthogonal for a skew U."""
    eye = jnp.eye(u.shape[-1], dtype=u.dtype)
    return jnp.linalg.solve(eye - u / 2, eye + u / 2)


def polished(r: jax.Array) -> jax.Array:
    """One step of Newton and Schulz towards the next orthogonal matrix: an error of e becomes one of e^2."""
    return 1.5 * r - 0.5 * _dot(r, _dot(jnp.swapaxes(r, -1, -2), r))


def moved(r: jax.Array, u: jax.Array) -> jax.Array:
    """R after a step U, orthogonal to the accuracy of its dtype however many steps there were."""
    return polished(_dot(cayley(bounded(u)), r))


def orthogonal(r: np.ndarray, ones: bool = False) -> np.ndarray:
    """The orthogonal matrix next to `r` `[n, n]`, in float64; with `ones` it maps the vector of ones to itself."""
    a = np.asarray(r, np.float64)
    if ones:  # what it does to the others' space, which then stays apart
        a = a - a.mean(0) - a.mean(1, keepdims=True) + a.mean() + 1 / len(a)
    u, _, vt = np.linalg.svd(a)
    return u @ vt
