"""Inputs rounded by a policy: which reads round, what comes out, over every kind of model; static ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.activation import Activation, Policy, encode_input
from jquant.core.errors import JQuantError, RecipeError, TraceError
from jquant.core.formats import BlockParams, Format, decode
from tests import model_bank
from tests.model_bank import BANK, MODELS, Model, X, assert_same, jitted, normal, params, quick

ASYMMETRIC = Policy(Format("int8", symmetric=False), Activation("int8", "tensor", symmetric=False))
POLICIES = [jq.W8A8, Policy(Format("int4", 5), Activation()), jq.FP8, ASYMMETRIC]
# A literal's product, a table of one row and the like: nothing is quantized there.
PAIRS = [pytest.param(m, POLICIES[i % 4], id=repr(m)) for i, m in enumerate(MODELS) if model_bank.contracted_axes(m)]
PRODUCTS = ("dot", "conv", "ragged_dot")


def with_policy(model: Model, policy: Policy):
    """The model's parameters quantized, and its products' inputs rounded."""
    looked_up = {s.path for s in model.sites} - {s.path for s in model.sites if s.kind in PRODUCTS}
    rounds = lambda path, leaf: jq.is_qtensor(leaf) and path not in looked_up
    set_one = lambda path, leaf: leaf.replace(activation=policy.activation) if rounds(path, leaf) else leaf
    return jq.core.paths.map_with_paths(set_one, model_bank.quantize(model.name, policy.weight))


@pytest.mark.parametrize("model, policy", PAIRS)
def test_every_product_rounds_its_input_and_nothing_else(model: Model, policy: Policy):
    q = with_policy(model, policy)
    reads = jq.explain(model.apply, q, *model.args, **model.kwargs)
    sites = [s for s in model.sites if s.kind in PRODUCTS]
    for read in reads:
        whole = read.kind in PRODUCTS and "contracts" not in read.how
        assert read.activation == (str(policy.activation) if whole else ""), read
    assert sum(r.fused for r in reads) == model.fused
    assert bool(sites) == any(r.activation for r in reads)


SOME = ["transposed", "linen_attention", "linen_conv1d", "ragged_dot", "moe_einsum", "scan", "linen_tied", "nnx_tied"]


@pytest.mark.parametrize("name", SOME)
def test_rounding_to_eight_bits_changes_little(name: str):
    model = BANK[name]
    q = with_policy(model, jq.W8A8)
    got = jitted(jq.quantized(model.apply), model)(q, *model.args)
    unrounded = model_bank.quantized(name)(model_bank.quantize(name, jq.INT8), *model.args)
    assert_same(got, unrounded, rtol=0.03)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(unrounded), strict=True))


def rounded(x: jax.Array, act: Activation) -> jax.Array:
    codes, found = encode_input(x, act)
    return decode(codes, found, act.format)


def test_a_token_is_what_one_product_contracts():
    """A DenseGeneral that contracts two axes, the batch in between."""
    apply = lambda p, x: jnp.einsum("hbd,hdo->bo", x, p["w"])
    w, x = params(w=(3, 4, 5))["w"], jnp.asarray(normal(3, 7, 4))
    q = {"w": model_bank.rtn(w, jq.INT8, (-3, -2)).replace(activation=Activation())}
    tokens = rounded(x.transpose(1, 0, 2).reshape(7, 12), Activation())
    want = tokens @ q["w"].dequantize().reshape(12, 5)
    assert_same(quick(jq.quantized(apply))(q, x), want)


@pytest.mark.parametrize("block", ["token", "tensor"])
def test_a_token_of_a_convolution_is_a_place(block: str):
    model, act = BANK["linen_conv2d_strided"], Activation(block=block)
    q = with_policy(model, Policy(jq.INT8, act))
    (x,) = model.args
    rows = rounded(jnp.asarray(x).reshape(-1, x.shape[-1]), act).reshape(x.shape)
    got = jitted(jq.quantized(model.apply), model)(q, x)
    plain = jax.tree.map(lambda l: l.dequantize() if jq.is_qtensor(l) else l, q, is_leaf=jq.is_qtensor)
    assert_same(got, model_bank.plain(model.name)(plain, rows))
    [read] = [r for r in jq.explain(model.apply, q, x) if r.kind == "conv"]
    assert not read.fused and read.activation and "dequantized" in read.how


def test_bfloat16():
    cast = lambda x: x.astype(jnp.bfloat16)
    q = {"w": model_bank.rtn(cast(params(w=(8, 6))["w"]), jq.INT8, (-2,)).replace(activation=Activation())}
    apply = lambda p, x: x @ p["w"]
    got = quick(jq.quantized(apply))(q, cast(jnp.asarray(X)))
    assert got.dtype == jnp.bfloat16
    want = rounded(cast(jnp.asarray(X)).reshape(-1, 8), Activation()) @ q["w"].dequantize(jnp.float32)
    assert_same(got.astype(jnp.float32).reshape(-1, 6), want, rtol=2**-8)


def test_vmap_rounds_each_example_by_itself():
    q = {"w": model_bank.rtn(params(w=(8, 6))["w"], jq.INT8, (-2,)).replace(activation=Activation(block="tensor"))}
    run = jq.quantized(lambda p, x: x @ p["w"])
    x = jnp.asarray(normal(3, 4, 8)) * jnp.asarray([1.0, 100.0, 0.01])[:, None, None]
    assert_same(quick(jax.vmap(run, (None, 0)))(q, x), jnp.stack([quick(run)(q, row) for row in x]), rtol=1e-6)


# --- a forgotten wrapper ---


@pytest.mark.parametrize(
    "name", ["matmul", "scan", "linen_attention", "linen_tied", "nnx_tied", "moe_einsum", "checkpoint"]
)
def test_a_forgotten_wrapper_is_a_loud_error(name: str):
    model = BANK[name]
    q = with_policy(model, jq.W8A8)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - some layers refuse what is no array by themselves
        jitted(model.apply, model)(q, *model.args)
    assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize(
    "read", [jnp.asarray, lambda q: jnp.ones((2, 8)) @ q, lambda q: q[0], list, np.asarray, lambda q: jnp.sum(q)]
)
def test_a_read_as_an_array_names_the_way_out(read):
    q = model_bank.rtn(params(w=(8, 6))["w"], jq.INT8, (-2,)).replace(activation=Activation())
    with pytest.raises(TraceError, match=r"int8\+int8.*jquant.quantized"):
        read(q)
    assert q.dequantize().shape == (8, 6)  # of the weight alone


# --- static ranges ---

STATIC = [Activation("int8", "tensor", False, "max"), Activation("int8", "tensor", True, "mse"),
          Activation("fp8_e4m3", "tensor", range="percentile", percentile=99.0)]  # fmt: skip


def apply(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def one_entry(act: Activation, x) -> BlockParams:
    """The static scale of numbers, by a QTensor's own quantization."""
    q = jq.quantize(lambda p, x: x @ p["w"], params(w=(8, 2)), Policy(jq.INT8, act), jq.rtn(), [x])["w"]
    return q.activation_params


