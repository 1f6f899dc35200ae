"""vmap over inputs, and over a stacked leading axis of the parameters (an ensemble)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from tests import model_bank
from tests.model_bank import BANK, FORMATS, MODELS, Model, assert_same, dequantize, quick

SOME = {
    "left", "nested_scan", "cond_both", "custom_vjp", "checkpoint", "both", "gqa_weights", "experts_odd_order",
    "lookup_layers", "linen_scan_remat", "while_loop",
}  # fmt: skip
CASES = [
    pytest.param(m, FORMATS[i % len(FORMATS)], id=repr(m), marks=() if m.name in SOME else pytest.mark.slow)
    for i, m in enumerate(MODELS)
    if m.name not in ("static", "ragged_dot")  # strings can't be batched, and JAX batches no ragged_dot
]


def stacked(tree, seeds=(1, 2, 3)):
    """Three of each array, not equal."""

    def change(a, i):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(a, i)
        return a * (1 + 0.25 * i) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(lambda a: jnp.stack([change(jnp.asarray(a), i) for i in seeds]), tree)


@pytest.mark.parametrize("model, fmt", CASES)
def test_over_inputs(model: Model, fmt):
    q, args = model_bank.quantize(model.name, fmt), stacked(model.args)
    run = lambda apply: quick(jax.vmap(lambda p, *a: apply(p, *a, **model.kwargs), in_axes=(None, *[0] * len(args))))
    want = run(model.apply)(dequantize(q), *args)
    assert_same(run(jq.quantized(model.apply))(q, *args), want, rtol=model.near(1e-5))


@pytest.mark.parametrize("model, fmt", CASES)
def test_over_an_ensemble(model: Model, fmt):
    """The scales of three members differ; a QTensor's static data holds no leading axis."""
    q = stacked(model_bank.quantize(model.name, fmt))
    members = [jax.tree.map(lambda a, i=i: a[i], q) for i in range(3)]
    got = quick(jax.vmap(lambda q: jq.quantized(model.apply)(q, *model.args, **model.kwargs)))(q)
    run = quick(lambda p: model.apply(p, *model.args, **model.kwargs))
    want = jax.tree.map(lambda *x: jnp.stack(x), *[run(dequantize(m)) for m in members])
    assert_same(got, want, rtol=model.near(1e-5))


def test_the_same_reads_run_on_codes_inside_vmap():
    model = BANK["linen_attention"]
    q, seen = model_bank.quantize(model.name, FORMATS[1]), []

    def one(q, x):
        seen.append(jq.explain(model.apply, q, x))
        return x.sum()

    jax.vmap(one)(stacked(q), stacked(model.args[0]))
    assert sum(r.fused for r in seen[0]) == model.fused


def test_other_axes_and_nesting():
    apply, q = BANK["matmul"].apply, model_bank.quantize("matmul", FORMATS[1])
    x = model_bank.normal(2, 3, 8, 5)
    run = lambda f: jax.vmap(jax.vmap(f, in_axes=(None, 1), out_axes=1), in_axes=(None, 3), out_axes=2)
    got, want = run(jq.quantized(apply))(q, x), run(apply)(jq.dequantize(q), x)
    assert_same(got, want)


def test_per_example_gradients():
    apply, q = BANK["custom_vjp"].apply, model_bank.quantize("custom_vjp", FORMATS[0])
    grads = lambda f, p: jax.vmap(jax.grad(lambda x: jnp.sin(f(p, x)).sum()))(jnp.asarray(model_bank.X))
    got = quick(lambda q: grads(jq.quantized(apply), q))(q)
    assert_same(got, quick(lambda p: grads(apply, p))(jq.dequantize(q)), rtol=1e-5)
    assert np.any(np.asarray(got) != 0)
