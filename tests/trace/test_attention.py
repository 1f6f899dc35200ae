"""Attention is found in the jaxpr, however it is written: its keys and values are those of the function itself."""

import functools
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jquant as jq
from jquant.core.errors import JQuantError, JQuantWarning, NonFiniteError
from jquant.kv_cache import KVStats
from jquant.trace.dims import blocks
from tests.model_bank import fill, params, rtn

B, T, E, H, K, D = 2, 6, 16, 4, 2, 8
G = H // K
P = params(q=(E, H * D), k=(E, K * D), v=(E, K * D), o=(H * D, E), mix=(H, H), sink=(H,))


def inputs(seed=0, tokens=T):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, tokens, E)), jnp.float32)


def project(p, x):
    heads = lambda y: y.reshape(*y.shape[:2], -1, D)
    return heads(x @ p["q"]), heads(x @ p["k"]), heads(x @ p["v"])


def output(p, out):
    return out.reshape(*out.shape[:2], H * D) @ p["o"]


def mask(scores):
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)


def with_heads(copy):
    """Multi-head attention over keys and values that `copy` has made as many as the queries."""

    def apply(p, x):
        q, k, v = project(p, x)
        scores = jnp.einsum("bthd,bshd->bhts", q, copy(k)) / math.sqrt(D)
        weights = jax.nn.softmax(mask(20 * jnp.tanh(scores / 20)), axis=-1)
        return output(p, jnp.einsum("bhts,bshd->bthd", weights, copy(v)))

    return apply


repeated = with_heads(lambda a: jnp.repeat(a, G, axis=2))
broadcast = with_heads(lambda a: jnp.broadcast_to(a[:, :, :, None], (B, a.shape[1], K, G, D)).reshape(B, -1, H, D))
tiled = with_heads(lambda a: jnp.tile(jnp.stack(jnp.unstack(a, axis=0)), (1, 1, G, 1)))
looked_up = with_heads(lambda a: a[:, :, np.arange(H) // G])


@jax.jit
def grouped(q, k, v):
    """Queries in groups, the sum taken from the result."""
    scores = mask(jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, -1, K, G, D), k))
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out / weights.sum(-1).transpose(0, 3, 1, 2)[..., None]


def helper(p, x):
    return output(p, grouped(*project(p, x)))


def batch_of_heads(p, x):
    """Sequences and heads as one axis."""
    flat = lambda a: jnp.repeat(a, H // a.shape[2], axis=2).swapaxes(1, 2).reshape(B * H, -1, D)
    q, k, v = map(flat, project(p, x))
    out = jax.nn.softmax(q @ k.swapaxes(1, 2), axis=-1) @ v
    return output(p, out.reshape(B, H, -1, D).swapaxes(1, 2))


def fused(p, x):
    return output(p, jax.nn.dot_product_attention(*project(p, x), is_causal=True))


def vmapped(p, x):
    def head(q, k, v):
        return jnp.exp(jax.nn.log_softmax(q @ k.T, axis=-1)) @ v

    group = jax.vmap(head, (1, None, None), 1)
    q, k, v = project(p, x)
    return output(p, jax.vmap(jax.vmap(group, (1, 1, 1), 1))(q.reshape(B, -1, K, G, D), k, v))


@jax.custom_vjp
def by_hand(q, k, v):
    return grouped(q, k, v)


by_hand.defvjp(lambda *a: (by_hand(*a), a), lambda a, g: jax.vjp(grouped, *a)[1](g))


def custom(p, x):
    return output(p, by_hand(*project(p, x)))


def talking(p, x):
    """Heads mixed before and behind the softmax (arXiv 2003.02436)."""
    q, k, v = project(p, x)
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
    mix = lambda a: jnp.einsum("bhts,hg->bgts", a, p["mix"])
    weights = mix(jax.nn.softmax(mix(jnp.einsum("bthd,bshd->bhts", q, k)), axis=-1))
    return output(p, jnp.einsum("bhts,bshd->bthd", weights, v))


def interleaved(p, x):
    """RoPE of neighbouring channels, which puts them together again; the reference has it too."""
    q, k, v = rotated(p, x)
    return output(p, jax.nn.dot_product_attention(q, k, v))


def rotated(p, x):
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * jnp.linspace(0.1, 1, D // 2)

    def turn(a):
        even, odd = a[..., ::2], a[..., 1::2]
        pairs = even * jnp.cos(angle) - odd * jnp.sin(angle), even * jnp.sin(angle) + odd * jnp.cos(angle)
        return jnp.stack(pairs, axis=-1).reshape(a.shape) / 2

    q, k, v = project(p, x)
    return turn(q), turn(k), v


def sink_logit(p, x):
    """A learned logit beside the scores (gpt-oss)."""
    q, k, v = project(p, x)
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    more = jnp.broadcast_to(p["sink"][None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, more], axis=-1), axis=-1)[..., :-1]
    return output(p, jnp.einsum("bhts,bshd->bthd", weights, v))


def query_by_query(p, x):
    q, k, v = project(p, x)
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))

    def one(q):
        return jnp.einsum("bht,bthd->bhd", jax.nn.softmax(jnp.einsum("bhd,bthd->bht", q, k), axis=-1), v)

    return output(p, jax.lax.map(one, q.swapaxes(0, 1)).swapaxes(0, 1))


