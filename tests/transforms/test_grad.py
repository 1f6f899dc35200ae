"""Derivatives of the quantized model are those of the dequantized one, custom rules included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.paths import map_with_paths
from tests import model_bank
from tests.model_bank import BANK, FORMATS, MODELS, Model, X, assert_same, dequantize, params, quick

# What is differentiated in its own way; the others only with --slow.
FAST = {
    "transposed", "helper_twice", "scan_reverse", "rnn", "nested_scan", "fori_loop", "cond_both", "switch",
    "custom_jvp", "custom_vjp", "checkpoint", "both", "gram", "gqa_weights", "mixed_dtypes", "ragged_dot", "outputs",
    "shard_map", "linen_conv1d", "linen_attention", "linen_scan_remat", "nnx_lora", "nnx_scan",
}  # fmt: skip
ONE_FORMAT = [
    pytest.param(m, FORMATS[i % 4], id=repr(m), marks=() if m.name in FAST else pytest.mark.slow)
    for i, m in enumerate(MODELS)
    if m.differentiable
]


def is_float(x) -> bool:
    return not jq.is_qtensor(x) and not isinstance(x, str) and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def partition(tree):
    """The float leaves of a tree, and a function that puts others in their place. A QTensor is one leaf."""
    flat, treedef = jax.tree.flatten(tree, is_leaf=jq.is_qtensor)

    def rebuild(floats):
        it = iter(floats)
        return treedef.unflatten([next(it) if is_float(x) else x for x in flat])

    return [jnp.asarray(x) for x in flat if is_float(x)], rebuild


def loss(outputs) -> jax.Array:
    """A number that depends on every float output."""
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(outputs) if is_float(x) and jnp.ndim(x))


def losses(model: Model, q):
    """The losses of the quantized and of the dequantized model as functions of the float leaves and float inputs."""
    floats, rebuild = partition((q, model.args))

    def of(apply, prepare):
        def fn(floats):
            p, args = rebuild(floats)
            return loss(apply(prepare(p), *args, **model.kwargs))

        return fn

    return floats, of(jq.quantized(model.apply), lambda p: p), of(model.apply, jq.dequantize)


@pytest.mark.parametrize("model, fmt", ONE_FORMAT)
def test_gradients_of_inputs_and_float_leaves(model: Model, fmt):
    floats, ours, reference = losses(model, model_bank.quantize(model.name, fmt))
    if not floats:
        pytest.skip("it takes no float")
    # A returned QTensor is an array for the loss on both sides.
    got, want = quick(lambda f: (jax.grad(ours)(f), jax.grad(reference)(f)))(floats)
    low_precision = model.name in ("bf16", "linen_dense_bf16", "mixed_dtypes", "literal_outputs")
    tolerance = 2**-7 if low_precision else 1e-5
    assert_same(got, want, rtol=tolerance)
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["custom_jvp", "scan", "while_loop", "cond_both", "checkpoint", "nnx_tied"])
def test_forward_mode(name: str):
    model = BANK[name]
    floats, ours, reference = losses(model, model_bank.quantize(name, FORMATS[0]))
    tangents = [jnp.cos(f) for f in floats]
    if not floats:
        pytest.skip("it takes no float")
    both = quick(lambda f, t: (jax.jvp(ours, (f,), (t,)), jax.jvp(reference, (f,), (t,))))
    got, want = both(floats, tangents)
    assert_same(got, want, rtol=1e-5)


def test_a_custom_rule_is_not_the_true_derivative():
    # The bank's rules are wrong on purpose: losing one would go unseen in a test that compares with the truth.
    x, w = jnp.asarray(X), params(w=(8, 6))["w"]
    grad = lambda f: quick(jax.grad(lambda x: f(x).sum()))(x)
    assert_same(grad(lambda x: model_bank.crooked(x, w)), 3 * grad(lambda x: jnp.sin(x @ w)), rtol=1e-5)
    assert np.abs(grad(lambda x: model_bank.clipped(x, w, 2.0)) - grad(lambda x: 2.0 * (x @ w))).max() > 0.1
    assert np.all(np.asarray(grad(model_bank.leaky)) == 7.0)


@pytest.mark.parametrize("name", ["matmul", pytest.param("custom_vjp", marks=pytest.mark.slow)])
def test_order_of_jit_and_grad_and_plain_calls(name: str):
    model = BANK[name]
    floats, ours, reference = losses(model, model_bank.quantize(name, FORMATS[0]))
    want = quick(jax.grad(reference))(floats)
    for grad in (jax.grad(jax.jit(ours)), jax.jit(jax.grad(ours)), jax.value_and_grad(ours)):
        got = grad(floats)
        assert_same(got[1] if isinstance(got, tuple) else got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["matmul", "scan", "custom_vjp", "custom_jvp", "checkpoint", "cond_one", "linen_tied"])
def test_gradients_of_scales(name: str):
    """With allow_int the scales are float leaves too: their gradients are those through `dequantize`."""
    model, q = BANK[name], model_bank.quantize(name, FORMATS[0])
    ours = lambda q: loss(jq.quantized(model.apply)(q, *model.args))
    reference = lambda q: loss(model.apply(jq.dequantize(q), *model.args))
    got, want = quick(lambda q: tuple(jax.grad(f, allow_int=True)(q) for f in (ours, reference)))(q)
    scales = lambda tree: [g.scale for g in jax.tree.leaves(tree, is_leaf=jq.is_qtensor) if jq.is_qtensor(g)]
    assert scales(want) and all(np.any(np.asarray(s) != 0) for s in scales(want))
    assert_same(scales(got), scales(want), rtol=1e-5)


def test_second_derivatives():
    model = BANK["custom_jvp"]
    q = model_bank.quantize("custom_jvp", FORMATS[0])
    floats, ours, reference = losses(model, q)
    twice = lambda f: jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(f)(x)[0])))
    assert_same(*quick(lambda f: (twice(ours)(f), twice(reference)(f)))(floats), rtol=1e-4)


def test_training_the_float_leaves_lowers_the_loss():
    model = BANK["nnx_lora"]
    base_only = lambda path, w: model_bank.rtn(w, FORMATS[1], (-2,)) if path == "base/kernel" else w
    q = map_with_paths(base_only, model.params)
    floats, rebuild = partition(q)
    target = jnp.asarray(model_bank.normal(2, 3, 6))
    error = lambda floats: jnp.mean((jq.quantized(model.apply)(rebuild(floats), X) - target) ** 2)
    step = quick(lambda f: [a - 0.1 * g for a, g in zip(f, jax.grad(error)(f))])
    before = quick(error)(floats)
    for _ in range(20):
        floats = step(floats)
    assert quick(error)(floats) < 0.7 * before


def test_codes_get_no_gradient():
    q = model_bank.quantize("matmul", FORMATS[0])
    grads = quick(lambda q: jax.grad(lambda q: loss(jq.quantized(BANK["matmul"].apply)(q, X)), allow_int=True)(q))(q)
    assert grads["w"].codes[0].dtype == jax.dtypes.float0
    assert dequantize(q)["w"].shape == (8, 6)
