"""`quantized(kernels=...)`: what a program for a GPU is made of, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.errors import KernelError
from tests.model_bank import BANK, normal, params
from tests.ops.test_gpu import kernels

X = jnp.asarray(normal(2, 64))


def apply(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def quantize(recipe, apply=apply, x=X, **shapes):
    return jq.quantize(apply, params(**(shapes or {"a": (64, 32), "b": (32, 64)})), recipe, jq.rtn(), [x])


def test_never_and_require():
    q = quantize(jq.INT8)
    count = lambda **options: kernels(jq.quantized(apply, **options), q, X)
    assert count() == count(kernels="auto") == count(kernels="require") == 2
    assert count(kernels="never") == 0
    run = {how: jax.jit(jq.quantized(apply, kernels=how))(q, X) for how in ("auto", "never", "require")}
    np.testing.assert_array_equal(run["auto"], run["never"])  # on a CPU
    np.testing.assert_array_equal(run["auto"], run["require"])


def test_require_takes_a_kernel_where_the_table_prefers_xla():
    q, x = quantize(jq.FP8), jnp.asarray(normal(512, 64))
    assert kernels(jq.quantized(apply), q, x) == 0
    assert kernels(jq.quantized(apply, kernels="require"), q, x) == 2
    assert [bool(r.kernel) for r in jq.explain(apply, q, x)] == [False, False]
    assert all("preferred" in r.reason for r in jq.explain(apply, q, x))
    assert [bool(r.kernel) for r in jq.explain(apply, q, x, kernels="require")] == [True, True]


def test_require_lists_every_read_that_is_no_kernel_and_why():
    def apply(p, x):
        return x @ p["good"] @ p["bad"] @ jnp.sin(p["read"]) + x @ p["wrong"].T

    recipe = {"good": jq.INT4_G32, "bad": jq.parse_format("ternary"), "*": None}
    q = quantize(recipe, apply, good=(64, 64), bad=(64, 64), read=(64, 64), wrong=(64, 64)) | {
        "read": quantize(jq.INT8, lambda p, x: x @ p["read"], read=(64, 64))["read"],
        "wrong": quantize(jq.INT8, lambda p, x: x @ p["wrong"], wrong=(64, 64))["wrong"],
    }
    with pytest.raises(KernelError) as caught:
        jq.quantized(apply, kernels="require")(q, X)
    text = str(caught.value)
    assert "for 3 reads" in text and "good" not in text
    for line in ("bad (dot): ternary has no kernel", "read (read): read by sin: deq", "wrong (dot): contr"):
        assert f"\n  {line}" in text
    wanted = jq.explain(apply, q, X, kernels="require")  # which raises nothing
    assert {r.path for r in wanted if r.reason} == {"bad", "read", "wrong"}
    assert all(bool(r.kernel) != bool(r.reason) for r in wanted)


def test_require_is_checked_in_bodies_and_lookups_are_no_products():
    scanned = lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]
    q = quantize({"w": jq.parse_format("ternary")}, scanned, w=(3, 64, 64))
    with pytest.raises(KernelError, match=r"for 1 reads .*\n  w \(dot\): ternary"):
        jax.jit(jq.quantized(scanned, kernels="require"))(q, X)
    tied = lambda p, i: p["w"][i] @ p["w"].T
    q = quantize(jq.INT8, tied, jnp.arange(2), w=(64, 32))
    [lookup] = [r for r in jq.explain(tied, q, jnp.arange(2), kernels="require") if r.kind == "lookup"]
    assert lookup.fused and not lookup.reason and not lookup.kernel
    assert jq.quantized(tied, kernels="require")(q, jnp.arange(2)).shape == (2, 64)


def test_what_runs_on_dequantized_weights_is_told():
    model = BANK["linen_conv1d"]
    q = jq.quantize(model.apply, model.params, jq.INT8, jq.rtn(), [model.args])
    with pytest.raises(KernelError, match="runs on dequantized weights"):
        jq.quantized(model.apply, kernels="require")(q, *model.args)


def test_the_derivative_is_the_same_with_and_without_kernels():
    q = quantize(jq.INT8)
    grad = lambda how: jax.jit(jax.grad(lambda x: jnp.sum(jq.quantized(apply, kernels=how)(q, x) ** 2)))(X)
    np.testing.assert_array_equal(grad("require"), grad("never"))


def test_a_word_that_is_none_of_them_is_an_error_at_once():
    with pytest.raises(KernelError, match="'always' must be one of 'auto', 'never', 'require'"):
        jq.quantized(apply, kernels="always")
    with pytest.raises(KernelError, match="must be one of"):
        jq.explain(apply, quantize(jq.INT8), X, kernels="always")