def query_blocks(p, x):
    """A block of queries sees the keys up to its end."""
    q, k, v = project(p, x)
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
    outs = [jax.nn.dot_product_attention(q[:, i : i + 3], k[:, : i + 3], v[:, : i + 3]) for i in range(0, T, 3)]
    return output(p, jnp.concatenate(outs, axis=1))


def key_blocks(p, x):
    """A running softmax (flash attention) in a scan over blocks of keys."""
    q, k, v = project(p, x)

    def step(state, block):
        out, total, top = state
        k, v = (jnp.repeat(a, G, axis=2) for a in block)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
        out = out * kept + jnp.einsum("bhts,bshd->bhtd", weights, v)
        return (out, total * kept + weights.sum(-1, keepdims=True), new), None

    one = jnp.zeros((B, H, T, 1))
    cut = lambda a: a.reshape(B, -1, 2, K, D).swapaxes(0, 1)
    (out, total, _), _ = jax.lax.scan(step, (jnp.zeros((B, H, T, D)), one, one - jnp.inf), (cut(k), cut(v)))
    return output(p, (out / total).swapaxes(1, 2))


def branch(p, x):
    q, k, v = project(p, x)
    return output(p, jax.lax.cond(x.sum() < jnp.inf, grouped, lambda q, k, v: q.reshape(B, -1, K, G, D), q, k, v))


def by_platform(p, x):
    other = lambda q, k, v: q.reshape(B, -1, K, G, D)
    return output(p, jax.lax.platform_dependent(*project(p, x), cuda=other, default=grouped))


WAYS = {
    f.__name__: f
    for f in (helper, batch_of_heads, fused, vmapped, custom, talking, interleaved, sink_logit)
} | {
    "repeated": repeated, "broadcast": broadcast, "tiled": tiled, "looked_up": looked_up,
    "query_by_query": query_by_query, "query_blocks": query_blocks, "key_blocks": key_blocks, "branch": branch,
    "by_platform": by_platform,
    "checkpoint": lambda p, x: jax.checkpoint(repeated)(p, x),
}  # fmt: skip


