"""What the tests of the cache share: formats, random tokens, and attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jquant import kv_cache

FORMATS = [
    "float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3-tensor", "int4-g64-asym", "int4-g32-asym-search",
    "int4-g64-asym-rot", "int4-g16-asym-ze3m4-e4m3-search-rot",
    "int3-g32-asym", "nvfp4", "nvfp4-4o6", "mxfp4", "lloyd4-rot", "lloyd2-rot2",
    "keys=int4-t8-asym,values=int4-g32-asym", "keys=int2-t16-asym,values=lloyd3-rot,residual=24",
    "keys=int8,values=float32,sinks=3", "keys=int4-t8-asym-search,values=nvfp4,sinks=5,residual=7",
]  # fmt: skip
# The relative error (root mean square) of attention over normal tokens is no larger than this for these bits.
ERRORS = {16: 0.01, 8: 0.05, 4: 0.2, 3: 0.4, 2: 0.7}
COARSER = {"fp8_e5m2": 0.1, "mxfp4": 0.25}  # one bit less of mantissa; scales that are powers of two


def tokens(batch: int, length: int, kv_heads: int = 2, dim: int = 64, groups: int = 2, seed: int = 0):
    """Queries, keys and values, float32 `[batch, length, heads, dim]`, normal numbers."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.float32)
    return draw(kv_heads * groups), draw(kv_heads), draw(kv_heads)


def reference(q, k, v, *, first=0, window=None, sink_tokens=0, soft_cap=None, scale=None, sink_logits=None):
    """Attention of one sequence in float64: q `[L, H, D]`, the first at position `first`; k and v `[T, K, D]`."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat(groups, axis=1), v.repeat(groups, axis=1)
    scores = np.einsum("lhd,thd->hlt", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    at, keys = first + np.arange(len(q))[:, None], np.arange(len(k))
    sees = keys <= at
    if window is not None:
        sees &= (keys > at - window) | (keys < sink_tokens)
    top = np.where(sees, scores, 0).max(-1, keepdims=True, initial=0)
    weights = np.where(sees, np.exp(np.where(sees, scores, 0) - top), 0)
    total = weights.sum(-1, keepdims=True)
    if sink_logits is not None:
        total = total + np.exp(np.asarray(sink_logits, np.float64)[:, None, None] - top)
    return np.einsum("hlt,thd->lhd", weights / np.where(total == 0, 1, total), v)


def relative(got, want):
    return np.sqrt(np.mean((np.asarray(got) - want) ** 2) / np.mean(want**2))


def same_bits(a, b):
    """Asserts that two trees hold the same arrays, bit for bit."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


append = jax.jit(kv_cache.append)
attend = jax.jit(kv_cache.attend, static_argnames=("window", "sink_tokens", "soft_cap", "scale"))
