"""scan, while, cond and remat around `quantized(apply)`, and tracers that it closes over."""

import jax
import jax.numpy as jnp
import pytest

import jquant as jq
from tests import model_bank
from tests.model_bank import BANK, FORMATS, X, assert_same, dequantize, params, quick

NAMES = ["read_twice", "scan", "linen_scan", "custom_vjp_square", "cond_both"]


def case(name: str):
    if name == "custom_vjp_square":
        w = params(w=(8, 8))
        return lambda p, x: model_bank.clipped(x, p["w"], 0.5), {"w": model_bank.rtn(w["w"], FORMATS[1], (-2,))}
    apply = BANK[name].apply
    first = (lambda p, x: apply(p, x)[0]) if name == "scan" else apply
    return first, model_bank.quantize(name, FORMATS[1])


AROUND = {
    "scan": lambda f, p, x: jax.lax.scan(lambda c, _: (jnp.tanh(f(p, c)), c.sum()), x, None, length=3),
    "fori": lambda f, p, x: jax.lax.fori_loop(0, 2, lambda i, c: jnp.tanh(f(p, c)), x),
    "cond": lambda f, p, x: jax.lax.cond(x.sum() < 1e9, lambda p, x: f(p, x), lambda p, x: x, p, x),
    "remat": lambda f, p, x: jax.checkpoint(f)(p, x),
    "scan_over_remat": lambda f, p, x: jax.lax.scan(lambda c, _: (jax.checkpoint(f)(p, c), None), x, None, length=2)[0],
    "jit": lambda f, p, x: jax.jit(f)(p, x),
}


PAIRS = [
    pytest.param(name, around, id=f"{name}-{around}", marks=() if (i + k) % 2 == 0 else pytest.mark.slow)
    for i, name in enumerate(NAMES)
    for k, around in enumerate(AROUND)
]


@pytest.mark.parametrize("name, around", PAIRS)
def test_value_and_gradient_inside(name: str, around: str):
    apply, q = case(name)

    def run(f, p):
        fn = lambda x: sum(a.sum() for a in jax.tree.leaves(AROUND[around](f, p, x)))
        return jax.value_and_grad(fn)(jnp.asarray(X))

    got, want = quick(lambda q: (run(jq.quantized(apply), q), run(apply, jq.dequantize(q))))(q)
    assert_same(got, want, rtol=1e-5)


def test_a_stack_of_quantized_layers_scanned_outside():
    """The user's own scan over a stacked quantized tree, one wrapped layer in its body."""
    stacked = {"w": model_bank.rtn(params(w=(3, 8, 8))["w"], FORMATS[1], (-2,))}
    layer = lambda p, x: jnp.tanh(x @ p["w"])
    run = lambda f, p: jax.lax.scan(lambda c, p: (f(p, c), None), jnp.asarray(X), p)[0]
    got = quick(lambda q: run(jq.quantized(layer), q))(stacked)
    assert_same(got, quick(lambda p: run(layer, p))(dequantize(stacked)))


def test_closed_over_tracers():
    q = model_bank.quantize("matmul", FORMATS[0])

    def fn(f, p, x, y):
        wrap = jq.quantized if f else (lambda apply: apply)
        return jnp.sin(wrap(lambda p, x: x @ p["w"] * y)(p, x)).sum()

    grads = lambda f, p: jax.grad(lambda x, y: fn(f, p, x, y), argnums=(0, 1))(jnp.asarray(X), jnp.float32(0.5))
    assert_same(*quick(lambda q: (grads(True, q), grads(False, jq.dequantize(q))))(q), rtol=1e-5)
    # A QTensor that is closed over is no parameter: a forgotten argument is right all the same, read as floats.
    apply = lambda p, x: x @ q["w"]
    assert_same(jq.quantized(apply)({}, X), X @ jq.dequantize(q)["w"])


def test_quantized_inside_quantized():
    q = model_bank.quantize("einsum3", FORMATS[1])
    inner = jq.quantized(lambda p, x: x @ p["b"])
    outer = lambda p, x: inner({"b": p["b"]}, x @ p["a"])
    assert_same(quick(jq.quantized(outer))(q, X), quick(lambda p, x: x @ p["a"] @ p["b"])(dequantize(q), X))