@pytest.mark.parametrize("act", STATIC, ids=str)
def test_a_static_range_is_that_of_all_batches(act: Activation):
    batches = [jnp.asarray(normal(5, 8, seed=i)) * (i + 1) for i in range(3)]
    q = jq.quantize(apply, params(a=(8, 6), b=(6, 3)), Policy(jq.INT8, act), jq.rtn(), batches)
    assert q["a"].activation_params.scale.shape == (1, 1)
    assert_same(q["a"].activation_params, one_entry(act, jnp.concatenate(batches)))
    hidden = jnp.tanh(jnp.concatenate(batches) @ q["a"].dequantize())  # the weights that run, their inputs unrounded
    low, high = float(hidden.min()), float(hidden.max())
    if act.range == "max":
        np.testing.assert_allclose(q["b"].activation_params.scale, (high - low) / 255, rtol=1e-5)
        assert q["b"].activation_params.zero_point.item() == round(-low / ((high - low) / 255))
    # Larger numbers at run time change nothing: the range is fixed.
    run = quick(jq.quantized(lambda p, x: x @ p["a"]))
    one = jnp.zeros((1, 8)).at[0, 0].set(1e4)
    np.testing.assert_array_equal(run({"a": q["a"]}, one), run({"a": q["a"]}, one * 10))


