"""`evaluate` against float64 NumPy; what must be exactly 0 or 1; windows of a text."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.qtensor import tree_nbytes

VOCAB, WIDTH = 23, 16


def apply(params, tokens):
    x = jnp.tanh(params["embed"][tokens])
    return (x @ params["w"]) @ params["head"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, WIDTH), "w": (WIDTH, WIDTH), "head": (WIDTH, VOCAB)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def qparams(params):
    return jq.quantize(apply, params, {"w": jq.parse_format("int3-g8"), "head": jq.INT4}, jq.rtn(), [tokens(2, 5)])


def tokens(batch, length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def reference(params, qparams, batches):
    """All numbers of an Evaluation but the bytes, in float64 and loops."""
    kl, nll, nll_reference, same, means = [], [], [], [], []
    for batch in batches:
        for text in batch:
            p, q = (log_softmax(forward(t, text)) for t in (params, qparams))
            start = len(kl)
            for i, target in enumerate(text[1:]):
                kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p[i], q[i])))
                nll.append(-q[i][target])
                nll_reference.append(-p[i][target])
                same.append(max(range(VOCAB), key=p[i].__getitem__) == max(range(VOCAB), key=q[i].__getitem__))
            means.append(sum(kl[start:]) / (len(text) - 1))
    n, k = len(kl), len(means)
    mean = sum(kl) / n
    spread = means if k > 1 else kl
    count = len(spread)
    variance = sum((v - sum(spread) / count) ** 2 for v in spread) / max(count * (count - 1), 1)
    return mean, math.sqrt(variance), math.exp(sum(nll) / n), math.exp(sum(nll_reference) / n), sum(same) / n


def forward(params, text):
    p = {k: np.asarray(v, np.float64) for k, v in jq.dequantize(params).items()}
    return (np.tanh(p["embed"][text]) @ p["w"]) @ p["head"]


def log_softmax(x):
    return [[v - math.log(sum(math.exp(w) for w in row)) for v in row] for row in x.tolist()]


@pytest.mark.parametrize(
    "shapes",
    [[(1, 9)], [(1, 2)], [(3, 7)], [(1, 100), (1, 100)], [(2, 8), (1, 8), (4, 8)], [(2, 70), (1, 9)]],
    ids=str,
)
def test_equals_float64(params, qparams, shapes):
    batches = [tokens(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = jq.evaluate(apply, params, qparams, batches)
    np.testing.assert_allclose(found[:5], reference(params, qparams, batches), rtol=2e-5, atol=1e-7)
    assert found.kl > 0.001 and found.top1_agreement < 1 or shapes == [(1, 2)]


def test_a_model_against_itself_has_kl_zero_and_agrees_everywhere(params, qparams):
    copy = jax.tree.map(jnp.copy, params)
    for tree in (params, copy):
        found = jq.evaluate(apply, params, tree, [tokens(2, 40)])
        assert found.kl == 0 and found.kl_stderr == 0 and found.top1_agreement == 1
        assert found.perplexity == found.perplexity_reference
    assert jq.evaluate(apply, qparams, qparams, [tokens(2, 40)]).kl == 0


def test_bytes_are_those_of_the_trees(params, qparams):
    found = jq.evaluate(apply, params, qparams, [tokens(1, 4)])
    assert (found.bytes, found.bytes_reference) == (tree_nbytes(qparams), tree_nbytes(params))
    assert found.bytes < found.bytes_reference == 4 * (2 * VOCAB * WIDTH + WIDTH * WIDTH)


def test_several_at_once_equal_one_at_a_time(params, qparams):
    other = jq.quantize(apply, params, jq.INT8, jq.rtn(), [tokens(1, 4)])
    batches = [tokens(2, 12, seed=i) for i in range(3)]
    trees = {"int3": qparams, "int8": other, "float": params}
    together = jq.evaluate_all(apply, params, trees, batches)
    assert together == {name: jq.evaluate(apply, params, tree, batches) for name, tree in trees.items()}
    assert list(together) == list(trees)
    assert together["float"].kl == 0 < together["int8"].kl < together["int3"].kl


def test_the_reference_is_run_once_for_all(params, qparams):
    seen = []

    def noted(p, x):
        jax.debug.callback(lambda: seen.append(1))
        return apply(p, x)

    jq.evaluate_all(noted, params, {"a": qparams, "b": qparams, "self": params}, [tokens(1, 8)] * 2)
    jax.effects_barrier()
    assert len(seen) == 2 * (1 + 2)  # nor is a tree that is the reference


def test_batches_may_be_tuples_dicts_and_generators(params, qparams):
    def scaled(p, x, scale):
        return apply(p, x) * scale

    text = tokens(2, 9)
    expected = jq.evaluate(apply, params, qparams, [text])
    assert jq.evaluate(scaled, params, qparams, ((text, jnp.float32(1)) for _ in range(1))) == expected
    named = {"scale": jnp.float32(1), "x": text}
    assert jq.evaluate(scaled, params, qparams, [named], tokens=lambda batch: batch["x"]) == expected


def test_logits_in_bfloat16_are_compared_in_float32(params, qparams):
    half = lambda p, x: apply(p, x).astype(jnp.bfloat16)
    found, full = (jq.evaluate(f, params, qparams, [tokens(2, 30)]) for f in (half, apply))
    assert found.kl == pytest.approx(full.kl, rel=0.05) and found.kl != full.kl


def test_what_is_wrong_is_said(params, qparams):
    with pytest.raises(jq.JQuantError, match="nothing to compare; give at least one batch"):
        jq.evaluate(apply, params, qparams, [])
    with pytest.raises(jq.JQuantError, match="needs two tokens"):
        jq.evaluate(apply, params, qparams, [tokens(2, 1)])


def test_windows_follow_each_other_and_the_partial_one_is_dropped():
    found = jq.windows(range(11), 3)
    np.testing.assert_array_equal(np.concatenate(found), np.arange(9).reshape(3, 3))
    assert all(w.shape == (1, 3) and w.dtype == np.int32 for w in found)
    assert len(jq.windows(range(11), 3, 2)) == 2 and len(jq.windows(range(11), 3, 9)) == 3


def test_windows_that_cannot_be():
    with pytest.raises(jq.JQuantError, match="5 tokens, fewer than one window of 8"):
        jq.windows(range(5), 8)
    with pytest.raises(jq.JQuantError, match="length >= 2"):
        jq.windows(range(5), 1)
    with pytest.raises(jq.JQuantError, match="count >= 1"):
        jq.windows(range(5), 2, 0)
