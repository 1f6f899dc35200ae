"""`quantized(apply)(q)` equals `apply(dequantize(q))` over every kind of model, and says how each read ran."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jquant as jq
from jquant.core.errors import DamagedQTensorError, JQuantError, TraceError
from jquant.core.formats import Format
from jquant.core.paths import map_with_paths
from tests import model_bank
from tests.model_bank import (
    BANK,
    FORMATS,
    MODELS,
    Model,
    assert_same,
    dequantize,
    jitted,
    params,
    plain,
    quantized,
    quick,
)

# In the fast tests every model meets one format, in turns; with --slow every one.
PAIRS = [
    pytest.param(model, fmt, marks=() if i % len(FORMATS) == k else pytest.mark.slow, id=f"{model}-{fmt}")
    for i, model in enumerate(MODELS)
    for k, fmt in enumerate(FORMATS)
]
ONE_FORMAT = [pytest.param(m, FORMATS[i % len(FORMATS)], id=repr(m)) for i, m in enumerate(MODELS)]




def arrays(model: Model) -> list:
    """The model's arguments; a string among them is static under jit, not an abstract value."""
    return [a if isinstance(a, str) else jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in model.args]


@pytest.mark.parametrize("model, fmt", PAIRS)
def test_equals_the_dequantized_model_under_jit(model: Model, fmt: Format):
    q = model_bank.quantize(model.name, fmt)
    want = plain(model.name)(dequantize(q), *model.args)
    assert_same(quantized(model.name)(q, *model.args), want, rtol=model.near())


@pytest.mark.parametrize("model, fmt", ONE_FORMAT)
def test_every_read_is_counted_and_those_that_can_run_on_the_codes(model: Model, fmt: Format):
    q = model_bank.quantize(model.name, fmt)
    quantized_paths = model_bank.contracted_axes(model)
    reads = jq.explain(model.apply, q, *model.args, **model.kwargs)
    assert sorted(r.path for r in reads) == sorted(s.path for s in model.sites if s.path in quantized_paths)
    assert sum(r.fused for r in reads) == model.fused, [r for r in reads if not r.fused]
    assert all(r.how for r in reads)
    # The same inside a jitted function, whose arguments are tracers.
    seen = []
    jitted(lambda q, *a, **k: seen.extend(jq.explain(model.apply, q, *a, **k)) or (), model)(q, *model.args)
    assert seen == reads


# Eager calls compile every operation on its own, so a few stand for all.
@pytest.mark.parametrize("name", ["static", "rnn", "nnx_tied", "cond_both"])
def test_equals_the_dequantized_model_when_called_plainly(name: str):
    model, q = BANK[name], model_bank.quantize(name, FORMATS[0])
    got = jq.quantized(model.apply)(q, *model.args, **model.kwargs)
    assert_same(got, model.apply(jq.dequantize(q), *model.args, **model.kwargs))


@pytest.mark.parametrize("name", ["matmul", "scan", "linen_attention", "linen_tied", "nnx_lora", "moe_einsum"])
def test_parameters_that_decode_to_bfloat16(name: str):
    model = BANK[name]
    cast = lambda w: w.astype(jnp.bfloat16) if jq.is_qtensor(w) or jnp.issubdtype(w.dtype, jnp.floating) else w
    q = jax.tree.map(cast, model_bank.quantize(name, FORMATS[1]), is_leaf=jq.is_qtensor)
    args = jax.tree.map(lambda x: cast(jnp.asarray(x)), model.args)
    assert_same(quantized(name)(q, *args), plain(name)(dequantize(q), *args), rtol=2**-6)
    assert sum(r.fused for r in jq.explain(model.apply, q, *args)) == model.fused


def test_each_leaf_may_have_its_own_format():
    def apply(p, x):
        return jnp.sin(x @ p["a"]) @ p["b"] + x @ p["c"]

    p = params(a=(8, 6), b=(6, 5), c=(8, 5))
    formats = {"a": Format("int2", 4, symmetric=False), "b": Format("fp8_e4m3"), "c": None}
    quantize = lambda path, w: w if formats[path] is None else model_bank.rtn(w, formats[path], (-2,))
    q = map_with_paths(quantize, p)
    assert_same(jq.quantized(apply)(q, model_bank.X), apply(jq.dequantize(q), model_bank.X))
    assert [(r.path, r.fused) for r in jq.explain(apply, q, model_bank.X)] == [("a", True), ("b", True)]


