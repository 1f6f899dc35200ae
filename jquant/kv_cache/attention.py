"""Attention over a `KVCache`: softmax(q k / sqrt(D)) v, block by block of the cache, never the whole of it decoded.

Shapes: B batch, L queries, K key/value heads, G query heads for each of them, D head_dim, n positions of a block.

The parts of the cache (codes, sinks in float, window in float) are taken one after the other into one running softmax
(`softmax`). `codes_attention` is the part that reads codes. It takes the raw arrays and gives that running state; for a
few queries on a GPU a kernel stands in its place.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.errors import CacheError
from jquant.kv_cache import kernel, paging
from jquant.kv_cache.cache import Floats, KVCache, read_ranges
from jquant.kv_cache.coding import Store, decode_vectors
from jquant.kv_cache.format import CacheFormat
from jquant.kv_cache.rotation import rotate, unrotate
from jquant.kv_cache.softmax import Rules, Running, take_in, take_logits
from jquant.ops.choice import PROVEN, How, words

# Positions decoded at once. On two cores 256 x 64 floats of a head stay in the first two levels of the CPU's caches:
# over int8 codes the products then take the time of products over floats; decoded whole, twice as much.
_BLOCK = 256


def attend(
    q: jax.Array,
    cache: KVCache,
    *,
    positions: jax.Array | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
    sink_logits: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention of `q` over what the cache holds. `explain` says what a GPU makes of it.

    Args:
      q: `[batch, tokens, heads, head_dim]`, heads a multiple of kv_heads: query head h reads key head h // G.
      cache: with the queries' own keys and values already appended.
      positions: int32 `[batch, tokens]`, where the queries stand; by default they are the last tokens of each sequence.
        After an append with `counts`, give `length before it + arange(tokens)`: what stands behind the counted tokens
        gets some finite result.
      window: sliding window: a query sees itself and the `window - 1` tokens before it.
      sink_tokens: the first tokens of a sequence that are seen in spite of the window (StreamingLLM, arXiv 2309.17453).
        A ring must keep them in float (`CacheFormat.sinks`).
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)` (Gemma 2).
      scale: of the products; 1 / sqrt(head_dim) by default.
      sink_logits: `[heads]`, a learned logit beside the scores that takes its share of the softmax (gpt-oss).

    Returns:
      `[batch, tokens, heads, head_dim]` in the dtype of `q`. Zeros for a query that sees nothing, NaN for a sequence
      that did not fit into the cache.

    Raises:
      CacheError: shapes that do not fit, or a ring that is too short for the window.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = cache.keys.codes[0].shape[1]
    _check(q, cache, kv_heads, window, sink_tokens)
    _check_rules(q.shape, positions, sink_logits, soft_cap)
    if positions is None:
        positions = cache.length[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)
    rules = Rules(positions, window, sink_tokens, dim**-0.5 if scale is None else scale, soft_cap)
    q5 = q.astype(jnp.float32).reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    state = _over_codes(q5, cache, rules)
    for part, at in _float_parts(cache):
        keys, values = (a.astype(jnp.float32) for a in part)
        state = take_in(state, q5, keys, values, at, rules)
    if sink_logits is not None:
        state = take_logits(state, sink_logits.astype(jnp.float32).reshape(kv_heads, -1, 1, 1))
    out = state.out / jnp.where(state.total == 0, 1, state.total)
    out = jnp.where(cache.overflow[:, None, None, None, None], jnp.nan, out)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def explain(cache: KVCache, heads: int, tokens: int = 1) -> How:
    """How `attend` reads the codes of a cache; runs nothing.

    Args:
      cache: a cache, or its shapes: `jax.eval_shape(lambda: init(...))`.
      heads: of the queries, a multiple of the cache's.
      tokens: queries of a sequence at once: 1 when one token is decoded after the other.

    Returns:
      A `How`: `text`, for people; `kernel`, the one in a program lowered for an NVIDIA GPU, or ""; `reason`, why none.

    Raises:
      CacheError: heads that do not fit the cache, or no token.
    """
    kv_heads = cache.keys.codes[0].shape[1]
    if min(heads, tokens) < 1 or heads % kv_heads:
        raise CacheError(f"explain: {heads=} must be a multiple of {kv_heads}, and {tokens=} at least 1")
    reason = _why_no_kernel(cache, heads // kv_heads * tokens) or ""
    chosen = "xla" if reason else "attention"
    text = f"{cache.format}: {words(chosen, reason)}; elsewhere decoded block by block"
    return How(text, PROVEN.get(chosen, ""), reason)


def _why_no_kernel(cache: KVCache, rows: int) -> str | None:
    """Why a GPU does not run the kernel for so many queries of a key head; None where it does."""
    return kernel.why_not(cache.format, cache.head_dim, rows, cache.page_size)


def _check(q: jax.Array, cache: KVCache, kv_heads: int, window: int | None, sink_tokens: int) -> None:
    batch, tokens, heads, dim = q.shape
    if batch != cache.length.shape[0] or dim != cache.head_dim or heads % kv_heads:
        raise CacheError(
            f"attend: queries {q.shape} must be [batch {cache.length.shape[0]}, tokens, a multiple of {kv_heads} "
            f"heads, head_dim {cache.head_dim}]"
        )
    if window is not None and window < 1:
        raise CacheError(f"attend: window {window} must be at least 1, or None")
    if cache.ring and window is not None and cache.capacity < window + tokens - 1:
        raise CacheError(
            f"attend: a ring of {cache.capacity} positions has lost what the first of {tokens} queries sees through a "
            f"window of {window}; give init length >= {window + tokens - 1}, or append fewer tokens at once"
        )
    if cache.ring and sink_tokens > cache.format.sinks:
        raise CacheError(
            f"attend: a ring overwrites the first {sink_tokens} tokens; keep them in float: sinks={sink_tokens} in the "
            "format"
        )


def _check_rules(
    shape: tuple[int, ...], positions: jax.Array | None, sink_logits: jax.Array | None, soft_cap: float | None
) -> None:
    batch, tokens, heads, _ = shape
    for name, given, want in (("positions", positions, (batch, tokens)), ("sink_logits", sink_logits, (heads,))):
        if given is not None and given.shape != want:
            raise CacheError(f"attend: {name} {given.shape} must be of shape {want}")
    if soft_cap is not None and soft_cap <= 0:
        raise CacheError(f"attend: soft_cap {soft_cap} must be positive, or None")


def _over_codes(q: jax.Array, cache: KVCache, rules: Rules) -> Running:
    """`codes_attention`, with queries turned as keys were: the kernel where a program is lowered for an NVIDIA GPU, and
    has one for this cache."""
    fmt, gain = cache.format, cache.gain
    turned = rotate(q if gain is None else q * gain[:, None, None], fmt.keys.rotations, fmt.seed)
    shift = None if cache.center is None else jnp.einsum("bkgld,kd->bkgl", q, cache.center)
    state = _choose(turned, shift, cache, rules)
    return state._replace(out=unrotate(state.out, fmt.values.rotations, fmt.seed))


def _choose(q: jax.Array, shift: jax.Array | None, cache: KVCache, rules: Rules) -> Running:
    arrays = (q, cache.keys, cache.values, rules.at, read_ranges(cache), shift, cache.table)
    how: dict[str, Any] = dict(page_size=cache.page_size, ring=cache.ring)

    def plain(q, keys, values, at, ranges, shift, table):  # type: ignore[no-untyped-def]
        rule = rules._replace(at=at)
        return codes_attention(q, keys, values, cache.format, rule, ranges, shift, table, cache.capacity, **how)

    if _why_no_kernel(cache, q.shape[2] * q.shape[3]) is not None:
        return plain(*arrays)

    @jax.custom_jvp
    def fast(q, keys, values, at, ranges, shift, table):  # type: ignore[no-untyped-def]
        rule = rules._replace(at=at)
        return kernel.codes_attention(q, keys, values, cache.format, rule, ranges, shift, table, **how)

    fast.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return jax.lax.platform_dependent(*arrays, cuda=fast, default=plain)


def codes_attention(
    q: jax.Array,
    keys: Store,
    values: Store,
    fmt: CacheFormat,
    rules: Rules,
    ranges: tuple[jax.Array, jax.Array],
    shift: jax.Array | None,
    table: jax.Array | None,
    capacity: int,
    *,
    page_size: int,
    ring: bool,
) -> Running:
    """The part of attention that reads codes: float32 `q` `[B, K, G, L, D]` over raw arrays of codes and scales.

    Queries are turned as the keys were, and the values that come out are turned as they are stored. `shift`
    `[B, K, G, L]` is added to the products, for the keys' center. `ranges` are those of `cache.read_ranges`, the other
    arguments those of `KVCache`.
    """
    dim = q.shape[-1]
    end, written = ranges
    moved = 0.0 if shift is None else shift[..., None]
    step = page_size or fmt.tokens
    size = min(capacity, max(step, _BLOCK // step * step))

    def block(i: jax.Array, state: Running) -> Running:
        start = jnp.minimum(i * size, capacity - size)  # the last block may overlap the one before it
        slots = start + jnp.arange(size, dtype=jnp.int32)
        at = slots[None] if not ring else written[:, None] - 1 - (written[:, None] - 1 - slots) % capacity
        seen = (at >= fmt.sinks) & (at < end[:, None]) & (slots >= i * size)
        read = lambda store, coding: decode_vectors(_slice(store, table, start, size), coding, dim)
        (k, k_scale), (v, v_scale) = read(keys, fmt.keys), read(values, fmt.values)
        return take_in(state, q, k, v, jnp.where(seen, at, -1), rules, k_scale, v_scale, moved)

    empty = jnp.zeros(q.shape[:-1] + (1,), jnp.float32)
    state = Running(empty - jnp.inf, empty, jnp.zeros(q.shape, jnp.float32))
    last = jnp.max(jnp.minimum(written, capacity))
    first = jnp.zeros((), jnp.int32)
    if rules.window is not None and not ring and rules.sink_tokens <= fmt.sinks:
        first = jnp.maximum(jnp.min(rules.at) - rules.window + 1, 0) // size
    return jax.lax.fori_loop(first, (last + size - 1) // size, block, state)


def _slice(store: Store, table: jax.Array | None, start: jax.Array, size: int) -> Store:
    codes = tuple(paging.read(c, table, start, size) for c in store.codes)
    total = store.codes[0].shape[2]

    def small(a: jax.Array | None) -> jax.Array | None:  # scales: one for a token, or for a block of tokens
        if a is None:
            return None
        per = total // a.shape[2]
        return paging.read(a, table, start // per, size // per)

    return Store(codes, small(store.scale), small(store.zero_point), store.static)


def _float_parts(cache: KVCache) -> list[tuple[Floats, jax.Array]]:
    """Sinks and window, and the positions `[B, slots]` of what they hold; -1 for what is not read from there."""
    parts = []
    if cache.sinks is not None:
        at = jnp.arange(cache.format.sinks, dtype=jnp.int32)
        parts.append((cache.sinks, jnp.where(at < cache.length[:, None], at, -1)))
    if cache.window is not None:
        size, last = cache.window.keys.shape[2], cache.length[:, None] - 1
        at = last - (last - jnp.arange(size, dtype=jnp.int32)) % size
        first = jnp.maximum(read_ranges(cache)[0], cache.format.sinks)
        parts.append((cache.window, jnp.where(at >= first[:, None], at, -1)))
    return parts
