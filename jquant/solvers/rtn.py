"""Round to nearest, optionally with the scale of every block chosen by the mean squared error.

Weighted by the mean square of the inputs that is what llama.cpp does with its importance matrix.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jquant.core.formats import (
    FOUR_OVER_SIX,
    BlockParams,
    Format,
    block_error,
    block_extremes,
    block_params,
    encode,
)
from jquant.core.method import Method, Rounding
from jquant.core.scales import Outer
from jquant.core.stats import Stats, checked_gram


def rtn(search: bool = False, *, grid: int = 100, max_shrink: float = 0.6, weighted: bool = False) -> Method:
    """Rounds every weight to the nearest code. Needs no data unless `weighted`.

    Args:
      search: try, for each block, scales shrunk by the factors 1, 1 - 1/grid, ... down to 1 - max_shrink, and keep the
        one with the least squared error; the first of several equal ones. The factor 1 is plain round to nearest, so
        the error is never larger. The names are those of the search in GPTQ's code (github.com/IST-DASLab/gptq).
        Scales that are powers of two are tried one step down and up; ternary ones twice as large too; four over six
        from both of its ranges.
      grid: the factors are `1 / grid` apart.
      max_shrink: how far to shrink, in [0, 1).
      weighted: weight the squared error of a channel by the mean square of its input, the diagonal of the Gram matrix.

    Scales that an earlier method of a chain has chosen are used as they are, without a search.

    Raises:
      ValueError: `grid` or `max_shrink` is out of range; or, when solving, `weighted` without a Gram matrix.
    """
    if grid < 1 or not 0 <= max_shrink < 1:
        raise ValueError(f"rtn: needs grid >= 1 and 0 <= max_shrink < 1, got grid={grid}, max_shrink={max_shrink}")
    factors = shrink_factors(grid, max_shrink) if search or weighted else (1.0,)

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        rows = state.rows.astype(jnp.float32)
        params = state.params
        if params is None:
            params = search_params(rows, fmt, factors, _mean_square(rows, stats) if weighted else None, stacked=1)
        return state._replace(params=params, codes=encode(rows, params, fmt))

    name = f"rtn({'weighted=True' if weighted else 'search=True' if search else ''})"
    return Method(name, solve, frozenset({"gram"}) if weighted else frozenset())


def shrink_factors(grid: int = 100, max_shrink: float = 0.6) -> tuple[float, ...]:
    """1, 1 - 1/grid, ..., 1 - max_shrink."""
    return tuple(1 - i / grid for i in range(int(round(max_shrink * grid)) + 1))


def search_factors(fmt: Format, factors: tuple[float, ...]) -> tuple[float, ...]:
    """The factors that a search with `factors` tries for a format, its own choice (1) first.

    A single factor is no search: it stays alone, except that "four over six" always has two.
    """
    if fmt.scale_dtype == "float8_e8m0fnu" and len(factors) > 1:
        factors = (1.0, 2.0, 0.5)
    if fmt.element == "ternary" and len(factors) > 1:
        factors = (*factors, *(2 * f for f in factors))
    if fmt.four_over_six:
        factors = (*factors, *(FOUR_OVER_SIX * f for f in factors))
    return factors


def search_params(
    rows: jax.Array,
    fmt: Format,
    factors: tuple[float, ...] = (1.0,),
    weight: jax.Array | None = None,
    stacked: int = 0,
    outer: Outer | None = None,
    shifts: tuple[float, ...] = (0.0,),
) -> BlockParams:
    """Scales and zero points that make the squared error of each block least, of the ranges shrunk by `factors`.

    Args:
      rows: float32 `[..., n]`.
      fmt: the format.
      factors: tried in this order; of equal ones the first wins. `search_factors` adapts them to the format.
      weight: weights of the squared errors, float32, broadcasting against `rows`; None for ones.
      stacked: for what a whole tensor shares, how many leading axes hold separate tensors.
      outer: the second level of scales; None to choose round to nearest's. It is the same for all factors.
      shifts: the first is 0; each factor f is tried with all of them: lower ends times f + shift, upper ends times
        f - shift. They move a zero point by parts of a code, where it may lie between codes.
    """
    factors = search_factors(fmt, factors)
    low, high = block_extremes(rows, fmt, stacked)
    first = block_params(low * factors[0], high * factors[0], fmt, outer, stacked)
    ends = [(f + s, f - s) for f in factors for s in shifts]
    if len(ends) == 1:
        return first
    error = partial(block_error, rows, fmt=fmt, unit=first, weight=weight, stacked=stacked)

    def attempt(best, factor):
        params = block_params(low * factor[0], high * factor[1], fmt, first.outer)
        new = error(params), (params.scale, params.zero_point)
        better = new[0] < best[0]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

    start = error(first), (first.scale, first.zero_point)
    (_, chosen), _ = lax.scan(attempt, start, jnp.asarray(ends[1:], rows.dtype))
    return BlockParams(*chosen, first.outer)


def _mean_square(rows: jax.Array, stats: Stats | None) -> jax.Array:
    """Mean square of every input channel relative to the largest, `[batch, 1, n]`; ones where no token was seen."""
    gram = checked_gram("rtn(weighted=True)", rows, stats)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)[:, None].astype(jnp.float32)
    top = jnp.max(diagonal, axis=-1, keepdims=True)
    return jnp.where(top > 0, diagonal / jnp.where(top > 0, top, 1), 1)
