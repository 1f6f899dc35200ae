"""Orthogonal matrices that spread every entry over all others."""

from typing import NamedTuple

import numpy as np

from jquant.fold.numbers import ALONE


def hadamard(n: int) -> np.ndarray | None:
    """A Hadamard matrix of order n, entries 1 and -1, float64 `[n, n]`; None where these constructions give none.

    Sylvester's doubling of Paley's first and second construction (J. Math. Phys. 12, 1933), which reach every
    multiple of 4 up to 88 but 52, and 576 = 16 x 36 (or 64 x 9: the Kronecker product of Hadamard matrices is one).
    """
    factors = _hadamard_factors(n)
    return None if factors is None else np.kron(*factors)


_TWO = np.array([[1.0, 1.0], [1.0, -1.0]])


def _hadamard_factors(n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What was doubled, and what by: the Hadamard matrix is the Kronecker product of Sylvester's and Paley's."""
    one = np.ones((1, 1))
    if n in (1, 2):
        return one, one if n == 1 else _TWO
    if n % 4:
        return None
    for paley in (_paley1, _paley2):
        if (found := paley(n)) is not None:
            return one, found
    half = _hadamard_factors(n // 2)
    return None if half is None else (np.kron(_TWO, half[0]), half[1])


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


class Factored(NamedTuple):
    """The orthogonal matrix diag(signs) (left (x) right), all float64: `[n]`, `[l, l]`, `[m, m]`, n = l m."""

    signs: np.ndarray
    left: np.ndarray
    right: np.ndarray


def random_factors(n: int, rng: np.random.Generator) -> Factored:
    """A random orthogonal matrix of order n: random signs, then a Hadamard matrix.

    Where there is none of order n, the Kronecker product of the largest one whose order divides n with a random
    orthogonal matrix of the rest.

    Args:
      n: its order.
      rng: where signs (and the rest) come from.
    """
    size = next(m for m in range(n, 0, -1) if n % m == 0 and _hadamard_factors(m) is not None)
    factors = _hadamard_factors(size)
    assert factors is not None
    left, right = factors[0], factors[1] / np.sqrt(size)
    if size < n:
        rest, _ = np.linalg.qr(rng.normal(size=(n // size, n // size)))
        right = np.kron(right, rest)
    return Factored(rng.choice([-1.0, 1.0], size=n), left, right)


def random_rotation(n: int, rng: np.random.Generator, ones: bool = False) -> np.ndarray:
    """`random_factors` as one matrix, float64 `[n, n]`.

    Args:
      ones: the matrix maps the vector of ones to itself: it is followed by the reflection that brings that back.
    """
    signs, left, right = random_factors(n, rng)
    r = signs[:, None] * np.kron(left, right)
    return _keeping_ones(r) if ones else r


_PART = 2**18  # entries that stay in a cache


def turn_rows(rows: np.ndarray, by: Factored, out: np.ndarray) -> None:
    """`out[:] = rows @ R` in n (l + m) products a row instead of n n, all float64 `[count, n]`, in any order of memory.

    Few calls of NumPy for each part, of many small products that leave the other cores, and the interpreter, alone.
    """
    along = _turn_columns if rows.strides[0] < rows.strides[1] else _turn_rows
    at_once = max(1, ALONE // len(by.right) ** 2)
    size = max(1, _PART // rows.shape[1] // at_once) * at_once
    whole = len(rows) // at_once * at_once
    for i in range(0, whole, size):
        along(rows[i : min(i + size, whole)], by, out[i : min(i + size, whole)], at_once)
    if whole < len(rows):
        along(rows[whole:], by, out[whole:], len(rows) - whole)


def _turn_rows(rows: np.ndarray, by: Factored, out: np.ndarray, at_once: int) -> None:
    """The factors along rows that lie as rows in memory."""
    l, m = len(by.left), len(by.right)
    x = np.multiply(rows, by.signs, order="C")
    together = max(k for k in range(1, at_once + 1) if at_once % k == 0 and k * l <= max(l, at_once))
    y = np.matmul(x.reshape(-1, together * l, m), by.right).reshape(-1, l, m)
    out[:] = (np.matmul(by.left.T, y) if l > 1 else y).reshape(x.shape)


def _turn_columns(rows: np.ndarray, by: Factored, out: np.ndarray, at_once: int) -> None:
    """The same for rows that lie as columns in memory: `at_once` of them are a matrix."""
    l, m = len(by.left), len(by.right)
    x = np.multiply(rows.T, by.signs[:, None], order="C").reshape(l, m, -1, at_once)
    y = np.matmul(by.right.T, x.transpose(2, 0, 1, 3)).reshape(-1, l, m * at_once)
    if l > 1:
        y = np.matmul(by.left.T, y)
    out.T.reshape(l * m, -1, at_once)[:] = y.reshape(-1, l * m, at_once).transpose(1, 0, 2)


def _keeping_ones(r: np.ndarray) -> np.ndarray:
    """P r, with the reflection P that maps r u to u, u the unit vector of ones."""
    u = np.full(len(r), len(r) ** -0.5)
    v = r @ u - u
    length = v @ v
    return r if length < 1e-30 else r - np.outer(2 / length * v, v @ r)
