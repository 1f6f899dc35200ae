"""HQQ: Half-Quadratic Quantization of Large Machine Learning Models (H. Badri, A. Shaji, 2023,
mobiusml.github.io/hqq_blog). Needs no data.

Its symbols: W the weight, s and z scale and zero point, W_q the codes, W_r = s (W_q - z) what they stand for, W_e the
auxiliary error, phi the loss |.|^p with p < 1, which lets a few outliers keep their errors. With s fixed,

    min over z, W_e of   phi(W_e) + beta / 2 ||W_e - (W - W_r)||^2

is solved by turns:

    W_e <- shrink_p(W - W_r, beta)                sign(x) relu(|x| - |x|^(p-1) / beta)
    z   <- mean over the block of W_q - (W - W_e) / s
    beta <- kappa beta

Where the authors' code (github.com/mobiusml/hqq) differs: errors are in units of s here, so that scaling a weight
changes nothing; and each block keeps the best z that was met, that of round to nearest included.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.errors import FormatError
from jquant.core.formats import (
    BlockParams,
    Format,
    block_counts,
    compute_params,
    encode,
    reduce_blocks,
    row_params,
    spread,
    store_zero,
)
from jquant.core.method import Method, Rounding
from jquant.core.stats import Stats
from jquant.core.text import call


def hqq(p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iters: int = 20) -> Method:
    """Moves the zero point of every block to where the sum of |error|^p is least; then rounds to nearest.

    For asymmetric integer formats. Zero points of dtype uint8 can only move by whole codes, which leaves little to win:
    give the format a float `zero_dtype` ("int4-g64-asym-zbf16").

    Args:
      p: the exponent of the loss, in (0, 1].
      beta: how closely W_e follows the error at the start, errors in units of the scale.
      kappa: the growth of beta in an iteration, >= 1.
      iters: iterations at most; it stops when the total loss falls no more.

    In sum of |error|^p no block is worse than rounded to nearest. Of an earlier method of a chain the scales are kept,
    and the zero points are where it starts.

    Raises:
      ValueError: a setting is out of range.
      FormatError: when solving, the format has no zero point.
    """
    if not (0 < p <= 1 and beta > 0 and kappa >= 1 and iters >= 1):
        got = f"p={p}, beta={beta}, kappa={kappa}, iters={iters}"
        raise ValueError(f"hqq: needs 0 < p <= 1, beta > 0, kappa >= 1 and iters >= 1, got {got}")

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        if fmt.symmetric:
            raise FormatError(
                f"hqq: {fmt} has no zero point to choose; take an asymmetric integer format, such as "
                "int4-g64-asym-zbf16, or the method rtn(search=True)"
            )
        rows = state.rows.astype(jnp.float32)
        start = compute_params(rows, fmt, stacked=1) if state.params is None else state.params
        params = best_zero_points(rows, start, fmt, p, beta, kappa, iters)
        return state._replace(params=params, codes=encode(rows, params, fmt))

    return Method(call("hqq", p=(p, 0.7), beta=(beta, 10.0), kappa=(kappa, 1.01), iters=(iters, 20)), solve)


class _State(NamedTuple):
    """Where the iteration is: the zero points now; the best so far and their losses `[batch, M, blocks]`."""

    i: jax.Array
    zero: jax.Array
    best: jax.Array
    loss: jax.Array
    falling: jax.Array


def best_zero_points(
    rows: jax.Array, start: BlockParams, fmt: Format, p: float, beta: float, kappa: float, iters: int
) -> BlockParams:
    """The iteration on rows `[batch, m, n]` (float32), from the zero points of `start`."""
    m, n = rows.shape[-2:]
    scale = spread(row_params(start, fmt, m)[0], fmt, n)
    w = rows / jnp.where(scale == 0, 1, scale)  # W / s
    count = block_counts(rows.shape, fmt, stacked=1)
    sums = partial(reduce_blocks, fmt=fmt, how=jnp.sum, stacked=1)
    wide = lambda zero: spread(row_params(start._replace(zero_point=zero), fmt, m)[1], fmt, n)  # type: ignore[arg-type]
    codes = lambda zero: encode(rows, start._replace(zero_point=zero), fmt).astype(jnp.float32)  # W_q

    def losses(zero: jax.Array) -> jax.Array:
        # Of what will be stored. A zero block has no error whatever its zero point.
        return sums(jnp.where(scale == 0, 0, jnp.abs(w - (codes(zero) - wide(zero))) ** p))

    def step(s: _State) -> _State:
        w_q, z = codes(s.zero), wide(s.zero)
        w_e = shrink(w - (w_q - z), beta * kappa ** s.i.astype(jnp.float32), p)
        zero = store_zero(sums(w_q - (w - w_e)) / count, fmt)
        loss = losses(zero)
        better = loss < s.loss
        best, least = jnp.where(better, zero, s.best), jnp.where(better, loss, s.loss)
        return _State(s.i + 1, zero, best, least, jnp.any(better))

    assert start.zero_point is not None
    first = _State(jnp.int32(0), start.zero_point, start.zero_point, losses(start.zero_point), jnp.bool(True))
    last = lax.while_loop(lambda s: s.falling & (s.i < iters), step, first)
    return start._replace(zero_point=last.best)


def shrink(x: jax.Array, beta: jax.Array | float, p: float) -> jax.Array:
    """shrink_p: what minimizes phi(W_e) + beta / 2 (W_e - x)^2, nearly (Chartrand's generalized soft threshold)."""
    size = jnp.abs(x)
    power = jnp.where(size == 0, 1, size) ** (p - 1)
    return jnp.sign(x) * jnp.maximum(size - power / beta, 0)
