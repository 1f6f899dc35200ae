"""`KVCache`, and the functions that fill it: `init`, `append`, `insert`, `evict`.

Positions. Token p of a sequence lies in slot p (of a ring: p modulo its length) of the codes, in slot p of the sinks if
it is one of the first, and in slot p modulo W of the float window of the last W. Which of them attention reads is a
function of the sequence's length alone (`read_ranges`), so it is the same however the tokens came.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.core.errors import CacheError
from jquant.kv_cache import checks, paging
from jquant.kv_cache.coding import Store, empty_store, encode_vectors, static_scale
from jquant.kv_cache.format import CacheFormat, Coding, parse
from jquant.kv_cache.rotation import rotate


class Floats(NamedTuple):
    """Keys and values in float, `[batch, kv_heads, slots, head_dim]`."""

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer. A pytree: jit, donate, shard, save it.

    Attributes:
      keys, values: see `coding.Store`; rows are the sequences, or the pages of a pool.
      sinks: the first tokens in float, or None.
      window: the last tokens in float, a ring of slots, or None.
      center, gain: float32 `[kv_heads, head_dim]` or None: keys are encoded as (key - center) / gain.
      table: int32 `[batch, pages of a sequence]`, the page of the pool, -1 for none; None without pages.
      length: int32 `[batch]`, tokens so far.
      overflow: bool `[batch]`: tokens came for which there was no room. Nothing was written, and attention gives NaN.
      format: the `CacheFormat`.
      head_dim: of keys and values.
      capacity: positions of a sequence.
      ring: whether the oldest tokens are overwritten when it is full.
      page_size: positions of a page, 0 without pages.
    """

    keys: Store
    values: Store
    sinks: Floats | None
    window: Floats | None
    center: jax.Array | None
    gain: jax.Array | None
    table: jax.Array | None
    length: jax.Array
    overflow: jax.Array
    format: CacheFormat = dataclasses.field(metadata=dict(static=True))
    head_dim: int = dataclasses.field(metadata=dict(static=True))
    capacity: int = dataclasses.field(metadata=dict(static=True))
    ring: bool = dataclasses.field(metadata=dict(static=True))
    page_size: int = dataclasses.field(metadata=dict(static=True))

    def replace(self, **changes: Any) -> "KVCache":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def nbytes(self) -> int:
        """Bytes that memory holds, everything included."""
        return sum(a.nbytes for a in jax.tree.leaves(self))