def test_a_tree_of_floats_runs_as_it_is():
    model = BANK["linen_attention"]
    run = quantized("linen_attention")
    assert_same(run(model.params, *model.args), plain("linen_attention")(model.params, *model.args), rtol=0)
    assert jq.explain(model.apply, model.params, *model.args) == []


# --- the float model beside it is untouched ---


@pytest.mark.parametrize("model, fmt", ONE_FORMAT)
def test_the_float_model_keeps_its_bits_in_any_order_of_calls(model: Model, fmt: Format):
    q = model_bank.quantize(model.name, fmt)
    traced = lambda: str(jax.make_jaxpr(lambda p: model.apply(p, *model.args, **model.kwargs))(model.params))
    # One jitted function for both calls: anything left in its cache, or in a helper's, would be seen.
    before, jaxpr = plain(model.name)(model.params, *model.args), traced()
    quantized(model.name)(q, *model.args)
    jax.eval_shape(jitted(jq.quantized(model.apply), model), q, *arrays(model))
    jq.find_sites(model.apply, model.params, *model.args, **model.kwargs)
    after = plain(model.name)(model.params, *model.args)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert traced() == jaxpr  # traced anew, it is the same program


def test_a_cached_helper_serves_both():
    w = params(w=(8, 6))["w"]
    q = model_bank.rtn(w, FORMATS[0], (-2,))
    apply = lambda p, x: model_bank.helper(p, x)
    before = model_bank.helper(w, model_bank.X)
    got = jq.quantized(apply)(q, model_bank.X)
    assert np.asarray(model_bank.helper(w, model_bank.X)).tobytes() == np.asarray(before).tobytes()
    assert_same(got, model_bank.helper(q.dequantize(), model_bank.X))
    assert [r.fused for r in jq.explain(apply, q, model_bank.X)] == [True]


# --- a forgotten wrapper ---


@pytest.mark.parametrize("model, fmt", ONE_FORMAT)
def test_a_forgotten_wrapper_is_right_or_a_loud_error(model: Model, fmt: Format):
    q = model_bank.quantize(model.name, fmt)
    if not model_bank.contracted_axes(model):
        pytest.skip("nothing of it is quantized")
    want = plain(model.name)(dequantize(q), *model.args)
    try:
        got = jitted(model.apply, model)(q, *model.args)
    except Exception as error:
        assert not isinstance(error, AssertionError)
        return
    # A returned parameter comes out as the QTensor that went in.
    assert_same(dequantize(got), want)


# --- inside loops ---


@pytest.mark.parametrize("name", ["stacked", "indexed", "remat"])
def test_a_stacked_leaf_is_read_a_slice_at_a_time(name: str):
    layers, width = 16, 128
    p = params(w=(layers, width, width))
    q = {"w": model_bank.rtn(p["w"], Format("int4", 32), (-2,))}
    step = lambda c, w: jnp.tanh(c @ w)
    if name == "remat":
        step = jax.checkpoint(step)

    def apply(p, x):
        if name == "indexed":
            return jax.lax.fori_loop(0, layers, lambda i, c: step(c, p["w"][i]), x)
        return jax.lax.scan(lambda c, w: (step(c, w), None), x, p["w"])[0]

    x = jnp.ones((1, width))
    whole = p["w"].nbytes
    compiled = quick(jq.quantized(apply)).lower(q, x).compile()
    # One slice in float and its codes, not the stack: a sixteenth each of 1 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4
    unwrapped = quick(lambda q, x: apply(jq.dequantize(q), x)).lower(q, x).compile()
    assert unwrapped.memory_analysis().temp_size_in_bytes >= whole  # what the test above would see otherwise
    assert [r.fused for r in jq.explain(apply, q, x)] == [True]


def test_one_scale_for_a_whole_stack():
    p = params(w=(3, 8, 8))
    q = {"w": model_bank.rtn(p["w"], Format("int8", "tensor"), (-2,))}
    assert q["w"].scale.shape == (1, 1, 1)
    apply, x = BANK["scan"].apply, model_bank.X
    assert_same(jq.quantized(apply)(q, x), apply(jq.dequantize(q), x))
    assert [r.fused for r in jq.explain(apply, q, x)] == [True]


# --- indices ---

TABLE = params(w=(7, 4), deep=(3, 7, 4), wide=(5, 200))
IDS = np.array([[0, 6, -1], [-7, 3, 3]], np.int32)
WILD = np.array([0, 6, 7, -8, 100], np.int32)

