"""The part of attention that reads codes, for a few queries, by the kernel of `pallas_kernels.decode_attention`."""

import jax
import jax.numpy as jnp

from jquant.core.formats import Format
from jquant.kv_cache.coding import Store, lloyd_max
from jquant.kv_cache.format import CacheFormat, Coding
from jquant.kv_cache.softmax import Rules, Running
from jquant.ops import attention as ops


def why_not(fmt: CacheFormat, dim: int, rows: int, page_size: int = 0) -> str | None:
    """Why a GPU does not run the kernel over a cache of this format; None where it does.

    Args:
      fmt: of the cache.
      dim: head_dim.
      rows: queries of a kv head: query heads of it, times tokens.
      page_size: positions of a page, 0 without pages.
    """
    if not rows:
        return "there is no query"
    if fmt.tokens > 1 and page_size % fmt.tokens:
        return f"blocks of {fmt.tokens} tokens lie in several pages"
    return ops.why_not((layout(fmt.keys), layout(fmt.values)), dim, rows, page_size)


def layout(coding: Coding) -> ops.Layout:
    """What the codes of a `Coding` stand for."""
    if isinstance(coding.format, Format):
        return ops.layout(coding.format, coding.tokens)
    return ops.layout(None, codebook=() if coding.is_float else lloyd_max(coding.bits))


def codes_attention(
    q: jax.Array,
    keys: Store,
    values: Store,
    fmt: CacheFormat,
    rules: Rules,
    ranges: tuple[jax.Array, jax.Array],
    shift: jax.Array | None,
    table: jax.Array | None,
    *,
    page_size: int,
    ring: bool,
) -> Running:
    """`attention.codes_attention`, on an NVIDIA GPU."""
    (batch, kv_heads, groups, tokens, _), (end, written) = q.shape, ranges
    rows = lambda a: a.reshape(batch, kv_heads, groups * tokens, *a.shape[4:])
    call = ops.Call(
        q=rows(q), keys=ops.Coded(*keys), values=ops.Coded(*values), at=jnp.tile(rules.at, (1, groups)), end=end,
        written=written if ring else None, table=table,
        shift=None if shift is None else rows(shift),
    )  # fmt: skip
    how = ops.Rules(rules.scale, rules.window, rules.sink_tokens, rules.soft_cap, fmt.sinks, ring, page_size)
    state = ops.on_gpus(call, (layout(fmt.keys), layout(fmt.values)), how)
    top, total = (a.reshape(*q.shape[:-1], 1) for a in (state.top, state.total))
    return Running(top, total, state.out.reshape(q.shape))
