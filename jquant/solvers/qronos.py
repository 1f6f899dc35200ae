"""Qronos: correcting the past by shaping the future, in post-training quantization (arXiv 2505.11695).

GPTQ asks the quantized weight to do on the quantized model's inputs what the weight does on them. Qronos asks it to do
what the weight does on the float model's inputs, and so makes good for what has been rounded before. The paper's
letters: X the float model's inputs, X~ the quantized model's (a row per token), H = X~^T X~, G = X~^T X, W the weight
(a row per output), Q the quantized one. It goes through the columns as GPTQ does, on the objective |X W^T - X~ Q^T|^2.

What its first step leaves behind is what GPTQ's first step leaves of the least-squares weight W* = W G^T inv(H); every
later step is GPTQ's. So Qronos is GPTQ on W*, but for the code of the first column: the paper takes the best one with
the others still at W. Their best values are W*, and so W*'s own first column is the better target: on the problems of
tests/solvers/test_qronos.py, with 30 columns, it lowers the objective by 1.4 %. It is the default here;
`paper_first_column` is the paper's.

Here G = H + C^T with C = sum of (x - x~) x~^T, which loses no digits to the difference of two sums,

    W* = W + W C inv(H),    the paper's target of the first column k = W_k + (W C)_k / H_kk

and damping pulls W* towards W, not towards zero as inv(H + damping) W G^T would.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import Format
from jquant.core.method import Method, Rounding
from jquant.core.stats import Stats, checked_cross, checked_gram
from jquant.core.text import call
from jquant.solvers.gptq import Settings, sweep_rows, unit_hessian
from jquant.solvers.linalg import HIGHEST, damped_udu, unit_lower_inverse


def qronos(
    act_order: bool = False,
    damp: float = 0.01,
    block_size: int = 128,
    search: bool = False,
    *,
    paper_first_column: bool = False,
) -> Method:
    """GPTQ with the float model's outputs as the goal, on the quantized model's inputs.

    The walk carries the activations of both models; the float one's as what it differs by, in bfloat16. That costs
    time (`benchmarks/quality.py --tried`: 239 s where `gptq` takes 144) and memory. Weights with an axis of their own
    in common with their inputs (experts) are solved as by `gptq`: their two inputs may hold different tokens.

    Args:
      act_order, damp, block_size, search: as in `gptq`.
      paper_first_column: the code of the first column as in the paper (see the module).

    Raises:
      ValueError: as in `gptq`.
    """
    settings = Settings.checked("qronos", act_order, damp, block_size, search)

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        rows, gram, cross = both_streams("qronos", state, stats)
        moved, first = lax.map(lambda xs: _moved(*xs, damp=damp), (rows, gram, cross))
        state = state._replace(rows=rows + moved)
        return sweep_rows(state, gram, fmt, settings, rows + first if paper_first_column else None)

    name = call("qronos", **settings.said(), paper_first_column=(paper_first_column, False))
    return Method(name, solve, frozenset({"gram", "cross"}))


def both_streams(name: str, state: Rounding, stats: Stats | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W, H and C, batched: W in the dtype that is calculated in, C in the units of `unit_hessian`."""
    gram, cross = checked_gram(name, state.rows, stats), checked_cross(name, state.rows, stats)
    mean = jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[:, None, None]
    cross = (cross / jnp.where(mean > 0, mean, 1)).astype(gram.dtype)
    return state.rows.astype(jnp.float64 if gram.dtype == jnp.float64 else jnp.float32), gram, cross


def _moved(rows: jax.Array, gram: jax.Array, cross: jax.Array, *, damp: float) -> tuple[jax.Array, jax.Array]:
    """W* - W, and the first targets less W, both `[m, n]`."""
    h, dead = unit_hessian(gram)
    ut, d, damping = damped_udu(h, damp, dead)
    right = jnp.matmul(rows, cross, precision=HIGHEST)
    vt = unit_lower_inverse(ut)  # inv(U D U^T) = V^T inv(D) V
    moved = jnp.matmul(jnp.matmul(right, vt, precision=HIGHEST) / d, vt.T, precision=HIGHEST)
    return moved, right / (jnp.diagonal(h) + dead + damping)
