"""GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration (arXiv 2504.02692), formerly GPTQv2.

Its objective is that of Qronos, |dW X~ - W (X - X~)|^2, taken column by column: while column q is rounded, what the
float model's inputs differ by there, W_q dX_q, is handed to the columns behind it. The paper's letters, but for U:
dX = X - X~, H = X~ X~^T, P the correction, H = U D U^T with U unit upper triangular (as in `gptq`), V = inv(U). Since
the trailing blocks of U, D and V belong to those of H,

    P = ((C V^T) o M / D) V,    C = dX X~^T,    M strictly upper triangular,

and adding W_q P_q to the later columns when column q is rounded is GPTQ on W (I + P). The reference code
(github.com/Intelligent-Computing-Lab-Panda/GPTAQ) hands on the *corrected* column times P_q, where the paper's
objective has the weight itself, which lowers it by 3 % on the problems of tests/solvers/test_qronos.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import Format
from jquant.core.method import Method, Rounding
from jquant.core.stats import Stats
from jquant.core.text import call
from jquant.solvers.gptq import Settings, sweep_rows, unit_hessian
from jquant.solvers.linalg import HIGHEST, damped_udu, unit_lower_inverse
from jquant.solvers.qronos import both_streams


def gptaq(
    act_order: bool = False, damp: float = 0.01, block_size: int = 128, search: bool = False, alpha: float = 0.25
) -> Method:
    """GPTQ that also corrects, column by column, for what the inputs have become.

    Costs what `qronos` costs; see there.

    Args:
      act_order, damp, block_size, search: as in `gptq`.
      alpha: how much of the correction is applied; the reference code's 0.25. At 1 it is the paper's.

    Raises:
      ValueError: as in `gptq`.
    """
    settings = Settings.checked("gptaq", act_order, damp, block_size, search)

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        rows, gram, cross = both_streams("gptaq", state, stats)
        moved = lax.map(lambda xs: _moved(*xs, settings=settings), (rows, gram, cross))
        return sweep_rows(state._replace(rows=rows + alpha * moved), gram, fmt, settings)

    return Method(call("gptaq", **settings.said(), alpha=(alpha, 0.25)), solve, frozenset({"gram", "cross"}))


def _moved(rows: jax.Array, gram: jax.Array, cross: jax.Array, *, settings: Settings) -> jax.Array:
    """W P, `[m, n]`, with the columns in the order in which they are rounded."""
    h, dead = unit_hessian(gram)
    order = jnp.argsort(-jnp.diagonal(h), stable=True) if settings.act_order else jnp.arange(len(h))
    h, c, dead = h[order][:, order], cross[order][:, order], dead[order]
    ut, d, _ = damped_udu(h, settings.damp, dead)
    vt = unit_lower_inverse(ut)
    p = jnp.matmul(jnp.triu(jnp.matmul(c, vt, precision=HIGHEST), 1) / d, vt.T, precision=HIGHEST)
    return jnp.matmul(rows[:, order], p, precision=HIGHEST)[:, jnp.argsort(order)]
