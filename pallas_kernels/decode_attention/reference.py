"""The definition of right: plain jnp, float32, the whole cache decoded."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.layout import Coded, Layout, Rules, State
from pallas_kernels.quantized_matmul.elements import values as values_of
from pallas_kernels.quantized_matmul.reference import unpack


def decode(coded: Coded, layout: Layout, dim: int) -> jax.Array:
    """float32 `[B, K, T, dim]`."""
    if layout.element is None:
        return coded.codes[0].astype(jnp.float32)
    codes = unpack(coded.codes, layout.element.bits, dim)
    out = jnp.asarray(values_of(layout.element, coded.zero_point is None))[codes]
    if coded.zero_point is not None:
        out = out - _spread(coded.zero_point, layout, out.shape)
    if coded.scale is not None:
        out = out * _spread(coded.scale, layout, out.shape)
    return out if coded.static is None else out * coded.static[:, None, None]


def _spread(a: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """A number for every element."""
    a = a.astype(jnp.float32)
    if layout.tokens > 1:
        return jnp.repeat(a, layout.tokens, axis=-2)
    return jnp.repeat(a, layout.group or shape[-1], axis=-1)[..., : shape[-1]]


def rows_of_pages(coded: Coded, table: jax.Array) -> Coded:
    """The pages of each sequence one behind the other; those it does not have hold anything."""

    def gather(a: jax.Array | None) -> jax.Array | None:
        if a is None:
            return None
        found = a[jnp.maximum(table, 0)].swapaxes(1, 2)  # [B, K, pages, slots, x]
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    codes = tuple(gather(c) for c in coded.codes)
    return Coded(codes, gather(coded.scale), gather(coded.zero_point), coded.static)  # type: ignore[arg-type]


def positions(rules: Rules, slots: int, end: jax.Array, written: jax.Array) -> jax.Array:
    """int32 `[B, T]`: the position that each slot holds, -1 where it holds none that is to be read."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    at = jnp.broadcast_to(slot, (end.shape[0], slots))
    if rules.ring:
        last = written[:, None] - 1
        at = last - (last - slot) % slots
    return jnp.where((at >= rules.first) & (at < end[:, None]), at, -1)


def sees(at: jax.Array, queries: jax.Array, rules: Rules) -> jax.Array:
    """bool `[B, R, T]`: whether queries at `queries` `[B, R]` see the positions `at` `[B, T]`."""
    keys, queries = at[:, None, :], queries[:, :, None]
    seen = (keys >= 0) & (keys <= queries)
    if rules.window is None:
        return seen
    return seen & ((keys > queries - rules.window) | (keys < rules.sink_tokens))


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
) -> State:
    """See `attention.decode_attention`."""
    dim = q.shape[-1]
    if table is not None:
        keys, values = rows_of_pages(keys, table), rows_of_pages(values, table)
    k, v = decode(keys, layouts[0], dim), decode(values, layouts[1], dim)
    where = positions(rules, k.shape[2], end, end if written is None else written)
    seen = sees(where, at, rules)[:, None]
    scores = jnp.einsum("bkrd,bktd->bkrt", q, jnp.where((where >= 0)[:, None, :, None], k, 0), precision="highest")
    scores = (scores if shift is None else scores + shift[..., None]) * rules.scale
    if rules.soft_cap is not None:
        scores = rules.soft_cap * jnp.tanh(scores / rules.soft_cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top)[..., None])
    v = jnp.where((where >= 0)[:, None, :, None], v, 0)
    return State(top, jnp.sum(weights, axis=-1), jnp.einsum("bkrt,bktd->bkrd", weights, v, precision="highest"))
