"""Appending, reading, batching: laws that hold for every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import kv_cache
from jquant.core.errors import CacheError
from jquant.kv_cache import init, parse
from tests.kv_cache.cases import COARSER, ERRORS, FORMATS, append, attend, reference, relative, same_bits, tokens

COUNT = 45


def filled(name, q, k, v, **settings):
    return append(init(k.shape[0], 48, *k.shape[2:], name, dtype="float32", **settings), k, v)


@pytest.mark.parametrize("name", FORMATS)
def test_token_by_token_equals_one_large_append_bit_for_bit(name):
    q, k, v = tokens(2, COUNT)
    one = filled(name, q, k, v)
    many = init(2, 48, 2, 64, name, dtype="float32")
    cuts = [0, 1, 2, 13, 24, *range(25, 35), COUNT]  # parts of 1 and of 11
    for start, end in zip(cuts, cuts[1:]):
        many = append(many, k[:, start:end], v[:, start:end])
    same_bits(one, many)


@pytest.mark.parametrize("name", ["int4-g64-asym-rot", "keys=int4-t8-asym,values=lloyd3-rot2"])
def test_jit_changes_no_bit(name):
    q, k, v = tokens(2, COUNT)
    same_bits(filled(name, q, k, v), kv_cache.append(init(2, 48, 2, 64, name, dtype="float32"), k, v))


@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_that_of_float64_within_the_formats_error(name):
    q, k, v = tokens(2, COUNT)
    out = attend(q, filled(name, q, k, v))
    want = np.stack([reference(q[b], k[b], v[b]) for b in range(2)])
    fmt = parse(name)
    bits = min(fmt.keys.bits, fmt.values.bits)
    most = 1e-5 if name == "float32" else COARSER.get(name, ERRORS[bits])
    assert out.dtype == jnp.float32 and relative(out, want) < most


@pytest.mark.parametrize("name", ["int8", "nvfp4", "keys=int4-t8-asym,values=int3-g32-asym,sinks=5,residual=7"])
def test_pages_hold_what_a_contiguous_cache_holds(name):
    q, k, v = tokens(3, COUNT)
    counts = jnp.array([COUNT, 7, 20])
    start = init(3, 48, 2, 64, name, dtype="float32")
    paged = init(3, 48, 2, 64, name, dtype="float32", pages=7, page_size=16)
    for part in (slice(0, 30), slice(30, COUNT)):
        now = jnp.clip(counts - part.start, 0, part.stop - part.start)
        start, paged = (append(c, k[:, part], v[:, part], now) for c in (start, paged))
    assert not paged.overflow.any() and int((paged.table >= 0).sum()) == 3 + 1 + 2
    np.testing.assert_allclose(attend(q[:, -1:], paged), attend(q[:, -1:], start), atol=2e-6)


@pytest.mark.parametrize("name", ["float32", "int8", "keys=int4-t8-asym,values=int4-g32-asym,sinks=3,residual=5"])
def test_ragged_rows_read_their_own_tokens_only(name):
    q, k, v = tokens(4, COUNT)
    counts = jnp.array([0, 1, 17, COUNT])
    cache = append(init(4, 48, 2, 64, name, dtype="float32"), k, v, counts)
    assert cache.length.tolist() == counts.tolist()
    out = attend(q[:, :1], cache)
    np.testing.assert_array_equal(out[0], 0)  # of a sequence without a token
    for b, n in enumerate(counts.tolist()):
        alone = filled(name, q[b : b + 1, :n], k[b : b + 1, :n], v[b : b + 1, :n]) if n else None
        if alone is not None:
            np.testing.assert_allclose(attend(q[b : b + 1, :1], alone)[0], out[b], atol=2e-6)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", ["int8", "keys=int4-t8-asym-rot,values=lloyd4-rot2"])
def test_head_dims(dim, name):
    q, k, v = tokens(1, 20, 1, dim, 3)
    out = attend(q, append(init(1, 24, 1, dim, name), k, v))
    assert relative(out[0], reference(q[0], k[0], v[0])) < ERRORS[min(parse(name).keys.bits, parse(name).values.bits)]


def test_many_blocks_and_a_last_one_that_overlaps():
    q, k, v = tokens(1, 600, 1)
    cache = append(init(1, 610, 1, 64, "float32"), k, v)
    np.testing.assert_allclose(attend(q, cache)[0], reference(q[0], k[0], v[0]), atol=1e-5)


RULES = [
    dict(window=1), dict(window=7), dict(window=100), dict(window=7, sink_tokens=3), dict(soft_cap=2.0),
    dict(scale=0.3), dict(window=9, sink_tokens=5, soft_cap=1.5),
]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("name", ["float32", "keys=float32,values=float32,sinks=4"])
def test_windows_sinks_caps_and_scales(rules, name):
    q, k, v = tokens(2, COUNT)
    out = attend(q, filled(name, q, k, v), **rules)
    for b in range(2):
        np.testing.assert_allclose(out[b], reference(q[b], k[b], v[b], **rules), atol=1e-5)


def test_sink_logits_take_their_share():
    q, k, v = tokens(1, 12)
    logits = jnp.array([0.5, -1.0, 2.0, 0.0])
    out = attend(q, filled("float32", q, k, v), sink_logits=logits)
    np.testing.assert_allclose(out[0], reference(q[0], k[0], v[0], sink_logits=logits), atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_center_changes_nothing_but_the_rounding(soft_cap):
    q, k, v = tokens(2, COUNT)
    center = np.random.default_rng(5).normal(size=(2, 64)) * 3
    k = k + jnp.asarray(center, jnp.float32)
    want = np.stack([reference(q[b], k[b], v[b], soft_cap=soft_cap) for b in range(2)])
    with_center = lambda name: attend(q, filled(name, q, k, v, center=center), soft_cap=soft_cap)
    np.testing.assert_allclose(with_center("float32"), want, atol=2e-5)
    name = "keys=int4-g64-asym-rot,values=float32,sinks=2,residual=3"
    assert relative(with_center(name), want) < relative(attend(q, filled(name, q, k, v), soft_cap=soft_cap), want) / 2


@pytest.mark.parametrize("name", ["int4-g64-asym-rot", "keys=int4-t8-asym,values=float32"])
def test_a_gain_moves_the_error_to_where_queries_are_small(name):
    """Channels of keys and queries that are large and small in turn: an error of a large query's channel costs most."""
    q, k, v = tokens(2, COUNT)
    size = jnp.where(jnp.arange(64) % 2 == 0, 16.0, 1.0)
    q, k = q / size, k * size
    want = np.stack([reference(q[b], k[b], v[b]) for b in range(2)])
    run = lambda **more: attend(q, filled("keys=int4-g64-asym-rot,values=float32", q, k, v, **more))
    assert relative(run(gain=size), want) < relative(run(), want) / 2
    cache = lambda: init(2, 48, 2, 64, name, dtype="float32", gain=size * 1.3, center=0.7)
    one, many = append(cache(), k, v), cache()
    for i in range(COUNT):
        many = append(many, k[:, i : i + 1], v[:, i : i + 1])
    same_bits(one, many)