def observe(apply, p, *batches, **how):
    """The statistics of its attentions, no others, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jq.calibrate(apply, p, batches, paths=[], **({"attention": True} | how))
    assert list(found) == [f"attention[{i}]" for i in range(len(found))]
    return list(found.values())


def ends(k, v):
    """What `KVStats` has of keys and values `[.., tokens, heads, channels]`, the leading axis that of the batch."""
    over = (0, -3)
    return [np.asarray(end(a, over)) for a in (k, v) for end in (jnp.min, jnp.max)]


def same(stats, want):
    """To the last bits: these are the numbers themselves, but a compiler may fuse what makes them."""
    got = (stats.key_min, stats.key_max, stats.value_min, stats.value_max)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_max_ulp(np.asarray(a), b, 4)


@pytest.mark.parametrize("name", WAYS)
def test_keys_and_values_are_found_however_attention_is_written(name):
    (stats,) = observe(WAYS[name], P, inputs())
    _, k, v = jax.jit(rotated if name == "interleaved" else project)(P, inputs())
    same(stats, ends(k, v))
    assert stats.tokens % (B * T) == 0 and stats.tokens > 0


def test_one_key_head_without_an_axis_of_its_own():
    def apply(p, x):
        q, k, v = project(p, x)
        k, v = k[:, :, 0], v[:, :, 0]
        weights = jax.nn.softmax(jnp.einsum("bthd,bsd->bhts", q, k), axis=-1)
        return output(p, jnp.einsum("bhts,bsd->bthd", weights, v))

    (stats,) = observe(apply, P, inputs())
    _, k, v = jax.jit(project)(P, inputs())
    same(stats, ends(k[:, :, :1], v[:, :, :1]))


def test_flax_attention():
    """linen and nnx, of 16 channels in 4 heads; the projections are in the parameters' names."""
    x = inputs()
    module = nn.MultiHeadDotProductAttention(num_heads=H)
    p = fill(jax.eval_shape(module.init, jax.random.key(0), x, x))
    (stats,) = observe(lambda p, x: module.apply(p, x, x), p, x)
    make = lambda n: jnp.einsum("bte,ehd->bthd", x, p["params"][n]["kernel"]) + p["params"][n]["bias"]
    same(stats, ends(make("key"), make("value")))

    graph, state = nnx.split(nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)
    (stats,) = observe(apply, state, x)
    make = lambda n: jnp.einsum("bte,ehd->bthd", x, state[n]["kernel"][...]) + state[n]["bias"][...]
    same(stats, ends(make("key"), make("value")))


LAYERS = 3
STACK = {n: jnp.stack([a * (1 + i) / 2 for i in range(LAYERS)]) for n, a in P.items()}


@pytest.mark.parametrize("layer", [jax.checkpoint(fused), custom, key_blocks], ids=["remat", "custom", "nested"])
def test_layers_of_a_scan_are_stacked(layer):
    def scanned(p, x):
        return jax.lax.scan(lambda x, p: (x + layer(p, x), None), x, p)[0]

    def unrolled(p, x):
        for i in range(LAYERS):
            x = x + layer({n: a[i] for n, a in p.items()}, x)
        return x

    (stacked,) = observe(scanned, STACK, inputs())
    each = observe(unrolled, STACK, inputs())
    assert len(each) == LAYERS and stacked.tokens.shape == (LAYERS,)
    for i, stats in enumerate(each):
        np.testing.assert_allclose(stacked.key_max[i], stats.key_max, rtol=1e-5)
        np.testing.assert_allclose(stacked.value_min[i], stats.value_min, rtol=1e-5)


def test_batches_add_up_whatever_their_length():
    batches = [inputs(0), inputs(1, 9), inputs(2)]
    (stats,) = observe(repeated, P, *batches)
    parts = [observe(repeated, P, b)[0] for b in batches]
    total = functools.reduce(jq.merge, parts)
    jax.tree.map(np.testing.assert_array_equal, stats, total)
    assert stats.tokens == B * (6 + 9 + 6)


def test_an_attention_that_does_not_run_adds_nothing():
    """Not even the zero with which a sum begins: no key here is below 3."""

    def apply(p, x, flag):
        q, k, v = project(p, x)
        k = jnp.abs(k) + 3
        return jax.lax.cond(flag, grouped, lambda q, k, v: q.reshape(B, T, K, G, D), q, k, v)

    yes, no = jnp.array(True), jnp.array(False)
    (stats,) = observe(apply, P, (inputs(0), no), (inputs(1), yes), (inputs(2), no))
    _, k, v = jax.jit(project)(P, inputs(1))
    same(stats, ends(jnp.abs(k) + 3, v))
    assert stats.tokens == B * T
    (stats,) = observe(apply, P, (inputs(0), no))
    assert stats.tokens == 0


