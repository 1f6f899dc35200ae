"""A bank of layers to quantize whose answers are known on paper: weights W `[m, n]` and the Gram matrix H `[n, n]` of
their inputs, in numpy float64 (all weights are float32 numbers). `tests/test_problems.py` holds it to what it says."""

from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """One matrix to quantize.

    Attributes:
      w: `[m, n]`.
      h: `[n, n]`, symmetric, positive semidefinite.
    """

    w: np.ndarray
    h: np.ndarray


def objective(w: np.ndarray, q: np.ndarray, h: np.ndarray) -> np.ndarray:
    """e H e^T of each row e of W - Q: the squared error of the output, summed over the tokens. float64 `[m]`."""
    e = np.asarray(w, np.float64) - np.asarray(q, np.float64)
    return np.einsum("ij,jk,ik->i", e, h, e)


def weights(seed: int, m: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(m, n)).astype(np.float32).astype(np.float64)


def correlated(seed: int, m: int, n: int, tokens: int | None = None, dead: int = 0) -> Problem:
    """Inputs mixed by a random matrix and of very different sizes; of rank `tokens` if they are few.

    `dead` channels, at random places, are zero in every token.
    """
    rng = np.random.default_rng(seed + 1)
    mix = np.eye(n) + 0.7 * rng.normal(size=(n, n)) / np.sqrt(n)
    x = rng.normal(size=(2 * n if tokens is None else tokens, n)) @ mix * np.exp(0.5 * rng.normal(size=n))
    x[:, rng.permutation(n)[:dead]] = 0
    return Problem(weights(seed, m, n), x.T @ x)


def independent(seed: int, m: int, n: int) -> Problem:
    """Inputs that are uncorrelated, of different sizes: no error can be made good elsewhere, rounding is best."""
    size = np.exp(np.random.default_rng(seed + 1).normal(size=n))
    return Problem(weights(seed, m, n), np.diag(size))


def identical(seed: int, m: int, n: int) -> Problem:
    """All inputs are the same number: only the sum of a row's errors counts, and half a step of it is reachable."""
    return Problem(weights(seed, m, n), np.ones((n, n)))


def pair(rho: float) -> Problem:
    """Two inputs of unit size with correlation rho, W = (1.4375, 7.25), to be rounded to integers.

    The first column is rounded to 1, an error of 7/16. The best real second column is then 7.25 + 7/16 rho: it rounds
    to 8 from rho = 4/7 on, which is also where (1, 8) becomes a better pair than round to nearest's (1, 7).
    """
    return Problem(np.array([[1.4375, 7.25]]), np.array([[1, rho], [rho, 1]]))
