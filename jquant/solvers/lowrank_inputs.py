"""Inputs apart: what is largest in the input of a matmul goes past the rounding, through a thin float side.

Letters: x a row of the input, W the weight (a row per output), H the Gram matrix of the inputs, Q what the codes stand
for; B, C and A the factors of the side (`core.side`), P = B^T C a projection, oblique, of rank r.

    x' = x - (x B^T) C,    y = round(x') Q^T + (x B^T) A^T,    A = W C^T

With Q = W and no rounding that is x W^T, whatever B and C are. A floating point format rounds each number with an error
eps relative to it, which the weights that read it carry on: for one token that is, with D = diag(sum_j W_ji^2),

    E ||(round(x') - x') W^T||^2 = eps^2 sum_i D_i E[x'_i^2] = eps^2 tr(D (I-P)^T H (I-P))

Of all P of rank r the least of it is left by the one that is orthogonal in the metric of D: with V the leading
eigenvectors of D^1/2 H D^1/2 (`[r, n]`),

    B = V D^1/2,    C = V D^-1/2

and what is left is the sum of the other eigenvalues. The methods behind it in a chain solve for what Q meets, the Gram
matrix (I-P)^T H (I-P) of x', out of which the directions are gone that a weight's error is largest along.

That some of an input stays in high precision is of ResQ (arXiv 2412.14363), which rotates by the eigenvectors of H and
keeps 8 bits for the leading coordinates; that a side of low rank reads the unrounded input, of LRC (2412.07902), whose
side is fitted to the error of the output beside codes that read all of the rounded input; that a part of low rank is
absorbed before rounding, of SVDQuant (2411.05007), which takes it out of the weights. Here it is taken out of the
inputs, in closed form, by the metric of an error that is relative to each number.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import Format
from jquant.core.method import Method, Rounding
from jquant.core.side import Side
from jquant.core.stats import Stats, checked_gram, without
from jquant.core.text import call
from jquant.solvers.gptq import unit_hessian
from jquant.solvers.linalg import dot
from jquant.solvers.lowrank import DTYPES


def lowrank_inputs(rank: int = 2, *, dtype: str = "bfloat16") -> Method:
    """Takes a part of low rank out of each input before it is rounded, and lets it pass beside in float.

    It comes first, in front of what rounds: `chain(lowrank_inputs(2), gptq(act_order=True))`. Made for inputs in fp8,
    whose error is relative to each number; what is left of that error never rises with the rank. It chooses no codes:
    the methods behind it do, for what is left of the inputs. Those that read Gram matrices (and the second stream of
    `qronos` and `gptaq`) do so exactly; nothing else that calibration saw of the inputs is true of what is left.

    Weights that read one input and are solved together (queries, keys and values) share one projection, each with a
    copy of it: rank * (m + 2 n) numbers for a weight `[m, n]`, and as many multiplications for a token.

    Args:
      rank: of the part, at most n, with which nothing is left to be rounded. 0 for none.
      dtype: of the factors: bfloat16 or float32.

    A convolution rounds its whole input, and gains what a better Gram matrix gives its weights. In the walk inputs are
    not rounded behind it. Weights that are only looked up meet no inputs, and those that no token reached take nothing
    out. Computes in float32 (float64 if the Gram matrix is).

    Raises:
      ValueError: a setting out of range; or, when solving, something has been rounded already, or there is no Gram
        matrix of the right shape.
    """
    if rank < 0 or dtype not in DTYPES:
        got = f"rank={rank}, dtype={dtype}"
        raise ValueError(f"lowrank_inputs: needs rank >= 0 and dtype one of {', '.join(DTYPES)}, got {got}")

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        gram = checked_gram("lowrank_inputs", state.rows, stats)
        assert stats is not None
        if state.codes is not None or state.sides:
            raise ValueError("lowrank_inputs: is for weights that nothing has rounded; put it first in the chain")
        r = min(rank, state.rows.shape[-1])
        if r == 0:
            return state
        wide = gram.dtype if gram.dtype == jnp.float64 else jnp.float32
        rows = state.rows.astype(wide)
        one = partial(best_factors, rank=r, dtype=dtype)
        right, taken = lax.map(lambda xs: one(*xs), (rows, gram))
        left = dot(rows, taken.astype(wide).swapaxes(-1, -2)).astype(dtype)
        sides = tuple(Side(left[:, a:b], right, taken) for a, b in state.spans)
        return state._replace(sides=sides, inputs=without(stats, right.astype(wide), taken.astype(wide)))

    name = call("lowrank_inputs", rank=(rank, None), dtype=(dtype, "bfloat16"))
    return Method(name, solve, frozenset({"gram"}), first=True)


def best_factors(rows: jax.Array, gram: jax.Array, *, rank: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """B and C `[r, n]` in `dtype`, for W `[m, n]` and H `[n, n]`: zeros for what no input or no weight has."""
    h, dead = unit_hessian(gram)
    d = jnp.sum(rows**2, axis=0)
    live = (d > 0) & (dead == 0)
    root = jnp.where(live, jnp.sqrt(d / jnp.maximum(jnp.max(d), jnp.finfo(d.dtype).tiny)), 0)
    values, vectors = jnp.linalg.eigh(root[:, None] * h * root)
    v = jnp.where(values[::-1][:rank, None] > 0, vectors.T[::-1][:rank], 0)
    right, taken = (v * root).astype(dtype), (v * jnp.where(live, 1 / jnp.where(live, root, 1), 0)).astype(dtype)
    better = _noise(h, d, right.astype(h.dtype), taken.astype(h.dtype)) <= jnp.sum(d * jnp.diagonal(h))
    return jnp.where(better, right, 0), jnp.where(better, taken, 0)


def _noise(h: jax.Array, d: jax.Array, right: jax.Array, taken: jax.Array) -> jax.Array:
    """tr(D (I-P)^T H (I-P)): what is left to be rounded, as the weights carry it on."""
    left = h - dot(dot(h, right.T), taken)
    return jnp.sum(d * jnp.diagonal(left - dot(taken.T, dot(right, left))))