@pytest.mark.parametrize("name", ["float32", "int8", "keys=int4-t8-asym,values=int8,sinks=2"])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_ring_keeps_what_a_window_sees(name, cut):
    q, k, v = tokens(2, COUNT)
    ring = init(2, 16, 2, 64, name, dtype="float32", ring=True)
    whole = init(2, 48, 2, 64, name, dtype="float32")
    for start in range(0, COUNT, cut):
        ring, whole = (append(c, k[:, start : start + cut], v[:, start : start + cut]) for c in (ring, whole))
        rules = dict(window=8, sink_tokens=parse(name).sinks)
        got, want = (attend(q[:, start : start + cut], c, **rules) for c in (ring, whole))
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert ring.capacity == 16 and not ring.overflow.any()


def test_a_ring_that_is_too_short_is_refused():
    q, k, v = tokens(1, 6)
    ring = append(init(1, 8, 2, 64, "int8", ring=True), k, v)
    with pytest.raises(CacheError, match="length >= 13"):
        kv_cache.attend(q, ring, window=8)
    with pytest.raises(CacheError, match="sinks=2"):
        kv_cache.attend(q[:, -1:], ring, window=8, sink_tokens=2)


def test_a_full_cache_is_an_error_before_the_write_and_never_wraps():
    q, k, v = tokens(2, 12)
    cache = append(init(2, 10, 2, 64, "int8"), k[:, :8], v[:, :8], jnp.array([8, 5]))
    with pytest.raises(CacheError, match="sequence 0: it holds 8 of 10 tokens"):
        kv_cache.append(cache, k[:, :3], v[:, :3])
    after = append(cache, k[:, :3], v[:, :3])  # inside jit: nothing of that sequence is written
    assert after.overflow.tolist() == [True, False] and after.length.tolist() == [8, 8]
    first = lambda c: jax.tree.map(lambda a: a[0], (c.keys, c.values))
    same_bits(first(after), first(cache))
    out = attend(q[:, :1], after)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    assert not kv_cache.evict(after, 0).overflow.any()


