"""QERA: an Analytical Framework for Quantization Error Reconstruction (arXiv 2410.06040), its exact solution.

Beside the rounded weight stands a float matrix of rank r that absorbs as much of the output's error as that rank can.
Letters: W the weight (a row per output), Q the rounded one, E = W - Q, H the Gram matrix of the inputs, with damping
(the paper's R_xx but for a factor), S = A B the side. The paper's theorem 1, transposed:

    S = argmin tr((E - S) H (E - S)^T) = SVD_r(E H^1/2) H^-1/2

With U the r leading left singular vectors of E H^1/2, SVD_r(E H^1/2) = U U^T E H^1/2. So the roots cancel,

    S = U U^T E,    A = U,    B = U^T E

and U are leading eigenvectors of E H E^T. Nothing is inverted, a singular H needs no care, and since E - S is a
projection of E no row of B makes any quadratic error larger, whatever the inputs turn out to be. Where W has more rows
than columns, U comes from the smaller eigenproblem of R^T E^T E R with H = R R^T: it spans what the leading ones of its
eigenvectors are mapped to by E R.

A is stored first, and B is the least squares answer to the A that is stored: inv(A^T A) A^T E.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import Format, decode
from jquant.core.method import Method, Rounding
from jquant.core.side import Side
from jquant.core.stats import Stats, checked_gram
from jquant.core.text import call
from jquant.solvers.gptq import unit_hessian
from jquant.solvers.linalg import damped_udu, dot
from jquant.solvers.rtn import rtn

DTYPES = ("bfloat16", "float32")
_ROUND, _RANK = rtn(), 16


def lowrank(
    rank: int | None = None, *, budget: int | None = None, damp: float = 0.01, dtype: str = "bfloat16"
) -> Method:
    """Adds a float matrix of low rank to each weight, the one that leaves the least error of the output.

    It comes last in a chain, behind what rounds: `chain(rotate(), gptq(act_order=True), lowrank(16))`; where nothing
    has been rounded yet, it rounds to nearest first. `quantized` multiplies the two factors one after the other:
    rank * (m + n) multiplications for a token beside the m * n of the codes. In error never worse than without it, and
    never worse than with a lower rank.

    Args:
      rank: of the matrix, 16 where no budget is given; of a weight `[m, n]` at most min(m, n), with which no error is
        left. 0 for none.
      budget: bytes instead of a rank: each weight (of experts and stacked layers, each matrix) gets the highest rank
        whose factors, rank * (m + n) numbers, take no more. A weight of which a single rank takes more gets none, with
        a warning.
      damp: added to the diagonal of H, in units of its mean. A weight that no token reached takes H = I.
      dtype: of the factors: bfloat16, which costs about 3e-6 of the error they absorb, or float32.

    Weights that are only looked up meet no inputs, and get none. Computes in float32 (float64 if the Gram matrix is).

    Raises:
      ValueError: both `rank` and `budget`, or a setting out of range; or, when solving, there is no Gram matrix
        of the right shape.
    """
    if rank is not None and budget is not None:
        raise ValueError("lowrank: give a rank, lowrank(16), or bytes for each weight, lowrank(budget=9000); not both")
    if rank is None and budget is None:
        rank = _RANK
    if min(rank or 0, budget or 0) < 0 or not damp >= 0 or dtype not in DTYPES:
        got = f"rank={rank}, budget={budget}, damp={damp}, dtype={dtype}"
        raise ValueError(f"lowrank: needs rank, budget and damp >= 0 and dtype one of {', '.join(DTYPES)}, got {got}")

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        gram = checked_gram("lowrank", state.rows, stats)
        if state.codes is None:
            state = _ROUND.solve(state, stats, fmt)  # type: ignore[misc]
        wide = jnp.float64 if gram.dtype == jnp.float64 else jnp.float32
        error = state.rows.astype(wide) - decode(state.codes, state.params, fmt).astype(wide)  # type: ignore[arg-type]
        sides, notes = [], state.notes
        for start, stop in state.spans:
            r = _rank(rank, budget, stop - start, error.shape[-1], dtype)
            if r == 0 and rank is None:
                notes = notes | {"no_side": notes.get("no_side", 0) + jnp.ones(len(gram), jnp.int32)}
            one = partial(best_side, rank=r, damp=damp, dtype=dtype)
            # Each part stores its own B, so each has the best for itself.
            sides.append(lax.map(lambda xs, one=one: one(*xs), (error[:, start:stop], gram)) if r else None)
        return state._replace(sides=tuple(sides), notes=notes)

    settings = {"budget": (budget, None), "damp": (damp, 0.01), "dtype": (dtype, "bfloat16")}
    name = call("lowrank", **({} if rank is None else {"rank": (rank, None)}), **settings)
    return Method(name, solve, frozenset({"gram"}), last=True)


def _rank(rank: int | None, budget: int | None, m: int, n: int, dtype: str) -> int:
    """The rank for a weight `[m, n]`."""
    if rank is None:
        assert budget is not None
        rank = budget // (jnp.dtype(dtype).itemsize * max(m + n, 1))
    return min(rank, m, n)


def best_side(error: jax.Array, gram: jax.Array, *, rank: int, damp: float, dtype: str) -> Side:
    """A `[m, r]` and B `[r, n]` for E `[m, n]`: the best of rank r > 0, in `dtype`; zeros where rounding spoils it."""
    h, dead = unit_hessian(gram)
    damped = h + jnp.where(jnp.all(dead > 0), 1, damp) * jnp.eye(len(h), dtype=h.dtype)
    left = _leading(error, damped, rank).astype(dtype)
    a = left.astype(error.dtype)
    square, projected = dot(a.T, a), dot(a.T, error)
    right = jax.scipy.linalg.solve(square, projected, assume_a="pos").astype(dtype)
    judge = jnp.where(jnp.all(dead > 0), damped, h)
    better = _loss(error - dot(a, right.astype(error.dtype)), judge) <= _loss(error, judge)
    return jax.tree.map(lambda x: jnp.where(better, x, 0), Side(left, right))


def _leading(error: jax.Array, h: jax.Array, rank: int) -> jax.Array:
    """U: orthonormal, the `rank` leading left singular vectors of E H^1/2 (or what spans the same), `[m, r]`."""
    m, n = error.shape
    if m <= n:
        return _eigenvectors(dot(dot(error, h), error.T), rank)
    ut, d, _ = damped_udu(h, 0.0)
    mapped = dot(error, ut.T * jnp.sqrt(d))
    return jnp.linalg.qr(dot(mapped, _eigenvectors(dot(mapped.T, mapped), rank)))[0]


def _eigenvectors(a: jax.Array, rank: int) -> jax.Array:
    """Those of the `rank` largest eigenvalues of a symmetric matrix, the largest first."""
    return jnp.linalg.eigh(a)[1][:, ::-1][:, :rank]


def _loss(e: jax.Array, h: jax.Array) -> jax.Array:
    """tr(E H E^T)."""
    return jnp.sum(dot(e, h) * e)
