"""GPTQ in float64 numpy, twice: as its authors' code does it (inverse, Cholesky factor of the inverse, correction of
the columns to the right), and as LDLQ does (linear feedback from the factor of H). Literal, slow, one matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.formats import BlockParams, Format, block_params, code_table
from jquant.core.method import Rounding
from jquant.core.stats import Stats
from jquant.solvers.gptq import gptq


@functools.cache
def _values(fmt: Format) -> np.ndarray:
    table = code_table(fmt).astype(np.float64)
    return np.unique(table[np.isfinite(table)])


def params_of(w: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point (0 if symmetric) of each row taken as one block, float64 `[m, 1]`."""
    low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)
    if fmt.element == "ternary":  # BitNet's scale is a mean
        high = np.abs(w).mean(1, keepdims=True)
        low = -high
    if fmt.block == "tensor":
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    p = block_params(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32), fmt)
    zero = np.zeros_like(low) if p.zero_point is None else np.asarray(p.zero_point, np.float64)
    return np.asarray(p.scale.astype(jnp.float32), np.float64), zero


def nearest(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format) -> np.ndarray:
    """The nearest number of the grid to each of x `[m, 1]`."""
    grid = (_values(fmt) - zero) * scale
    return np.take_along_axis(grid, np.abs(x - grid).argmin(1)[:, None], 1)


def damped(h: np.ndarray, damp: float) -> np.ndarray:
    diagonal = np.diag(h)
    return h + np.diag(np.where(diagonal == 0, 1, 0)) + damp * diagonal.mean() * np.eye(len(h))


def group_of(fmt: Format, n: int) -> int:
    return fmt.group_size or n


def literal_gptq(w, h, fmt: Format, damp: float = 0.01, block_size: int = 128, act_order: bool = False) -> np.ndarray:
    """Q, float64 `[m, n]`: the algorithm of the paper, with its lazy batches of B columns."""
    w, n, g = np.array(w, np.float64), w.shape[1], group_of(fmt, w.shape[1])
    static = [params_of(w[:, i : i + g], fmt) for i in range(0, n, g)]
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    w, h = w[:, order], damped(np.asarray(h, np.float64)[np.ix_(order, order)], damp)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for i1 in range(0, n, block_size):
        i2 = min(i1 + block_size, n)
        err = np.zeros((len(w), i2 - i1))
        for k in range(i1, i2):
            if k % g == 0 and not act_order:
                # The group reaches beyond the block: bring the lazy columns up to date before looking at them.
                fresh = w[:, k : k + g] - err @ np.where(np.arange(n) >= i2, u[i1:i2], 0)[:, k : k + g]
                params = params_of(fresh, fmt)
            if act_order:
                params = static[order[k] // g]
            q[:, k : k + 1] = nearest(w[:, k : k + 1], *params, fmt)
            err[:, k - i1] = (w[:, k] - q[:, k]) / u[k, k]
            w[:, k:i2] -= np.outer(err[:, k - i1], u[k, k:i2])
        w[:, i2:] -= err @ u[i1:i2, i2:]
    return q[:, np.argsort(order)]


def literal_ldlq(w, h, fmt: Format, damp: float = 0.01) -> np.ndarray:
    """Q by linear feedback, scales from the rows as whole blocks (channel and tensor formats)."""
    w = np.array(w, np.float64)
    root = np.linalg.cholesky(damped(np.asarray(h, np.float64), damp)[::-1, ::-1])[::-1, ::-1]
    u = root / np.diag(root)
    scale, zero = params_of(w, fmt)
    q = np.zeros_like(w)
    for k in range(w.shape[1]):
        target = w[:, k] + (w - q)[:, :k] @ u[:k, k]
        q[:, k : k + 1] = nearest(target[:, None], scale, zero, fmt)
    return q


@functools.cache
def _compiled(fmt: Format, settings: tuple, x64: bool):
    method = gptq(**dict(settings))
    solve = lambda rows, gram, params: method.solve(Rounding(rows, params), stats_of(gram), fmt)
    # Most of a test's time is compilation. In float64 only the mathematics is tested, and unoptimized code will do.
    return jax.jit(solve, compiler_options={"xla_backend_optimization_level": 0} if x64 else None)


def stats_of(gram: jax.Array) -> Stats:
    empty = jnp.zeros(gram.shape[:-1], jnp.float32)
    return Stats(gram, empty, empty, empty[..., 0])


def run(w, h, fmt: Format, params: BlockParams | None = None, **settings) -> Rounding:
    """Our GPTQ on one matrix (or a batch, if w has three axes), in float32; float64 under `jax.enable_x64`."""
    x64 = bool(jax.config.jax_enable_x64)
    rows = w if isinstance(w, jax.Array) else jnp.asarray(w, jnp.float64 if x64 else jnp.float32)
    gram = jnp.asarray(h, jnp.float64 if x64 else jnp.float32)
    batched = rows.ndim == 3
    args = (rows, gram, params) if batched else jax.tree.map(lambda a: a[None], (rows, gram, params))
    out = _compiled(fmt, tuple(sorted(settings.items())), x64)(*args)
    return out if batched else jax.tree.map(lambda a: a[0], out)