def test_a_pool_without_pages_is_an_error():
    q, k, v = tokens(2, 20)
    cache = init(2, 32, 2, 64, "int8", pages=3, page_size=8)
    with pytest.raises(CacheError, match="3 pages are used up"):
        kv_cache.append(cache, k, v)
    after = append(cache, k, v)
    assert after.overflow.tolist() == [False, True] and after.length.tolist() == [20, 0]


@pytest.mark.parametrize("name", ["int8", "keys=int4-t8-asym,values=nvfp4,sinks=2,residual=4"])
@pytest.mark.parametrize("pages", [None, 9])
def test_insert_and_evict(name, pages):
    """A sequence reads the same after others came and went; what is evicted leaves nothing behind."""
    q, k, v = tokens(3, 30)
    more = {} if pages is None else dict(pages=pages, page_size=8)
    cache = append(init(3, 32, 2, 64, name, **more), k, v, jnp.array([20, 24, 9]))
    before = attend(q[:, :1], cache)
    one = append(init(1, 32, 2, 64, name), k[1:2, :17], v[1:2, :17])
    cache = jax.jit(kv_cache.insert)(cache, 1, one)
    assert cache.length.tolist() == [20, 17, 9] and not cache.overflow.any()
    after = attend(q[:, :1], cache)
    np.testing.assert_allclose(after[jnp.array([0, 2])], before[jnp.array([0, 2])], atol=1e-6)
    np.testing.assert_allclose(after[1], attend(q[1:2, :1], one)[0], atol=1e-6)
    gone = cache
    for row in range(3):
        gone = jax.jit(kv_cache.evict)(gone, row)
    same_bits(gone, init(3, 32, 2, 64, name, **more))


def test_insert_says_what_does_not_fit():
    cache, one = init(2, 8, 1, 64, "int8"), init(1, 8, 1, 64, "int8")
    for other in (init(1, 16, 1, 64, "int8"), init(1, 8, 2, 64, "int8"), cache):
        with pytest.raises(CacheError, match="same format, length"):
            kv_cache.insert(cache, 0, other)
    with pytest.raises(CacheError, match="the center of both caches"):
        kv_cache.insert(cache, 0, init(1, 8, 1, 64, "int8", center=0.5))
    for row in (2, -1, np.int32(7), jnp.arange(2)):  # a write to no row would go unseen
        with pytest.raises(CacheError, match="one number from 0 to 1"):
            kv_cache.insert(cache, row, one)
        with pytest.raises(CacheError, match="one number from 0 to 1"):
            kv_cache.evict(cache, row)


@pytest.mark.parametrize("counts, message", [([-1, 2], "from 0 to the 3"), ([1, 4], "from 0 to the 3"), ([1], "batch")])
def test_counts_that_do_not_fit(counts, message):
    _, k, v = tokens(2, 3)
    with pytest.raises(CacheError, match=message):
        kv_cache.append(init(2, 8, 2, 64, "int8"), k, v, jnp.array(counts))


def test_a_sequence_never_gets_shorter_and_takes_no_more_than_there_is():
    """Inside jit, where numbers are not known: counts beyond both ends are those ends."""
    _, k, v = tokens(2, 3)
    start = append(init(2, 8, 2, 64, "int8"), k, v)
    same_bits(append(start, k, v, jnp.array([-1, 9])), append(start, k, v, jnp.array([0, 3])))


@pytest.mark.parametrize("name", ["int8", "keys=int4-t8-asym,values=nvfp4,sinks=2,residual=4"])
@pytest.mark.parametrize("more", [{}, dict(ring=True), dict(pages=4, page_size=8)], ids=str)
def test_nothing_to_append_and_nothing_to_ask(name, more):
    q, k, v = tokens(2, 12)
    cache = append(init(2, 16, 2, 64, name, **more), k, v)
    same_bits(append(cache, k[:, :0], v[:, :0]), cache)
    assert attend(q[:, :0], cache).shape == (2, 0, 4, 64)
    np.testing.assert_array_equal(attend(q[:, :1], init(2, 16, 2, 64, name, **more)), 0)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("int8", dict(key_scale=2.0), "key_scale is given, but int8 has no static scale"),
        ("fp8_e4m3-tensor", dict(value_scale=0.0), "value_scale must be finite and positive, got 0"),
        ("nvfp4", dict(key_scale=[1.0, 2.0, 3.0]), r"must be one number, or \[kv_heads\], here \[2\]"),
        ("int8", dict(gain=-1.0), "gain must be finite and positive"),
        ("int8", dict(center=np.zeros(3)), r"here \[2, 64\]"),
        ("int8", dict(center=np.nan), "center must be finite"),
    ],
)
def test_settings_that_do_not_fit(name, settings, message):
    with pytest.raises(CacheError, match=message):
        init(1, 8, 2, 64, name, **settings)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "name", ["int8", "fp8_e4m3", "fp8_e4m3-tensor", "int4-g64-asym-rot", "nvfp4", "lloyd4-rot", "mxfp4",
             "keys=int4-t8-asym,values=int4-g32-asym-search"]
)  # fmt: skip
def test_a_number_that_is_not_finite_is_seen_where_it_is_read_and_nowhere_else(name, bad):
    q, k, v = tokens(2, 16)
    more = dict(pages=8, page_size=8) if name in ("nvfp4", "fp8_e4m3-tensor") else {}
    wrong = append(init(2, 16, 2, 64, name, **more), k, v.at[0, 3, 0, 5].set(bad))
    out = attend(q[:, -1:], wrong)
    assert not np.isfinite(out[0, :, :2]).all()  # the query heads of that key head
    assert np.isfinite(out[0, :, 2:]).all() and np.isfinite(out[1]).all()
    again = append(jax.jit(kv_cache.evict)(wrong, 0), k[:, :4], v[:, :4], jnp.array([4, 0]))
    assert np.isfinite(attend(q[:, :1], again)).all()


