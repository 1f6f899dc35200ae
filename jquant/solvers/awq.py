"""AWQ's two searches (arXiv 2306.00978), as arrays: the scales of the input channels, and the clipping of the blocks.

The paper's letters: W `[m, n]` the weight, s `[n]` the scales, Q(.) rounding to nearest. H `[n, n]` is the Gram matrix
of the inputs, with which the squared error of the outputs is tr(E H E^T).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jquant.core.formats import (
    BlockParams,
    Format,
    block_extremes,
    block_params,
    compute_params,
    decode,
    encode,
    to_blocks,
)
from jquant.core.method import Rounding
from jquant.core.stats import Stats, checked_gram
from jquant.solvers.gptq import unit_hessian
from jquant.solvers.rtn import search_factors

_FULL = lax.Precision.HIGHEST
Stored = tuple[jax.Array, jax.Array | None]  # scales and zero points as a format stores them


@partial(jax.jit, static_argnums=3)
def scale_losses(w: jax.Array, h: jax.Array, scales: jax.Array, fmt: Format) -> jax.Array:
    """tr(E H E^T) with E = Q(W diag(s)) diag(1/s) - W, for each of the candidates `scales` `[k, n]`: `[k]`."""

    def loss(s: jax.Array) -> jax.Array:
        rows = w * s
        e = decode(encode(rows, compute_params(rows, fmt), fmt), compute_params(rows, fmt), fmt) / s - w
        return jnp.sum(jnp.dot(e, h, precision=_FULL) * e)

    return lax.map(loss, scales)


def candidates(x_mean: np.ndarray, w_mean: np.ndarray, grid: int) -> np.ndarray:
    """The scales to try, `[1 + 2 grid, channels]`: ones, x^a and x^a / w^(1 - a) for a = 0, 1/grid, ...

    The second family is that of the authors' later code ("duo scaling"). Each has a geometric mean of extremes of 1; a
    channel that is never active, or has no weights, keeps 1.

    Args:
      x_mean: mean |x| of each channel.
      w_mean: mean of |w| over the largest |w| of its block.
      grid: the paper's 20.
    """
    dead = (x_mean <= 0) | (w_mean <= 0)
    x, w = np.where(dead, 1, x_mean), np.where(dead, 1, w_mean)
    tried = [np.ones_like(x)]
    for a in np.arange(grid) / grid:
        for s in (x**a, x**a / (w ** (1 - a) + 1e-4)):
            s = np.maximum(s, 1e-4)
            live = s[~dead] if (~dead).any() else np.ones(1)
            tried.append(np.where(dead, 1, s / np.sqrt(live.max() * live.min())))
    return np.stack(tried)


def relative_size(rows: jax.Array, fmt: Format) -> jax.Array:
    """|w| over the largest of its block, summed over the rows: `[n]` of rows `[m, n]`."""
    blocked = jnp.abs(to_blocks(rows, fmt))
    top = jnp.max(blocked, axis=-1, keepdims=True)
    relative = blocked / jnp.where(top > 0, top, 1)
    return jnp.sum(relative.reshape(rows.shape[0], -1)[:, : rows.shape[1]], axis=0)


def clip_search(rows: jax.Array, gram: jax.Array, fmt: Format, factors: tuple[float, ...]) -> BlockParams:
    """Scales for the ranges of each block shrunk by one of `factors`, the one with the least output error.

    A block is judged by e H_bb e^T, as if the others were exact. A row whose whole error e H e^T that does not lower
    keeps its full ranges (factor 1), so that no row ends above round to nearest.

    Args:
      rows: float32 `[m, n]`.
      gram: H, float32 `[n, n]`.
      fmt: the format; its second level of scales stays that of the full ranges.
      factors: see above; of scales that are powers of two, one step up and down is tried instead.
    """
    low, high = block_extremes(rows, fmt)
    plain = compute_params(rows, fmt)
    own = _gram_blocks(gram, fmt)
    losses = lambda params: _sharing_scales(_block_losses(rows, params, own, fmt), fmt)

    def attempt(best: tuple[jax.Array, Stored], factor: jax.Array):
        params = block_params(low * factor, high * factor, fmt, plain.outer)
        new = losses(params), (params.scale, params.zero_point)
        better = new[0] < best[0]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

    start = losses(plain), (plain.scale, plain.zero_point)
    (_, found), _ = lax.scan(attempt, start, jnp.asarray(search_factors(fmt, factors), jnp.float32))
    chosen = BlockParams(found[0], found[1], plain.outer)
    new, old = (_sharing_scales(row_losses(rows, p, gram, fmt)[:, None], fmt) for p in (chosen, plain))
    kept = jax.tree.map(lambda a, b: jnp.where(new < old, a, b), found, start[1])
    return BlockParams(kept[0], kept[1], plain.outer)


def _error(rows: jax.Array, params: BlockParams, fmt: Format) -> jax.Array:
    return decode(encode(rows, params, fmt), params, fmt) - rows


def row_losses(rows: jax.Array, params: BlockParams, gram: jax.Array, fmt: Format) -> jax.Array:
    """e H e^T of each row rounded to nearest under `params`, `[m]`."""
    e = _error(rows, params, fmt)
    return jnp.sum(jnp.dot(e, gram, precision=_FULL) * e, axis=-1)


def _gram_blocks(gram: jax.Array, fmt: Format) -> jax.Array:
    """H_bb of every block, `[blocks, g, g]`, zeros behind a shorter last one."""
    if fmt.group_size is None:
        return gram[None]
    g, b = fmt.group_size, fmt.blocks(gram.shape[0])
    pad = g * b - gram.shape[0]
    at = jnp.arange(b)
    return jnp.pad(gram, [(0, pad), (0, pad)]).reshape(b, g, b, g)[at, :, at, :]


def _block_losses(rows: jax.Array, params: BlockParams, own: jax.Array, fmt: Format) -> jax.Array:
    """e H_bb e^T of every block of every row, `[m, blocks]`."""
    e = to_blocks(_error(rows, params, fmt), fmt)
    return jnp.sum(jnp.einsum("mbg,bgh->mbh", e, own, precision=_FULL) * e, axis=-1)


def _sharing_scales(losses: jax.Array, fmt: Format) -> jax.Array:
    """Losses `[m, blocks]` summed over the rows that share their scales: `[M, blocks]`."""
    if fmt.block == "tensor":
        return jnp.sum(losses, keepdims=True)
    m, tile = len(losses), fmt.tile_rows
    return jnp.pad(losses, [(0, -m % tile), (0, 0)]).reshape(-1, tile, losses.shape[1]).sum(1)


def clip_solver(factors: tuple[float, ...]):
    """The solver that chooses scales by `clip_search`, and rounds to nearest; scales chosen before are kept."""

    def solve(state: Rounding, stats: Stats | None, fmt: Format) -> Rounding:
        gram = checked_gram("awq", state.rows, stats).astype(jnp.float32)
        rows = state.rows.astype(jnp.float32)
        params = state.params
        if params is None:
            # A mean diagonal of one: sums over many tokens would come close to the end of float32.
            params = lax.map(lambda xs: clip_search(xs[0], unit_hessian(xs[1])[0], fmt, factors), (rows, gram))
        codes = jax.vmap(lambda r, p: encode(r, p, fmt))(rows, params)
        return state._replace(params=params, codes=codes)

    return solve