def init(
    batch: int,
    length: int,
    kv_heads: int,
    head_dim: int,
    format: str | CacheFormat = "int8",
    *,
    dtype: Any = "bfloat16",
    ring: bool = False,
    pages: int | None = None,
    page_size: int = 64,
    key_scale: Any = None,
    value_scale: Any = None,
    center: Any = None,
    gain: Any = None,
) -> KVCache:
    """An empty cache.

    Args:
      batch: sequences.
      length: positions for each; rounded up to whole blocks of tokens, or pages.
      kv_heads, head_dim: of keys and values.
      format: a `CacheFormat` or its name, see `parse`.
      dtype: of the tokens that stay in float (sinks, window).
      ring: when a sequence is full its oldest tokens are overwritten, for sliding windows; otherwise that is an error.
      pages: the sequences share a pool of so many pages, taken as they grow.
      page_size: positions of a page.
      key_scale, value_scale: float or `[kv_heads]`, static scales of formats that have one.
      center: float32 `[kv_heads, head_dim]`: subtracted from keys before they are encoded. The result of attention is
        the same for any center, as a score's q . center is added back.
      gain: `[kv_heads, head_dim]`, positive: keys are divided by it before they are encoded, queries multiplied by it.
        1 / gain is rounded to 12 bits and so are, for this product, the keys: it is exact, and so the same in programs
        that fuse it with what follows and in those that don't.

    Raises:
      CacheError: sizes that are not positive or do not fit each other; scales, a center or a gain that do not fit the
        cache or its format.
    """
    fmt = parse(format)
    step = fmt.tokens if pages is None else page_size
    if min(batch, length, kv_heads, head_dim, step) < 1 or (pages is not None and pages < 1):
        raise CacheError(f"init: sizes must be positive, got {batch=}, {length=}, {kv_heads=}, {head_dim=}, {pages=}")
    if len({c.tokens for c in (fmt.keys, fmt.values)} | {1}) > 2 or step % fmt.tokens:
        raise CacheError(
            f"init: {fmt} encodes {fmt.keys.tokens} and {fmt.values.tokens} tokens together; both must be the same, or "
            f"1, and divide the pages of {page_size}"
        )
    if ring and pages is not None:
        raise CacheError("init: a ring takes no pages: it has its memory from the start")
    for name, given in (("center", center), ("gain", gain)):
        if given is not None:
            words = "one number, [head_dim] or [kv_heads, head_dim]"
            checks.fitting("init", name, given, (kv_heads, head_dim), words, positive=name == "gain")
    checks.static_scale("key_scale", key_scale, fmt.keys, kv_heads)
    checks.static_scale("value_scale", value_scale, fmt.values, kv_heads)
    capacity = -(-length // step) * step
    rows, slots = (batch, capacity) if pages is None else (pages, page_size)

    def store(coding: Coding, scale: Any) -> Store:
        return empty_store(coding, (rows, kv_heads), slots, head_dim, static_scale(coding, kv_heads, scale))

    def floats(count: int) -> Floats | None:
        shape = (batch, kv_heads, count, head_dim)
        return Floats(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) if count else None

    return KVCache(
        keys=store(fmt.keys, key_scale), values=store(fmt.values, value_scale),
        sinks=floats(fmt.sinks), window=floats(fmt.window),
        # A copy: a cache is donated, and what was found on a text is to serve the next one too.
        center=None if center is None else jnp.broadcast_to(jnp.array(center, jnp.float32), (kv_heads, head_dim)),
        gain=None if gain is None else jnp.broadcast_to(1 / _twelve_bits(1 / jnp.asarray(gain)), (kv_heads, head_dim)),
        table=None if pages is None else jnp.full((batch, capacity // page_size), -1, jnp.int32),
        length=jnp.zeros(batch, jnp.int32), overflow=jnp.zeros(batch, bool),
        format=fmt, head_dim=head_dim, capacity=capacity, ring=ring, page_size=0 if pages is None else page_size,
    )  # fmt: skip


def _twelve_bits(x: Any) -> jax.Array:
    """float32 with a significand of 12 bits: the product of two such numbers is exact."""
    return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), exponent_bits=8, mantissa_bits=11)


def eased(k: jax.Array, center: jax.Array | None, gain: jax.Array | None) -> jax.Array:
    """Keys `[.., K, L, D]` as they are encoded, float32: without the center, divided by the gain, both `[.., K, D]`."""
    k = k.astype(jnp.float32)
    k = k if center is None else k - center[..., None, :]
    return k if gain is None else _twelve_bits(k) * _twelve_bits(1 / gain[..., None, :])


def append(cache: KVCache, k: jax.Array, v: jax.Array, counts: jax.Array | None = None) -> KVCache:
    """Writes tokens behind those that each sequence has.

    One call with many tokens gives the bits that many calls with one give.

    Args:
      cache: donate it to the jitted program that appends, and it is changed in place.
      k, v: `[batch, tokens, kv_heads, head_dim]`.
      counts: int32 `[batch]`, how many of the tokens each sequence takes, the first ones; None for all. Inside jit
        what is below 0 or above `tokens` is taken as that.

    Raises:
      CacheError: shapes that do not fit; or there is no room, outside jit. Inside, nothing of that sequence is written,
        its `overflow` is set and attention gives NaN for it.
    """
    _check_append(cache, k, v)
    if counts is None:
        counts = jnp.full(k.shape[0], k.shape[1], jnp.int32)
    checks.counts(counts, k.shape[0], k.shape[1])
    end = cache.length + jnp.clip(jnp.asarray(counts), 0, k.shape[1]).astype(jnp.int32)
    fits = jnp.full(k.shape[0], True) if cache.ring else end <= cache.capacity
    table = cache.table
    if table is not None:
        pool = cache.keys.codes[0].shape[0]
        table, enough = paging.allocate(table, jnp.where(fits, -(-end // cache.page_size), 0), pool)
        fits = fits & enough
    _refuse(fits, cache)
    end = jnp.where(fits, end, cache.length)
    cache = cache.replace(table=table, overflow=cache.overflow | ~fits)
    rounded = [x if cache.window is None else x.astype(cache.window.keys.dtype) for x in (k, v)]
    k, v = (x.swapaxes(1, 2) for x in rounded)  # [B, K, L, D]
    at = cache.length[:, None] + jnp.arange(k.shape[2], dtype=jnp.int32)  # [B, L]
    keys, values = _write_codes(cache, k, v, at, end)
    sinks, window = cache.sinks, cache.window
    if sinks is not None:
        sinks = _write_floats(sinks, k, v, at, (at < end[:, None]) & (at < cache.format.sinks))
    if window is not None:
        kept = (at < end[:, None]) & (at >= end[:, None] - cache.format.window)
        window = _write_floats(window, k, v, at % cache.format.window, kept)
    return cache.replace(keys=keys, values=values, sinks=sinks, window=window, length=end)


def _check_append(cache: KVCache, k: jax.Array, v: jax.Array) -> None:
    heads = _heads(cache)
    want = (cache.length.shape[0], k.shape[1] if k.ndim > 1 else -1, heads, cache.head_dim)
    if k.shape != want or v.shape != want:
        raise CacheError(
            f"append: keys {k.shape} and values {v.shape} must both be [batch, tokens, kv_heads, head_dim], here "
            f"[{want[0]}, tokens, {heads}, {cache.head_dim}]"
        )


def _refuse(fits: jax.Array, cache: KVCache) -> None:
    """CacheError where it can be known: outside jit."""
    if isinstance(fits, jax.core.Tracer) or bool(fits.all()):
        return
    row = int(jnp.argmin(fits))
    if int(cache.length[row]) < cache.capacity and cache.table is not None:
        why = f"the pool's {cache.keys.codes[0].shape[0]} pages are used up; evict a sequence, or give more pages"
    else:
        why = f"it holds {int(cache.length[row])} of {cache.capacity} tokens; give init a larger length, or ring=True"
    raise CacheError(f"append: no room for the tokens of sequence {row}: {why}")


def _write_codes(cache: KVCache, k: jax.Array, v: jax.Array, at: jax.Array, end: jax.Array) -> tuple[Store, Store]:
    fmt = cache.format
    out = []
    for x, name, coding in ((k, "keys", fmt.keys), (v, "values", fmt.values)):
        store, where, valid = getattr(cache, name), at, at < end[:, None]
        if coding.tokens > 1:
            x, where, valid = _whole_blocks(cache, x, name, coding.tokens, end)
        if name == "keys" and not (cache.center is None and cache.gain is None):
            x = eased(x, cache.center, cache.gain)
        new = encode_vectors(rotate(x, coding.rotations, fmt.seed), coding, store.static)
        if cache.ring:
            valid = valid & (where >= end[:, None] - cache.capacity)  # of tokens for one slot the last one counts
            where = where % cache.capacity
        out.append(_write_store(cache, store, new, where, valid, coding.tokens))
    return out[0], out[1]


def _whole_blocks(
    cache: KVCache, x: jax.Array, name: str, size: int, end: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks of tokens that may get whole by this append: `[B, K, blocks * size, D]`; positions, and which are.

    Their first tokens are in the window, as floats.
    """
    assert cache.window is not None
    length, tokens = cache.length[:, None], x.shape[2]
    count = (tokens + size - 1) // size
    at = length // size * size + jnp.arange(count * size, dtype=jnp.int32)  # [B, blocks * size]
    old = getattr(cache.window, name)
    before = paging.take(old, at % old.shape[2])
    now = paging.take(x, jnp.clip(at - length, 0, tokens - 1))
    whole = jnp.where((at < length)[:, None, :, None], before, now.astype(before.dtype))
    return whole, at, at // size * size + size <= end[:, None]


def _write_store(cache: KVCache, store: Store, new: Store, where: jax.Array, valid: jax.Array, tokens: int) -> Store:
    def write(old: jax.Array | None, update: jax.Array | None, per: int) -> jax.Array | None:
        if old is None or update is None:
            return None
        slots, ok = where[:, ::per] // per, valid[:, ::per]
        if cache.table is None:
            return paging.put(old, jnp.where(ok, slots, old.shape[2]), update)
        return paging.put_in_pages(old, cache.table, slots, ok, update)

    codes = tuple(write(o, n, 1) for o, n in zip(store.codes, new.codes))
    scale, zero_point = write(store.scale, new.scale, tokens), write(store.zero_point, new.zero_point, tokens)
    return Store(codes, scale, zero_point, store.static)  # type: ignore[arg-type]


def _write_floats(old: Floats, k: jax.Array, v: jax.Array, slots: jax.Array, valid: jax.Array) -> Floats:
    where = jnp.where(valid, slots, old.keys.shape[2])
    return Floats(*(paging.put(o, where, x.astype(o.dtype)) for o, x in zip(old, (k, v))))


def read_ranges(cache: KVCache) -> tuple[jax.Array, jax.Array]:
    """int32 `[batch]`: attention reads the positions before the first number as codes (sinks excepted), those from it
    on in float from the window; the second is how many positions were written as codes at all."""
    size = cache.format.tokens
    if cache.window is None:
        return cache.length, cache.length
    written = cache.length // size * size
    return jnp.maximum(cache.length - cache.format.residual, 0) // size * size, written


# --- one sequence of a batch -----------------------------------------------------------------------------------------


def evict(cache: KVCache, row: jax.Array | int) -> KVCache:
    """Empties sequence `row`: its memory is zeros (or its pages are free) and its length 0; nothing of it is left.

    Raises:
      CacheError: there is no such row, outside jit.
    """
    checks.row("evict", row, cache.length.shape[0])
    if cache.table is None:
        clear = lambda store: jax.tree.map(lambda a: a.at[row].set(paging.blank(a.dtype)), store._replace(static=None))
        table = None
    else:
        pages = cache.table[row]
        clear = lambda store: jax.tree.map(
            lambda a: a.at[jnp.where(pages < 0, a.shape[0], pages)].set(paging.blank(a.dtype), mode="drop"),
            store._replace(static=None),
        )
        table = cache.table.at[row].set(-1)
    zero = lambda t: jax.tree.map(lambda a: a.at[row].set(paging.blank(a.dtype)), t)
    return cache.replace(
        keys=clear(cache.keys)._replace(static=cache.keys.static),
        values=clear(cache.values)._replace(static=cache.values.static),
        sinks=zero(cache.sinks), window=zero(cache.window), table=table, length=zero(cache.length),
        overflow=zero(cache.overflow),
    )  # fmt: skip


def insert(cache: KVCache, row: jax.Array | int, one: KVCache) -> KVCache:
    """Puts a sequence in the place of sequence `row`, whose memory it takes over: continuous batching.

    Args:
      cache: of many sequences.
      row: which.
      one: a cache of one sequence without pages, with the format, capacity, center, gain and static scales of `cache`.

    Raises:
      CacheError: the caches differ; outside jit: there is no such row, or the pool has too few pages (inside,
        `overflow` is set).
    """
    checks.row("insert", row, cache.length.shape[0])
    _check_one(cache, one)
    cache = evict(cache, row)
    put = lambda a, b: a.at[row].set(b[0])
    length, overflow, table = one.length[0], one.overflow[0], cache.table
    if table is None:
        stores = [_insert_row(getattr(cache, n), getattr(one, n), put) for n in ("keys", "values")]
    else:
        needed = jnp.zeros(table.shape[0], jnp.int32).at[row].set(-(-length // cache.page_size))
        table, enough = paging.allocate(table, needed, cache.keys.codes[0].shape[0])
        _refuse(enough, cache)
        length, overflow = jnp.where(enough[row], length, 0), overflow | ~enough[row]
        into = lambda a, b: paging.put_pages(a, table[row], b[0])
        stores = [_insert_row(getattr(cache, n), getattr(one, n), into) for n in ("keys", "values")]
    return cache.replace(
        keys=stores[0], values=stores[1], sinks=jax.tree.map(put, cache.sinks, one.sinks),
        window=jax.tree.map(put, cache.window, one.window), table=table, length=cache.length.at[row].set(length),
        overflow=cache.overflow.at[row].set(overflow),
    )  # fmt: skip


def _check_one(cache: KVCache, one: KVCache) -> None:
    """`insert` is between caches that encode alike."""
    alike = ("format", "head_dim", "capacity", "ring")
    same = all(getattr(one, n) == getattr(cache, n) for n in alike)
    if not same or one.table is not None or one.length.shape != (1,) or _heads(one) != _heads(cache):
        size = lambda c: f"{c.format}, {c.length.shape[0]} x {c.capacity} x {_heads(c)} x {c.head_dim}"
        raise CacheError(
            "insert: needs a cache of one sequence without pages, init(batch=1, ...), with the same format, length, "
            f"kv_heads, head_dim and ring; got {size(one)} for {size(cache)}"
        )
    for name in ("center", "gain"):
        own, others = getattr(cache, name), getattr(one, name)
        if (own is None) != (others is None):
            raise CacheError(f"insert: the {name} of both caches must be the same, but only one of them has any")


def _heads(cache: KVCache) -> int:
    return cache.keys.codes[0].shape[1]


def _insert_row(old: Store, new: Store, put: Any) -> Store:
    return jax.tree.map(put, old._replace(static=None), new._replace(static=None))._replace(static=old.static)
