"""`quantized` on leaves with a side: products still read the codes, the side is two thin ones beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.formats import Format
from jquant.core.paths import map_with_paths
from jquant.core.per_use import PerUse
from jquant.core.side import Side
from tests import model_bank
from tests.model_bank import FORMATS, MODELS, Model, assert_same, dequantize, normal, plain, quantized

FEW = ("matmul", "scan", "linen_attention", "linen_tied", "moe_einsum", "ragged_dot", "lookup_layers", "linen_conv1d")
PAIRS = [
    pytest.param(m, FORMATS[i % len(FORMATS)], marks=() if m.name in FEW else pytest.mark.slow, id=m.name)
    for i, m in enumerate(MODELS)
]


def side_for(q: jq.QTensor, stacked: int, rank: int = 2) -> Side:
    """A random side for a leaf whose first `stacked` axes are solved apart."""
    kept = q.codes[0].shape[:-1]
    lead = [s if i < stacked else 1 for i, s in enumerate(kept)]
    parts = normal(*kept, rank, seed=1), normal(*lead, rank, q.row_length, seed=2)
    return Side(*(jnp.asarray(0.2 * a).astype(q.dtype) for a in parts))


def with_sides(model: Model, fmt: Format):
    axes = model_bank.contracted_axes(model)
    add = lambda path, q: q.replace(side=side_for(q, axes[path][1])) if path in axes else q
    return map_with_paths(add, model_bank.quantize(model.name, fmt))


@pytest.mark.parametrize("model, fmt", PAIRS)
def test_equals_the_dequantized_model_and_runs_as_fused_as_without(model: Model, fmt: Format):
    q = with_sides(model, fmt)
    want = plain(model.name)(dequantize(q), *model.args)
    # Operands in bfloat16 are rounded one by one here, and their sum there.
    in_16_bits = "bf16" in str(plain(model.name).trace(dequantize(q), *model.args).jaxpr)
    assert_same(quantized(model.name)(q, *model.args), want, rtol=2**-7 if in_16_bits else 1e-5)
    reads = jq.explain(model.apply, q, *model.args, **model.kwargs)
    assert sum(r.fused for r in reads) == model.fused
    assert all(("side of rank 2" in r.how) == (r.fused and r.kind != "lookup") for r in reads)


def linear(p, x):
    return x @ p["w"]


def weight(fmt: Format, act: jq.Activation | None = None) -> dict:
    q = model_bank.rtn(jnp.asarray(normal(24, 40)), fmt, (-2,)).replace(activation=act)
    return {"w": q.replace(side=side_for(q, 0))}


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("fmt", [Format("int4", 8), Format("int8"), Format("int3", 8, False)], ids=str)
def test_no_array_of_the_side_is_made(fmt, tokens):
    q, x = weight(fmt), jnp.asarray(normal(tokens, 24))
    eqns = str(jax.make_jaxpr(lambda s, x: jq.quantized(linear)({"w": q["w"].replace(side=s)}, x))(q["w"].side, x))
    products = [line for line in eqns.splitlines() if "dot_general[" in line]
    assert not any(f"f32[{a},{b}]" in p.split("=")[0] for p in products for a, b in ((24, 40), (40, 24)))
    want = np.asarray(x, np.float64) @ np.asarray(q["w"].dequantize(), np.float64)
    np.testing.assert_allclose(jax.jit(jq.quantized(linear))(q, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", [Format("int8"), Format("int4", 8), Format("nf4", 8)], ids=str)
@pytest.mark.parametrize("act", [jq.Activation("int8"), jq.Activation("fp8_e4m3")], ids=str)
def test_rounded_inputs_are_what_the_side_is_multiplied_with(fmt, act):
    q, x = weight(fmt, act), jnp.asarray(normal(6, 24))
    rounded = jq.ops.low_precision.round_input(x, act)
    want = np.asarray(rounded, np.float64) @ np.asarray(q["w"].dequantize(), np.float64)
    got, change = jax.jvp(lambda x: jq.quantized(linear)(q, x), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # Its derivative goes straight through the rounding; these inputs are all inside their range.
    np.testing.assert_allclose(change, jnp.ones_like(x) @ q["w"].dequantize(), rtol=1e-4, atol=1e-4)
    [ran] = jq.explain(linear, q, x)
    assert ran.fused and ran.activation == str(act) and "side of rank 2" in ran.how


def test_derivatives_of_inputs_and_of_the_side_itself():
    q, x = weight(Format("int4", 8)), jnp.asarray(normal(6, 24))
    loss = lambda side, x: jnp.sum(jq.quantized(linear)({"w": q["w"].replace(side=side)}, x) ** 2)
    by_float = lambda side, x: jnp.sum((x @ q["w"].replace(side=side).dequantize()) ** 2)
    got = jax.jit(jax.grad(loss, (0, 1)))(q["w"].side, x)
    want = jax.jit(jax.grad(by_float, (0, 1)))(q["w"].side, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_bfloat16_activations_are_rounded_once():
    q = jax.tree.map(lambda q: q.astype(jnp.bfloat16), weight(Format("int4", 8)), is_leaf=jq.is_qtensor)
    x = jnp.asarray(normal(6, 24)).astype(jnp.bfloat16)
    got = jq.quantized(linear)(q, x)
    want = np.asarray(x.astype(jnp.float32)) @ np.asarray(q["w"].dequantize().astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2**-7 * np.abs(want).max())


def test_a_leaf_of_two_uses_may_hold_one_with_a_side():
    def tied(p, t):
        return jnp.tanh(p["table"][t]) @ p["table"].T

    q = model_bank.rtn(jnp.asarray(normal(11, 8)), FORMATS[1], (-1,))
    q = q.replace(side=side_for(q, 0))
    maps = [jnp.asarray(normal(8, 8, seed=i)) for i in (3, 4)]
    p, t = {"table": PerUse(q, *maps)}, jnp.arange(6)
    w = np.asarray(q.dequantize(), np.float64)
    want = np.tanh((w @ maps[0])[np.arange(6)]) @ (w @ maps[1]).T
    np.testing.assert_allclose(jq.quantized(tied)(p, t), want, rtol=1e-4, atol=1e-4)
