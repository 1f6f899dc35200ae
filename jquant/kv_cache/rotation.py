"""Random rotations of head vectors: signs and a fast Walsh-Hadamard transform.

Sums are taken in one fixed order and every factor but the last is 1 or -1, so a vector gets the same bits alone and
among others: a product with a matrix would not give them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def signs(dim: int, times: int, seed: int) -> np.ndarray:
    """float32 `[times, dim]` of 1 and -1."""
    return np.random.default_rng([seed, dim]).choice(np.asarray([1, -1], np.float32), size=(times, dim))


def rotate(x: jax.Array, times: int, seed: int) -> jax.Array:
    """H D_times ... H D_1 x over the last axis, float32: an orthogonal map, D_i diagonal signs.

    H is the Hadamard matrix of the largest power of two that divides the axis, Kronecker the identity of the rest.
    """
    if times == 0:
        return x
    x = x.astype(jnp.float32)
    for row in signs(x.shape[-1], times, seed):
        x = _hadamard(x * row)
    return x * _unit(x.shape[-1], times)


def unrotate(x: jax.Array, times: int, seed: int) -> jax.Array:
    """The inverse of `rotate`."""
    if times == 0:
        return x
    for row in signs(x.shape[-1], times, seed)[::-1]:
        x = _hadamard(x) * row
    return x * _unit(x.shape[-1], times)


def _order(dim: int) -> int:
    return dim & -dim


def _unit(dim: int, times: int) -> np.float32:
    return np.float32(_order(dim) ** (-times / 2))


def _hadamard(x: jax.Array) -> jax.Array:
    """Butterflies, not normalized."""
    dim, half = x.shape[-1], 1
    while half < _order(dim):
        pairs = x.reshape(*x.shape[:-1], dim // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x
