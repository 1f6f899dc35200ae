"""Static scales from `jquant.calibrate` are those of a float cache that holds the same keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import kv_cache
from jquant.core.errors import CacheError
from jquant.kv_cache import KVStats
from tests.kv_cache.cases import reference, relative

B, T, K, G, D = 2, 9, 2, 3, 64
FORMATS = [
    "fp8_e4m3-tensor", "nvfp4", "keys=int8,values=fp8_e5m2-tensor", "fp8_e4m3-tensor,sinks=3",
    "keys=nvfp4-rot,values=fp8_e4m3-tensor-rot2,sinks=2,seed=3", "keys=fp8_e4m3-tensor,values=int4-g64-asym-rot",
]  # fmt: skip


def whole(*shape, seed=0):
    """Small whole numbers: sums of their products are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape), jnp.float32)


P = {"q": whole(8, K * G, D), "k": whole(8, K, D, seed=1), "v": whole(8, K, D, seed=2)}
X = [whole(B, T, 8, seed=3), whole(1, T + 4, 8, seed=4)]


def project(p, x):
    return tuple(jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")


def apply(p, x):
    return jax.nn.dot_product_attention(*project(p, x), is_causal=True)


def text_cache(x):
    _, k, v = project(P, x)
    return kv_cache.append(kv_cache.init(x.shape[0], x.shape[1], K, D, "float32"), k, v)


def observed(fmt, batches=tuple(X)):
    return jq.calibrate(apply, P, batches, paths=[], attention=fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_are_those_of_a_float_cache_bit_for_bit(fmt):
    each = [kv_cache.static_scales(text_cache(x), fmt) for x in X]
    found = kv_cache.static_scales(observed(fmt)["attention[0]"], fmt)
    assert found.keys() == each[0].keys()
    for which, scale in found.items():
        assert scale.shape == (K,) and scale.dtype == jnp.float32
        np.testing.assert_array_equal(scale, jnp.maximum(each[0][which], each[1][which]))


@pytest.mark.parametrize("with_gain", [False, True])
def test_centers_and_gains_may_come_later(with_gain):
    """They leave the order of the numbers of a channel as it is."""
    ease = {"center": 40 * whole(K, D, seed=5) / 3}
    ease |= {"gain": jnp.abs(whole(K, D, seed=6)) + 0.3} if with_gain else {}
    stats, name = observed(True, X[:1])["attention[0]"], "keys=fp8_e4m3-tensor,values=nvfp4"
    want = kv_cache.static_scales(text_cache(X[0]), name, **ease)
    jax.tree.map(np.testing.assert_array_equal, kv_cache.static_scales(stats, name, **ease), want)


def test_they_fit_the_cache():
    """Keys beyond the largest number of the format are right again."""
    scale, name = 1e5, "fp8_e4m3-tensor"
    p = {**P, "q": P["q"] / scale / 500, "k": P["k"] * scale}
    stats = jq.calibrate(apply, p, X[:1], paths=[], attention=True)
    q, k, v = project(p, X[0])
    attend = lambda **more: kv_cache.attend(
        q, kv_cache.append(kv_cache.init(B, T, K, D, name, **more), k, v)
    )  # fmt: skip
    want = reference(q[0], k[0], v[0])
    found = kv_cache.static_scales(stats["attention[0]"], name)
    assert relative(attend(**found)[0], want) < 0.1 < relative(attend()[0], want)


def test_all_attentions_are_layers():
    """Stacked ones have their layers in front."""

    def twice(p, x):
        return apply(p, x).sum() + apply(p, 2 * x).sum()

    stats = jq.calibrate(twice, P, X[:1], attention=True)  # statistics of weights are left aside
    ease = {"center": {"0": jnp.zeros((K, D)), "1": jnp.ones((K, D))}}
    found = kv_cache.static_scales(stats, "fp8_e4m3-tensor", **ease)
    assert found.keys() == {"key_scale", "value_scale"} and found["key_scale"].keys() == {"0", "1"}
    for i in range(2):
        cache, center = text_cache((1 + i) * X[0]), ease["center"][str(i)]
        want = kv_cache.static_scales(cache, "fp8_e4m3-tensor", center=center)
        jax.tree.map(np.testing.assert_array_equal, {n: s[str(i)] for n, s in found.items()}, want)
    assert kv_cache.static_scales(stats, "int8") == {}

    stack = {n: jnp.stack([a, 3 * a]) for n, a in P.items()}
    scanned = lambda p, x: jax.lax.scan(lambda c, p: (c, apply(p, x)), 0, p)[1]
    layers = jq.calibrate(scanned, stack, X[:1], paths=[], attention=True)["attention[0]"]
    scales = kv_cache.static_scales(layers, "nvfp4", center=jnp.zeros((2, K, D)))
    one = kv_cache.static_scales(text_cache(X[0]), "nvfp4")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.stack([b, 3 * b]), rtol=1e-6), scales, one)


def test_statistics_of_one_head_serve_every_head():
    stats = observed(True)["attention[0]"]
    one = KVStats(
        stats.key_min.min(0, keepdims=True), stats.key_max.max(0, keepdims=True),
        stats.value_min.min(0, keepdims=True), stats.value_max.max(0, keepdims=True), stats.tokens,
    )  # fmt: skip
    found, each = (kv_cache.static_scales(s, "fp8_e4m3-tensor") for s in (one, stats))
    for which, scale in found.items():
        np.testing.assert_array_equal(scale, each[which].max(keepdims=True))
    cache = kv_cache.init(1, 4, K, D, "fp8_e4m3-tensor", **found)
    assert cache.keys.static.shape == (K,)


@pytest.mark.parametrize("seen, fmt, ease, match", [
    (True, "nvfp4-rot", {}, r"those of all keys and values, as they are.*attention='nvfp4-rot'"),
    (True, "nvfp4,sinks=2", {}, r"attention='nvfp4,sinks=2'"),
    ("nvfp4-rot,sinks=2", "nvfp4,sinks=2", {}, "those of nvfp4-rot,sinks=2"),
    ("nvfp4-rot", "nvfp4-rot,seed=1", {}, "encodes others"),
    ("nvfp4-rot", "nvfp4-rot", {"gain": np.ones((K, D))}, "float cache"),
])  # fmt: skip
def test_statistics_of_other_numbers_are_refused(seen, fmt, ease, match):
    with pytest.raises(CacheError, match=match):
        kv_cache.static_scales(observed(seen, X[:1]), fmt, **ease)


def test_refusals():
    with pytest.raises(CacheError, match="attention over 9 tokens has none behind the 9 sinks"):
        observed("nvfp4,sinks=9", X[:1])
    weights = jq.calibrate(lambda p, x: project(p, x), P, X[:1])
    with pytest.raises(CacheError, match="attention=True"):
        kv_cache.static_scales(weights, "nvfp4")
