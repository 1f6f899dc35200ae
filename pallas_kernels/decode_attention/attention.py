"""`decode_attention`: the kernel and what goes before and after it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat
from pallas_kernels.decode_attention import reading, triton
from pallas_kernels.decode_attention.layout import Coded, Layout, Rules, State
from pallas_kernels.decode_attention.tilings import Problem, Tiling, choose
from pallas_kernels.gpus import gpu


def why_not(
    layouts: tuple[Layout, Layout], dim: int, rows: int = 1, page_size: int = 0
) -> str | None:
    """Why no kernel can do it; None where one can.

    Args:
      layouts: of keys and values.
      dim: head_dim.
      rows: queries of a kv head.
      page_size: slots of a page, 0 without pages.
    """
    for name, layout in zip(("keys", "values"), layouts):
        reason = reading.why_not(layout, dim, rows, page_size, name == "keys")
        if reason is not None:
            return f"{name}: {reason}"
    return None


def decode_attention(
    q: jax.Array,
    keys: Coded,
    values: Coded,
    at: jax.Array,
    end: jax.Array,
    *,
    layouts: tuple[Layout, Layout],
    rules: Rules,
    written: jax.Array | None = None,
    shift: jax.Array | None = None,
    table: jax.Array | None = None,
    device: str | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> State:
    """Attention of a few queries over the codes of a cache, as a softmax under way.

    `(q . key + shift) * scale`, capped, is the score of a position that the query sees.

    Args:
      q: `[B, K, R, D]`, R queries of each kv head (query heads times tokens).
      keys, values: the cache; rows are the B sequences, or with a table the pages of a pool.
      at: int32 `[B, R]`, the positions of the queries.
      end: int32 `[B]`: positions from it on are not read.
      layouts: what the codes of keys and values stand for.
      rules: which positions are seen, and how scores are made.
      written: int32 `[B]`, of a ring: how many positions have been written.
      shift: float32 `[B, K, R]`, or None.
      table: int32 `[B, pages]`, the pages of each sequence, negative for none (such must lie behind `end`).
      device: the GPU that tilings are chosen for; by default as `compat.device_of` says.
      tiling: to choose it oneself.
      interpret: run in Pallas' interpreter: on any machine, slowly.

    Returns:
      The `State`; `normalized` makes attention of it.

    Raises:
      ValueError: `why_not` has a reason, or blocks do not fit the layout.
    """
    dim, rows, device = q.shape[-1], q.shape[2], compat.device_of(device)
    reason = why_not(layouts, dim, rows, rules.page_size)
    if reason is not None:
        raise ValueError(f"decode_attention: no kernel: {reason}; use reference.decode_attention")
    slots = keys.codes[0].shape[2] if table is None else table.shape[1] * rules.page_size
    largest = reading.largest_block(rules.page_size)
    t = tiling or choose(problem(q.shape, keys, values, layouts, slots, largest), device, gpu(device))
    if t.block < 16 or t.block & (t.block - 1) or t.block > largest:
        raise ValueError(f"decode_attention: block {t.block} must be a power of two from 16 to {largest}")
    views = reading.view_of(keys, layouts[0], dim), reading.view_of(values, layouts[1], dim, max(16, 8 * t.warps))
    ranges = _ranges(at, end, end if written is None else written, slots, rules)
    factor = _factor(keys, views[0].unit, rules.scale)
    parts = triton.partial_states(
        q.astype(jnp.float32) * factor, keys, values, at.astype(jnp.int32), ranges, views=views, rules=rules, t=t,
        shift=None if shift is None else shift.astype(jnp.float32) * np.float32(rules.scale), table=table,
        device=device, interpret=interpret,
    )  # fmt: skip
    state = triton.combine(parts)
    return state._replace(out=state.out * _factor(values, views[1].unit, 1.0))


def normalized(state: State) -> jax.Array:
    """Attention `[B, K, R, D]`: zeros for a query that sees nothing."""
    return state.out / jnp.where(state.total == 0, 1, state.total)[..., None]


def _factor(coded: Coded, unit: float, scale: float) -> jax.Array:
    """What is the same for all codes of a head, `[K, 1, 1]` or a number."""
    known = jnp.float32(unit * scale)
    return known if coded.static is None else (coded.static * known)[:, None, None]


def _ranges(at: jax.Array, end: jax.Array, written: jax.Array, slots: int, rules: Rules) -> jax.Array:
    """int32 `[B, 4]`: see `triton.partial_states`. Blocks that no query sees are left out."""
    end = jnp.minimum(end, jnp.max(at, axis=1) + 1)
    if rules.ring:
        low, high = jnp.zeros_like(end), jnp.minimum(written, slots)
    else:
        low, high = jnp.full_like(end, rules.first), end
        if rules.window is not None and rules.sink_tokens <= rules.first:
            low = jnp.maximum(low, jnp.min(at, axis=1) - rules.window + 1)
    return jnp.stack([low, high, end, written], axis=1).astype(jnp.int32)


def problem(
    q: tuple[int, ...], keys: Coded, values: Coded, layouts: tuple[Layout, Layout], slots: int, largest: int
) -> Problem:
    """What a tiling is chosen for: `q` is the queries' shape."""
    batch, kv_heads, rows, dim = q
    arrays = [a for c in (keys, values) for a in (*c.codes, c.scale, c.zero_point) if a is not None]
    per_token = sum(a.dtype.itemsize * a.size / (keys.codes[0].size // keys.codes[0].shape[-1]) for a in arrays)
    doubled = any(c.codes[0].dtype in (jnp.float32, jnp.float16) for c in (keys, values))
    views = [reading.view_of(c, layout, dim) for c, layout in zip((keys, values), layouts)]
    style = "/".join(v.scales + (str(v.chunks) if v.scales == "group" else "") for v in views)
    return Problem(batch, kv_heads, rows, slots, dim, per_token, largest, doubled, style)