def test_errors_of_shapes():
    cache = init(2, 8, 2, 64, "int8")
    q, k, v = tokens(2, 3)
    with pytest.raises(CacheError, match="must both be"):
        kv_cache.append(cache, k[..., :32], v)
    with pytest.raises(CacheError, match="a multiple of 2 heads"):
        kv_cache.attend(q[:, :, :3], cache)
    with pytest.raises(CacheError, match="window 0"):
        kv_cache.attend(q, cache, window=0)
    with pytest.raises(CacheError, match=r"positions \(3,\) must be of shape \(2, 3\)"):
        kv_cache.attend(q, cache, positions=jnp.arange(3))
    with pytest.raises(CacheError, match="sink_logits"):
        kv_cache.attend(q, cache, sink_logits=jnp.zeros(3))
    with pytest.raises(CacheError, match="soft_cap 0"):
        kv_cache.attend(q, cache, soft_cap=0.0)
    with pytest.raises(CacheError, match="positive"):
        init(0, 8, 2, 64)
    with pytest.raises(CacheError, match="must be the same, or 1"):
        init(1, 8, 2, 64, "keys=int4-t4-asym,values=int4-t8-asym")


def test_static_scales_are_the_caches_own():
    q, k, v = tokens(1, 12)
    q, k = q / 1000, k * 1000  # keys beyond 448
    want = reference(q[0], k[0], v[0])
    default = filled("fp8_e4m3-tensor", q, k, v)
    given = filled("fp8_e4m3-tensor", q, k, v, key_scale=np.array([10.0, 12.0]))
    assert relative(attend(q, given)[0], want) < 0.2 < relative(attend(q, default)[0], want)


@pytest.mark.parametrize("name", ["fp8_e5m2-tensor", "keys=fp8_e4m3-tensor-rot,values=nvfp4,sinks=2"])
def test_static_scales_of_a_text_in_any_models_cache(name):
    """The largest number gets the largest code; keys beyond the range of a scale of 1 are right again."""
    q, k, v = tokens(2, COUNT)
    q, k, center = q / 1e5, k * 1e5, np.full((2, 64), 3e4, np.float32)
    counts = jnp.array([COUNT, 9])
    text = append(init(2, 48, 2, 64, "float32"), k, v, counts)
    found = kv_cache.static_scales(text, name, center=center)
    cache = lambda **more: append(init(2, 48, 2, 64, name, dtype="float32", center=center, **more), k, v, counts)
    want = reference(q[0], k[0], v[0])
    out = lambda **more: relative(attend(q, cache(**more))[0], want)
    assert found["key_scale"].shape == found["value_scale"].shape == (2,)
    assert out(**found) < 0.2 < out(value_scale=found["value_scale"])


def test_static_scales_are_of_float_caches_and_for_formats_that_have_one():
    cache = init(1, 8, 2, 64, "float32")
    assert kv_cache.static_scales(cache, "int8") == {}
    found = kv_cache.static_scales(cache, "keys=int8,values=fp8_e4m3-tensor")
    np.testing.assert_allclose(found.pop("value_scale"), 1 / 448)
    assert not found
    for fmt, more in (("int8", {}), ("float32", dict(ring=True)), ("float32", dict(pages=2))):
        other = init(1, 8, 2, 64, fmt, **more)
        with pytest.raises(CacheError, match="needs a float cache"):
            kv_cache.static_scales(other, "nvfp4")