LOOKUPS = {
    "brackets": lambda w: w["w"][IDS],
    "one": lambda w: w["w"][3],
    "outside_is_nan": lambda w: jnp.take(w["w"], WILD, axis=0),
    "outside_brackets": lambda w: w["w"].at[WILD].get(mode="fill", fill_value=2.5),
    "outside_clips": lambda w: jnp.take(w["w"], WILD, axis=0, mode="clip"),
    "outside_wraps": lambda w: jnp.take(w["w"], WILD, axis=0, mode="wrap"),
    "second_axis": lambda w: jnp.take(w["deep"], IDS, axis=1),
    "second_axis_clip": lambda w: jnp.take(w["deep"], WILD, axis=-2, mode="clip"),
    "behind_a_layer": lambda w: w["deep"][1][IDS],
    "transposed_first": lambda w: w["w"].T[:, IDS],
    "small_indices": lambda w: w["w"][IDS.astype(np.int8)],
    "unsigned_indices": lambda w: jnp.take(w["w"], WILD.astype(np.uint8), axis=0, mode="clip"),
    "int8_on_a_long_axis": lambda w: jnp.take(w["wide"].T, WILD.astype(np.int8), axis=0),
    "no_indices": lambda w: w["w"][IDS[:0]],
    "cast_on_the_way": lambda w: w["w"].astype(jnp.bfloat16)[IDS],
    "two_axes": lambda w: w["deep"][IDS[0], IDS[1]],
    "along": lambda w: jnp.take_along_axis(w["w"][:2], IDS % 4, axis=1),
}
# What no single axis looks up is read from the floats.
NOT_FUSED = {"two_axes", "along", "one"}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_have_numpys_and_jaxs_meaning(name: str):
    fn = LOOKUPS[name]
    q = {
        "w": model_bank.rtn(TABLE["w"], FORMATS[1], (-1,)),
        "deep": model_bank.rtn(TABLE["deep"], FORMATS[2], (-1,)),
        "wide": model_bank.rtn(TABLE["wide"], FORMATS[1], (-2,)),
    }
    got, want = quick(jq.quantized(fn))(q), quick(fn)(dequantize(q))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    assert got.dtype == want.dtype
    assert [r.fused for r in jq.explain(fn, q)] in ([name not in NOT_FUSED], [])


SLICES = {
    "index_static": lambda w, i: w[2],
    "index_traced": lambda w, i: w[i],
    "index_back": lambda w, i: w[i - 3],
    "dynamic_in_dim": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 2, axis=0),
    "dynamic_clamps_above": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i + 100, 2, axis=0),
    "dynamic_clamps_below": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i - 50, 2, 0, allow_negative_indices=False),
    "dynamic_negative": lambda w, i: jax.lax.dynamic_index_in_dim(w, i - 2, axis=0, keepdims=False),
    "dynamic_two_axes": lambda w, i: jax.lax.dynamic_slice(w, (i, 0, i), (1, 8, 2)),
    "small_index": lambda w, i: jax.lax.dynamic_slice_in_dim(w, i.astype(jnp.int8), 1, axis=2),
    "slice_of_slice": lambda w, i: w[1:][i - 1:][0] if isinstance(i, int) else w[1:4][i - 1],
    "last_axis": lambda w, i: w[:, :, 1:3],
    "contracted_axis": lambda w, i: w[:, 1:5],
    "unstacked": lambda w, i: jnp.unstack(w)[2],
    "unstacked_inner": lambda w, i: jnp.unstack(w, axis=-1)[1],
    "strided": lambda w, i: w[::2],
    "reversed": lambda w, i: w[::-1],
    "empty": lambda w, i: w[2:2],
}  # fmt: skip


@pytest.mark.parametrize("name", SLICES)
def test_slices_have_numpys_and_jaxs_meaning(name: str):
    fn = SLICES[name]
    w = params(w=(4, 8, 6))["w"]
    run, reference = quick(jq.quantized(fn)), quick(fn)
    for fmt in (Format("int8", "tensor"), FORMATS[2]):
        q = model_bank.rtn(w, fmt, (-2,))
        for i in (np.int32(1), np.int32(3)):
            np.testing.assert_array_equal(run(q, i), reference(dequantize(q), i))


