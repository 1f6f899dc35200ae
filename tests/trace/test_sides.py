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


def side_for(q: jq.QTensor, stacked: int, rank: int = 2, takes: bool = False) -> Side:
    """A random side for a leaf whose first `stacked` axes are solved apart."""
    kept = q.codes[0].shape[:-1]
    lead = [s if i < stacked else 1 for i, s in enumerate(kept)]
    parts = [normal(*kept, rank, seed=1), *(normal(*lead, rank, q.row_length, seed=i) for i in range(2, 3 + takes))]
    return Side(*(jnp.asarray(0.2 * a).astype(q.dtype) for a in parts))


def with_sides(model: Model, fmt: Format, takes: bool):
    axes = model_bank.contracted_axes(model)
    add = lambda path, q: q.replace(side=side_for(q, axes[path][1], takes=takes)) if path in axes else q
    return map_with_paths(add, model_bank.quantize(model.name, fmt))


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("model, fmt", PAIRS)
def test_equals_the_dequantized_model_and_runs_as_fused_as_without(model: Model, fmt: Format, takes: bool):
    q = with_sides(model, fmt, takes)
    want = plain(model.name)(dequantize(q), *model.args)
    # Operands in bfloat16 are rounded one by one here, and their sum there.
    in_16_bits = "bf16" in str(plain(model.name).trace(dequantize(q), *model.args).jaxpr)
    assert_same(quantized(model.name)(q, *model.args), want, rtol=2**-7 if in_16_bits else 1e-5)
    reads = jq.explain(model.apply, q, *model.args, **model.kwargs)
    assert sum(r.fused for r in reads) == model.fused
    # There `side_for` has B differ along an axis that is not the experts': what it takes has no place in the input.
    beside = not (takes and model.name == "experts_odd_order")
    assert all(("side of rank 2" in r.how) == (beside and r.fused and r.kind != "lookup") for r in reads)


def linear(p, x):
    return x @ p["w"]


def weight(fmt: Format, act: jq.Activation | None = None, takes: bool = False) -> dict:
    q = model_bank.rtn(jnp.asarray(normal(24, 40)), fmt, (-2,)).replace(activation=act)
    return {"w": q.replace(side=side_for(q, 0, takes=takes))}


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("fmt", [Format("int4", 8), Format("int8"), Format("int3", 8, False)], ids=str)
def test_no_array_of_the_side_is_made(fmt, tokens, takes):
    q, x = weight(fmt, takes=takes), jnp.asarray(normal(tokens, 24))
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