def test_keys_are_taken_as_they_enter_the_product():
    """Rounded if they are; what widens them again changes nothing."""

    def apply(p, x):
        q, k, v = project(p, x)
        k = (k * 1.01).astype(jnp.bfloat16)
        k, v = (jnp.repeat(a, G, axis=2).astype(jnp.float32) for a in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        return output(p, jnp.einsum("bhts,bshd->bthd", weights, v))

    (stats,) = observe(apply, P, inputs())
    assert stats.key_max.shape == (K, D)
    np.testing.assert_array_equal(stats.key_max, stats.key_max.astype(jnp.bfloat16).astype(jnp.float32))
    _, k, _ = jax.jit(project)(P, inputs())
    np.testing.assert_allclose(stats.key_max, (k * 1.01).max((0, 1)), rtol=2**-8)


def test_quantized_parameters_and_statistics_of_weights():
    """Attention of a quantized tree is that of its values; asking for it leaves the statistics of weights alone."""
    q = {n: rtn(a, jq.INT8, (-2,)) if n in "qkvo" else a for n, a in P.items()}
    plain = jq.calibrate(repeated, q, [inputs()])
    both = jq.calibrate(repeated, q, [inputs()], attention=True)
    assert list(both) == [*plain, "attention[0]"] and isinstance(both["attention[0]"], KVStats)
    jax.tree.map(np.testing.assert_array_equal, {p: both[p] for p in plain}, plain)
    _, k, v = jax.jit(project)(jq.dequantize(q), inputs())
    same(both["attention[0]"], ends(k, v))


def test_heads_that_no_weight_made_are_one_and_it_is_said():
    def apply(p, k, v):
        return grouped(jnp.ones((B, T, H, D)), k, v).sum() * p["sink"].sum()

    _, k, v = jax.jit(project)(P, inputs())
    with pytest.warns(JQuantWarning, match=r"attention\[0\]: which axes are the heads of its keys and values"):
        stats = jq.calibrate(apply, P, [(k, v)], paths=[], attention=True)["attention[0]"]
    same(stats, ends(*(a.reshape(B, -1, 1, D) for a in (k, v))))


def test_a_number_that_is_not_finite_stops_it():
    bad = {**P, "v": P["v"].at[0, 3].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match=r"attention\[0\]: 1 channels of its values"):
        observe(repeated, bad, inputs())
    stacked = {n: a.at[1, 0, 3].set(jnp.inf) if n == "k" else a for n, a in STACK.items()}
    scanned = lambda p, x: jax.lax.scan(lambda c, p: (c, repeated(p, x)), x, p)[1]
    with pytest.raises(NonFiniteError, match=r"attention\[0\]: 1 channels of its keys"):
        observe(scanned, stacked, inputs())


def _router(p, x):
    gates = jax.nn.softmax(x @ p["k"], axis=-1)
    return gates @ p["v"].T


def _expert_choice(p, x):
    """A softmax over tokens, behind products without one: nothing of it is attention."""
    q, k, v = project(p, x)
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
    x = x + output(p, jnp.einsum("bhts,bshd->bthd", jnp.einsum("bthd,bshd->bhts", q, k), v))
    return jnp.einsum("bte,btd->bed", jax.nn.softmax(x @ p["k"], axis=1), x)


def test_the_result_of_attention_is_no_product_of_its_own():
    """Behind it a softmax over tokens follows, and a product along them (expert choice)."""

    def apply(p, x):
        out = grouped(*project(p, x)).reshape(B, T, H * D)
        return jnp.einsum("bte,btd->bed", jax.nn.softmax(out, axis=1), x)

    (stats,) = observe(apply, P, inputs())
    _, k, v = jax.jit(project)(P, inputs())
    same(stats, ends(k, v))


def _gaussian(p, x):
    """exp of a product, but no sum of it."""
    q, k, v = project(p, x)
    return jnp.exp(q[:, :, 0] @ k[:, :, 0].swapaxes(1, 2)) @ v[:, :, 0]


def _difference(p, x):
    q, k, v = (a[:, :, 0] for a in project(p, x))
    weights = lambda k: jax.nn.softmax(q @ k.swapaxes(1, 2), axis=-1)
    return (weights(k) - weights(2 * k)) @ v


@pytest.mark.parametrize("apply", [_router, _expert_choice, _gaussian, _difference])
def test_what_is_no_attention_is_an_error_that_says_what_was_looked_for(apply):
    with pytest.raises(JQuantError, match="no product of two arrays"):
        observe(apply, P, inputs())


@pytest.mark.parametrize("a, b, want", [
    ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
    ((6, 1, 4), (2, 3, 1, 4), [((0,), (0, 1)), ((2,), (3,))]),
    ((4, 6), (8, 3), [((0, 1), (0, 1))]),
    ((1, 1), (1,), []),
])  # fmt: skip
def test_a_reshape_falls_into_its_finest_parts(a, b, want):
    assert blocks(a, b) == want
