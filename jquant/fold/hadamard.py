"""Orthogonal matrices that spread every entry over all others."""

import numpy as np


def hadamard(n: int) -> np.ndarray | None:
    """A Hadamard matrix of order n, entries 1 and -1, float64 `[n, n]`; None where these constructions give none.

    Sylvester's doubling of Paley's first and second construction (J. Math. Phys. 12, 1933), which reach every
    multiple of 4 up to 88 but 52, and 576 = 16 x 36 (or 64 x 9: the Kronecker product of Hadamard matrices is one).
    """
    if n in (1, 2):
        return np.array([[1.0]]) if n == 1 else np.array([[1.0, 1.0], [1.0, -1.0]])
    if n % 4:
        return None
    for paley in (_paley1, _paley2):
        if (found := paley(n)) is not None:
            return found
    half = hadamard(n // 2)
    return None if half is None else np.kron([[1.0, 1.0], [1.0, -1.0]], half)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _residues(q: int) -> np.ndarray:
    """The matrix of chi(i - j), chi the quadratic character modulo q."""
    chi = -np.ones(q)
    chi[np.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    at = np.arange(q)
    return chi[(at[:, None] - at[None, :]) % q]


def _paley1(n: int) -> np.ndarray | None:
    q = n - 1
    if not _is_prime(q) or q % 4 != 3:
        return None
    s = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), _residues(q)]])
    return np.eye(n) + s


def _paley2(n: int) -> np.ndarray | None:
    q = n // 2 - 1
    if n % 2 or not _is_prime(q) or q % 4 != 1:
        return None
    c = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _residues(q)]])
    return np.kron(c, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]])


def random_rotation(n: int, rng: np.random.Generator, ones: bool = False) -> np.ndarray:
    """A random orthogonal matrix, float64 `[n, n]`: random signs, then a Hadamard matrix.

    Where there is none of order n, the Kronecker product of the largest one whose order divides n with a random
    orthogonal matrix of the rest.

    Args:
      n: its order.
      rng: where signs (and the rest) come from.
      ones: the matrix maps the vector of ones to itself: it is followed by the reflection that brings that back.
    """
    size = next(m for m in range(n, 0, -1) if n % m == 0 and hadamard(m) is not None)
    h = hadamard(size)
    assert h is not None
    q = h / np.sqrt(size)
    if size < n:
        rest, _ = np.linalg.qr(rng.normal(size=(n // size, n // size)))
        q = np.kron(q, rest)
    r = rng.choice([-1.0, 1.0], size=n)[:, None] * q
    return _keeping_ones(r) if ones else r


def _keeping_ones(r: np.ndarray) -> np.ndarray:
    """P r, with the reflection P that maps r u to u, u the unit vector of ones."""
    u = np.full(len(r), len(r) ** -0.5)
    v = r @ u - u
    length = v @ v
    return r if length < 1e-30 else r - np.outer(2 / length * v, v @ r)