@pytest.mark.parametrize("fmt", [Format("int8"), Format("int4", 8), Format("nf4", 8)], ids=str)
@pytest.mark.parametrize("act", [jq.Activation("int8"), jq.Activation("fp8_e4m3")], ids=str)
def test_of_an_input_only_what_is_left_is_rounded(fmt, act):
    q, x = weight(fmt, act, takes=True), jnp.asarray(normal(6, 24))
    left, right, taken = (np.asarray(a, np.float64) for a in q["w"].side)
    t = np.asarray(x, np.float64) @ right[0].T
    rest = jnp.asarray(x - t @ taken[0], jnp.float32)
    codes = np.asarray(q["w"].replace(side=None, activation=None).dequantize(), np.float64)
    want = np.asarray(jq.ops.low_precision.round_input(rest, act), np.float64) @ codes + t @ left.T
    run = lambda x: jq.quantized(linear)(q, x)
    # A number at the middle between two codes may go either way: its rest is calculated in another order here.
    np.testing.assert_allclose(run(x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    change = jax.jvp(run, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(change, jnp.ones_like(x) @ q["w"].dequantize(), rtol=1e-4, atol=1e-4)
    [ran] = jq.explain(linear, q, x)
    assert ran.fused and ran.activation == str(act) and "taken out of the input, as three thin products" in ran.how


def test_a_side_that_differs_along_an_axis_which_the_input_lacks_is_read_with_its_codes():
    apply = lambda p, x: jnp.einsum("tn,enm->etm", x, p["w"])
    q = model_bank.rtn(jnp.asarray(normal(3, 24, 8)), Format("int8"), (-2,), 1)
    q = q.replace(side=side_for(q, 1, takes=True))
    x = jnp.asarray(normal(6, 24))
    assert_same(jax.jit(jq.quantized(apply))({"w": q}, x), apply({"w": q.dequantize()}, x), rtol=1e-5)
    act = jq.Activation("int8")
    want = apply({"w": q.dequantize()}, jq.ops.low_precision.round_input(x, act))
    assert_same(jax.jit(jq.quantized(apply))({"w": q.replace(activation=act)}, x), want, rtol=1e-5)


def test_ragged_rows_are_taken_apart_by_the_factors_of_their_expert():
    apply = lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)
    act, sizes, x = jq.Activation("fp8_e4m3"), jnp.array([2, 0, 4]), jnp.asarray(normal(6, 24))
    q = model_bank.rtn(jnp.asarray(normal(3, 24, 8)), Format("int8"), (-2,), 1).replace(activation=act)
    q = q.replace(side=side_for(q, 1, takes=True))
    want = []
    for i, e in enumerate([0, 0, 2, 2, 2, 2]):
        one = jax.tree.map(lambda a, e=e: a[e], q).replace(contracted=(-2,))
        want.append(jax.jit(jq.quantized(linear))({"w": one}, x[i : i + 1])[0])
    got = jax.jit(jq.quantized(apply))({"w": q}, x, sizes)
    assert_same(got, jnp.stack(want), rtol=1e-5)
    [ran] = jq.explain(apply, {"w": q}, x, sizes)
    assert ran.fused and "taken out of the input" in ran.how


@pytest.mark.parametrize("takes", [False, True])
def test_derivatives_of_inputs_and_of_the_side_itself(takes):
    q, x = weight(Format("int4", 8), takes=takes), jnp.asarray(normal(6, 24))
    loss = lambda side, x: jnp.sum(jq.quantized(linear)({"w": q["w"].replace(side=side)}, x) ** 2)
    by_float = lambda side, x: jnp.sum((x @ q["w"].replace(side=side).dequantize()) ** 2)
    got = jax.jit(jax.grad(loss, (0, 1)))(q["w"].side, x)
    want = jax.jit(jax.grad(by_float, (0, 1)))(q["w"].side, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@pytest.mark.parametrize("takes", [False, True])
def test_bfloat16_activations_are_rounded_once(takes):
    cast = lambda q: q.astype(jnp.bfloat16)
    q = jax.tree.map(cast, weight(Format("int4", 8), takes=takes), is_leaf=jq.is_qtensor)
    x = jnp.asarray(normal(6, 24)).astype(jnp.bfloat16)
    got = jq.quantized(linear)(q, x)
    want = np.asarray(x.astype(jnp.float32)) @ np.asarray(q["w"].dequantize().astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize("takes", [False, True])
def test_a_leaf_of_two_uses_may_hold_one_with_a_side(takes):
    def tied(p, t):
        return jnp.tanh(p["table"][t]) @ p["table"].T

    q = model_bank.rtn(jnp.asarray(normal(11, 8)), FORMATS[1], (-1,))
    q = q.replace(side=side_for(q, 0, takes=takes))
    maps = [jnp.asarray(normal(8, 8, seed=i)) for i in (3, 4)]
    p, t = {"table": PerUse(q, *maps)}, jnp.arange(6)
    w = np.asarray(q.dequantize(), np.float64)
    want = np.tanh((w @ maps[0])[np.arange(6)]) @ (w @ maps[1]).T
    np.testing.assert_allclose(jq.quantized(tied)(p, t), want, rtol=1e-4, atol=1e-4)