def test_the_slices_of_an_unstacked_leaf_run_on_their_codes():
    fn = lambda p, x: sum(x @ w for w in jnp.unstack(p["w"]))
    p, x = params(w=(3, 8, 6)), jnp.ones((2, 8))
    q = jq.quantize(fn, p, FORMATS[1], jq.rtn(), [x])
    assert [r.fused for r in jq.explain(fn, q, x)] == [True] * 3
    np.testing.assert_allclose(jq.quantized(fn)(q, x), fn(dequantize(q), x), rtol=1e-5)


# --- numbers of other kinds ---


def test_sixty_four_bits():
    with jax.enable_x64(True):
        w = jnp.asarray(model_bank.normal(8, 6, dtype=np.float64))
        q = {"w": model_bank.rtn(w, FORMATS[1], (-2,)), "e": model_bank.rtn(w, FORMATS[1], (-1,))}
        assert q["w"].dtype == np.float64

        def apply(p, x, ids):
            y = jax.lax.cond(ids[0] > 0, lambda: x @ p["w"], lambda: 0 * x @ p["w"])
            return y + p["e"][ids].sum(), jax.lax.fori_loop(0, 3, lambda i, c: c + p["e"][i].sum(), 0.0)

        x, ids = model_bank.normal(3, 8, dtype=np.float64), np.array([1, -2, 3])
        assert_same(quick(jq.quantized(apply))(q, x, ids), quick(apply)(jq.dequantize(q), x, ids), rtol=1e-14)


def test_complex_and_integer_neighbours():
    w = params(w=(8, 6))["w"]
    p = {"w": model_bank.rtn(w, FORMATS[0], (-2,)), "c": jax.lax.complex(w[:, :2], w[:, 2:4]), "n": jnp.arange(6)}

    def apply(p, x):
        y = x @ p["w"]
        return x.astype(jnp.complex64) @ p["c"], jnp.fft.fft(y), y * p["n"].astype(jnp.float32)

    run = lambda p, x: apply(p, x)
    assert_same(quick(jq.quantized(run))(p, model_bank.X), quick(run)(jq.dequantize(p), model_bank.X), rtol=1e-5)


# --- errors ---


def test_a_branch_for_another_platform_is_not_lowered():
    """As in the model itself: a kernel for NVIDIA GPUs has no meaning on a CPU."""

    def kernel(x, w):
        return pl.pallas_call(lambda i, o: o.__setitem__(..., i[...]), out_shape=x)(x) @ w

    def model(p, x):
        return jax.lax.platform_dependent(x, p["w"], cuda=kernel, default=lambda x, w: x @ w)

    p, x = params(w=(8, 4)), jnp.asarray(model_bank.normal(3, 8))
    q = {"w": model_bank.rtn(p["w"], jq.INT8, (-2,))}
    want = x @ jq.dequantize(q)["w"]
    np.testing.assert_allclose(jax.jit(jq.quantized(model))(q, x), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jq.quantized(model)(q, x), want, rtol=1e-5, atol=1e-5)


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TraceError, match="block/act: .* not str"):
        jq.quantized(lambda p, x: x)({"block": {"act": "relu"}}, model_bank.X)
    with pytest.raises(TraceError, match="block/act: .* not str"):
        jq.explain(lambda p, x: x, {"block": {"act": "relu"}}, model_bank.X)


@pytest.mark.parametrize(
    "damage",
    [
        lambda q: jax.tree.map(lambda a: a.astype(jnp.bfloat16), q),
        lambda q: q.replace(codes=tuple(c[..., :4] for c in q.codes)),
        lambda q: q.replace(scale=q.scale[..., :-1]),
        lambda q: q.replace(codes=tuple(c.ravel() for c in q.codes)),
    ],
    ids=["cast", "codes_cut", "scale_cut", "flat"],
)
def test_a_damaged_leaf_is_an_error_that_names_it(damage):
    q = {"layer": {"w": damage(model_bank.rtn(params(w=(16, 6))["w"], Format("int4", 4), (-2,)))}}
    apply = lambda p, x: x @ p["layer"]["w"]
    for run in (jq.quantized(apply), quick(jq.quantized(apply)), lambda q, x: jq.explain(apply, q, x)):
        with pytest.raises(DamagedQTensorError, match="layer/w"):
            run(q, model_bank.normal(2, 16))
    assert issubclass(DamagedQTensorError, JQuantError)


def test_the_models_own_error_comes_through():
    def apply(p, x):
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        jq.quantized(apply)(params(w=(2, 2)), model_bank.X)
