"""A softmax that takes its entries part by part (Milakov & Gimelshein 2018; flash attention, arXiv 2205.14135)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rules(NamedTuple):
    """Which positions a query sees, and how scores are made: what all parts of a cache share.

    Attributes:
      at: int32 `[B, L]`, positions of the queries.
      window: a query sees itself and the `window - 1` positions before it; None, all before it.
      sink_tokens: so many first positions are seen from everywhere.
      scale: what products are multiplied with.
      soft_cap: scores are `cap * tanh(score / cap)`; None leaves them.
    """

    at: jax.Array
    window: int | None
    sink_tokens: int
    scale: float
    soft_cap: float | None


class Running(NamedTuple):
    """A softmax under way, float32: the largest score, the sum of exp(score - largest), the values weighted by those.

    `[B, K, G, L, 1]`, `[B, K, G, L, 1]`, `[B, K, G, L, D]`.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


def take_in(
    state: Running,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: jax.Array,
    rules: Rules,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    shift: jax.Array | float = 0.0,
) -> Running:
    """The softmax with some more keys and values `[B, K, n, D]`, at positions `at` `[B, n]` (-1: nothing there)."""
    scores = jnp.einsum("bkgld,bknd->bkgln", q, k)
    if k_scale is not None:
        scores = scores * k_scale[:, :, None, None, :]
    scores = (scores + shift) * rules.scale
    if rules.soft_cap is not None:
        scores = rules.soft_cap * jnp.tanh(scores / rules.soft_cap)
    scores = jnp.where(sees(at, rules)[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0, top)  # where nothing has been seen yet
    weights, kept = jnp.exp(scores - base), jnp.exp(state.top - base)
    total = state.total * kept + jnp.sum(weights, axis=-1, keepdims=True)
    if v_scale is not None:
        weights = weights * v_scale[:, :, None, None, :]
    return Running(top, total, state.out * kept + jnp.einsum("bkgln,bknd->bkgld", weights, v))


def sees(at: jax.Array, rules: Rules) -> jax.Array:
    """bool `[B, L, n]`: whether a query sees a position."""
    keys, queries = at[:, None, :], rules.at[:, :, None]
    sees = (keys >= 0) & (keys <= queries)
    if rules.window is None:
        return sees
    return sees & ((keys > queries - rules.window) | (keys < rules.sink_tokens))


def take_logits(state: Running, logits: jax.Array) -> Running:
    """The softmax with one more entry, which has no value."""
    top = jnp.maximum(state.top, logits)
    kept = jnp.exp(state.top - top)
    return Running(top, state.total * kept + jnp.exp(logits - top), state.out * kept)