def test_layers_and_experts_have_ranges_of_their_own():
    layers = BANK["scan"]
    x = jnp.asarray(X) * 5
    q = jq.quantize(layers.apply, layers.params, jq.W8A8_STATIC, jq.rtn(), [x])
    [w] = [leaf for leaf in jax.tree.leaves(q, is_leaf=jq.is_qtensor) if jq.is_qtensor(leaf)]
    assert w.activation_params.scale.shape == (w.shape[0], 1, 1)
    assert len(set(w.activation_params.scale.ravel().tolist())) == w.shape[0] > 1

    def experts(p, x):
        return jnp.einsum("etn,enm->etm", x, p["w"])

    x = jnp.asarray(normal(3, 5, 8)) * jnp.asarray([1.0, 10.0, 0.1])[:, None, None]
    q = jq.quantize(experts, params(w=(3, 8, 6)), jq.W8A8_STATIC, jq.rtn(), [x])
    assert q["w"].activation_params.scale.shape == (3, 1, 1)
    np.testing.assert_allclose(
        q["w"].activation_params.scale.ravel(), (jnp.max(x, (1, 2)) - jnp.min(x, (1, 2))) / 255, rtol=1e-5
    )
    got, exact = quick(jq.quantized(experts))(q, x), experts(jq.dequantize(q), x)
    for e in range(3):  # no expert pays for another's range
        assert_same(got[e] / jnp.max(jnp.abs(exact[e])), exact[e] / jnp.max(jnp.abs(exact[e])), rtol=0.03)


def test_ragged_tokens_have_the_range_of_their_expert():
    model = BANK["ragged_dot"]
    x, sizes = model.args[0], np.array([2, 4, 1], np.int32)
    x = jnp.asarray(x) * jnp.linspace(0.1, 5, 7)[:, None]
    q = jq.quantize(model.apply, model.params, {"w": jq.W8A8_STATIC, "*": None}, jq.rtn(), [(x, sizes)])
    got = quick(jq.quantized(model.apply))(q, x, sizes)
    assert_same(got, model.apply(jq.dequantize(q), x, sizes), rtol=0.03)
    assert len(set(q["w"].activation_params.scale.ravel().tolist())) == 3


def test_a_range_that_was_never_observed_names_the_site():
    model = BANK["ragged_dot"]
    x, sizes = model.args[0], np.array([4, 0, 3], np.int32)
    with pytest.raises(RecipeError, match=r"^w: no calibration token reached 1 of its .* number 1.*int8-max-asym"):
        jq.quantize(model.apply, model.params, {"w": jq.W8A8_STATIC, "*": None}, jq.rtn(), [(x, sizes)])
    grouped = BANK["linen_conv_grouped"]
    with pytest.raises(RecipeError, match="params/kernel"):
        jq.quantize(grouped.apply, grouped.params, jq.W8A8_STATIC, jq.rtn(), [grouped.args[0]])
    with pytest.raises(JQuantError, match="input of a .*needs calibration data"):
        shape = jax.ShapeDtypeStruct((2, 8), np.float32)
        jq.quantize(apply, params(a=(8, 6), b=(6, 3)), jq.W8A8_STATIC, jq.rtn(), [shape])


def test_a_looked_up_table_has_no_input():
    q = jq.quantize(lambda p, i: p["t"][i], params(t=(7, 4)), jq.W8A8, jq.rtn(), [np.arange(3)])
    assert q["t"].activation is None
    assert q["t"][2].shape == (4,)  # and reads as an array


def test_gptq_and_the_walk_take_policies():
    batches = [jnp.asarray(normal(40, 8, seed=i)) for i in range(2)]
    p = params(a=(8, 6), b=(6, 3))
    q = jq.quantize(apply, p, jq.W8A8_STATIC, jq.gptq(), batches)
    same = jq.quantize(apply, p, jq.INT8, jq.gptq(), batches)
    for name in q:
        np.testing.assert_array_equal(q[name].codes[0], same[name].codes[0])
        assert q[name].scheme == "int8+int8-max-asym"
