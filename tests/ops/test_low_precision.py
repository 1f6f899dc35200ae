"""Products of two rounded operands: the numbers that their codes stand for, and the program they are lowered to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.core.activation import Activation, encode_input
from jquant.core.formats import BlockParams, Format, compute_params, decode
from jquant.core.qtensor import QTensor, encode_array
from jquant.ops import low_precision as lp
from tests.model_bank import quick

BF16 = "bfloat16"
WEIGHTS = [
    Format("int8"), Format("int8", symmetric=False), Format("int8", "tensor"), Format("int4", 16, scale_dtype=BF16),
    Format("int4", 7, symmetric=False, scale_dtype=BF16), Format("int5", 16, symmetric=False), Format("int2"),
    Format("fp8_e4m3"), Format("fp8_e5m2", 8), Format("nf4", 16),
]  # fmt: skip
INPUTS = [
    Activation(), Activation(symmetric=False), Activation(block="tensor"), Activation("int4"), Activation("fp8_e4m3"),
    Activation("fp8_e5m2", "tensor"), Activation("int8", "tensor", False, "max"),
    Activation("fp8_e4m3", "tensor", range="mse"),
]  # fmt: skip


def weight(fmt: Format, act: Activation, shape=(5, 40), seed=0, contracted=(-1,), batch=0) -> QTensor:
    w = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    params = None
    if act.static:
        lead = shape[:batch] + (1,) * (len(shape) - 1 - batch)
        zero = None if act.symmetric else jnp.full((*lead, 1), 100, jnp.uint8)
        params = BlockParams(jnp.full((*lead, 1), 0.02), zero)
    scales = compute_params(w.reshape(*shape[:-1], shape[-1]), fmt, stacked=batch)
    return encode_array(w, scales, fmt, contracted).replace(activation=act, activation_params=params)


def inputs(*shape: int, seed: int = 1) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x[..., 0, :] = 0  # a row of zeros has no scale
    return jnp.asarray(x)


def decoded(x: jax.Array, q: QTensor, batch=()) -> tuple[np.ndarray, np.ndarray]:
    codes, params = encode_input(x, q.activation, lp.static_params(q, batch))
    return np.asarray(decode(codes, params, q.activation.format), np.float64), np.asarray(q.rows(), np.float64)


def assert_close(got, want, scale):
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=3e-6 * scale)


# Scales that several rows share, that are no plain floats, that have scales themselves; zero points between codes.
SHARED = [
    Format("int8", (2, 7), symmetric=False), Format("int4", (2, 10)),
    Format("fp8_e4m3", 8, scale_dtype="float8_e8m0fnu"),
    Format("int4", 8, scale_dtype="float8_e4m3fn", outer_block="tensor"),
    Format("int3", 5, symmetric=False, scale_dtype="uint8", outer_block=8),
    Format("int4", 8, symmetric=False, zero_dtype=BF16), Format("fp4_e2m1", 8, scale_dtype="float8_e4m3fn"),
]  # fmt: skip


@settings(max_examples=16)
@given(st.sampled_from(WEIGHTS + SHARED), st.sampled_from(INPUTS), st.sampled_from([1, 2, 6]), st.integers(0, 99))
def test_a_product_is_that_of_the_decoded_operands(fmt, act, tokens, seed):
    q, x = weight(fmt, act, seed=seed), inputs(tokens, 40, seed=seed + 1)
    left, right = decoded(x, q)
    names = []
    out = quick(lambda x, q: names.append(lp.dot(x, q)) or names[0][0])(x, q)
    assert_close(out, left @ right.T, np.abs(left).sum(-1).max() * np.abs(right).max() + 1)
    kind = lp.product_kind(act, fmt, 40)
    assert names[0][1].text.startswith({"int": "int8 x int8", "fp8": "fp8 x fp8", "float": "input rounded"}[kind])


@settings(max_examples=12)
@given(st.sampled_from(WEIGHTS[:-1] + SHARED), st.sampled_from(INPUTS), st.sampled_from([1, 3]))
def test_what_other_devices_run_is_the_same_product(fmt, act, tokens):
    kind = lp.product_kind(act, fmt, 40)
    if kind == "float":
        return
    q, x = weight(fmt, act), inputs(tokens, 40)
    codes, params = encode_input(x, act, lp.static_params(q))
    native = quick(lambda c, z, q: lp._native(lp.KINDS[kind], c, z, q, ()))(codes, params.zero_point, q)
    here = quick(lambda c, z, q: lp._on_cpu(lp.KINDS[kind], c, z, q, ()))(codes, params.zero_point, q)
    np.testing.assert_allclose(native, here, rtol=2e-6, atol=2e-6 * float(jnp.abs(here).max() + 1e-30))
    if kind == "int" and fmt.group_size is None:
        np.testing.assert_array_equal(native, here)  # one exact sum


@pytest.mark.parametrize(("fmt", "act"), [*[(f, INPUTS[1]) for f in SHARED], (SHARED[1], INPUTS[4])], ids=str)
def test_shared_scales_and_zero_points_between_codes(fmt, act):
    q, x = weight(fmt, act), inputs(3, 40)
    left, right = decoded(x, q)
    want, kind = left @ right.T, lp.product_kind(act, fmt, 40)
    assert kind == ("float" if fmt.zero_dtype != "uint8" or fmt.element == "fp4_e2m1" else kind)
    codes, params = encode_input(x, act)
    both = [lp._decoded] if kind == "float" else [lambda *a: lp._native(lp.KINDS[kind], *a), lp._decoded]
    for how in both:
        out = quick(lambda c, z, q, how=how: how(c, z, q, ()))(codes, params.zero_point, q)
        assert_close(out * params.scale, want, np.abs(left).sum(-1).max() * np.abs(right).max() + 1)


@pytest.mark.parametrize("fmt", [WEIGHTS[0], WEIGHTS[2], WEIGHTS[4], WEIGHTS[7]], ids=str)
@pytest.mark.parametrize("act", [INPUTS[0], INPUTS[4], INPUTS[6]], ids=str)
def test_experts(fmt, act):
    """Batch axes need not be in front in the weight."""
    q, x = weight(fmt, act, (3, 5, 24), batch=1), inputs(3, 4, 24)
    moved = q.replace(
        codes=tuple(jnp.moveaxis(c, 0, 1) for c in q.codes), scale=jnp.moveaxis(q.scale, 0, 1),
        zero_point=None if q.zero_point is None else jnp.moveaxis(q.zero_point, 0, 1),
        activation_params=jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), q.activation_params),
    )  # fmt: skip
    left, right = decoded(x, q, (-3,))
    want = np.einsum("etn,emn->etm", left, right)
    for weights, axis in ((q, -3), (moved, -2)):
        out = quick(lambda x, q, axis=axis: lp.dot(x, q, batch=(axis,))[0])(x, weights)
        assert_close(out, want, 30)


def test_extreme_codes_do_not_overflow():
    n = 4096
    act, fmt = Activation(symmetric=False), Format("int8", symmetric=False)
    x, w = jnp.full((2, n), 3.0), jnp.full((3, n), -7.0)
    q = encode_array(w, compute_params(w, fmt), fmt, (-1,)).replace(activation=act)
    np.testing.assert_allclose(quick(lambda x, q: lp.dot(x, q)[0])(x, q), -21.0 * n, rtol=1e-5)
    assert lp.product_kind(act, fmt, n) == "int"
    assert lp.product_kind(act, fmt, 2**31 // 255**2 + 1) == "float"  # the sum would not fit in int32


def test_all_integers_of_a_format_become_their_int8():
    for bits in range(2, 9):
        codes = jnp.arange(2**bits, dtype=jnp.uint8)
        symmetric = lp.integers(codes, None, Format(f"int{bits}"))
        half = 2 ** (bits - 1)
        np.testing.assert_array_equal(symmetric.codes, (np.arange(2**bits) + half) % 2**bits - half)
        zero = jnp.full((1,), 3, jnp.uint8)
        shifted = lp.integers(codes, zero, Format(f"int{bits}", symmetric=False))
        np.testing.assert_array_equal(shifted.codes.astype(jnp.int32) - shifted.zero, np.arange(2**bits) - 3)


def test_nan_and_infinity_stay_visible():
    x = jnp.asarray([[1.0, jnp.nan, 2.0, 0.5], [1.0, jnp.inf, 2.0, 0.5], [1.0, 2.0, 2.0, 0.5]])
    for fmt, act in ((WEIGHTS[0], INPUTS[0]), (WEIGHTS[7], INPUTS[4])):
        out = lp.dot(x, weight(fmt, act, (5, 4)))[0]
        assert not np.any(np.isfinite(out[:2])) and np.all(np.isfinite(out[2]))


# --- what it is lowered to ---


def lowered(fmt: Format, act: Activation, platform: str, tokens: int = 6) -> list[tuple[str, str, str]]:
    """The element types of every dot_general: left, right, result. Without kernels, which test_gpu_codes counts."""
    q, x = weight(fmt, act, (5, 64)), inputs(tokens, 64)
    fn = jax.jit(lambda x, q: lp.dot(x, q, kernels="never")[0])
    text = fn.trace(x, q).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", text)
    return [tuple(t.split("x")[-1] for t in types) for types in found]


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("fmt", [*WEIGHTS[:3], Format("int4"), Format("int3", symmetric=False)], ids=str)
@pytest.mark.parametrize("act", [INPUTS[0], INPUTS[1], INPUTS[6]], ids=str)
def test_integers_are_multiplied_as_int8(fmt, act, platform):
    assert lowered(fmt, act, platform) == [("i8", "i8", "i32")]
    assert lowered(fmt, act, platform, tokens=1) == [("i8", "i8", "i32")]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_groups_are_multiplied_as_int8_group_by_group(platform):
    assert lowered(Format("int4", 16), Activation(), platform) == [("i8", "i8", "i32")]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_fp8_is_multiplied_as_fp8(platform):
    assert lowered(Format("fp8_e4m3"), Activation("fp8_e4m3"), platform) == [("f8E4M3FN", "f8E4M3FN", "f32")]
    assert lowered(Format("fp8_e4m3"), Activation("fp8_e5m2"), platform) == [("f8E5M2", "f8E4M3FN", "f32")]
    assert lowered(Format("int4"), Activation("fp8_e4m3"), platform) == [("f8E4M3FN", "f8E4M3FN", "f32")]


def test_on_a_cpu_fp8_is_bfloat16_and_groups_are_floats():
    assert lowered(Format("fp8_e4m3"), Activation("fp8_e4m3"), "cpu") == [("bf16", "bf16", "f32")]
    assert set(lowered(Format("int4", 16), Activation(), "cpu")) == {("f32", "f32", "f32")}


# --- rounding with a derivative ---


@pytest.mark.parametrize("act", INPUTS, ids=str)
def test_the_derivative_goes_straight_through_inside_the_range(act):
    static = None
    if act.static:
        static = BlockParams(jnp.full((1, 1), 0.01), None if act.symmetric else jnp.full((1, 1), 100, jnp.uint8))
    x = jnp.asarray([[-700.0, -1.005, -1.02, 0.0, 0.3, 1.2, 1.6, 700.0]])
    weights = jnp.arange(1.0, 9.0)
    grad = lambda clip: jax.grad(lambda x: jnp.sum(lp.round_input(x, act, static, clip) * weights))(x)[0]
    np.testing.assert_array_equal(grad(False), weights)
    value = lp.round_input(x, act, static)
    if static is None:
        np.testing.assert_array_equal(grad(True), weights)
    else:
        moved = np.abs(value - x)[0] > 0.01 * (1 if act.element == "int8" else 50)  # more than a step
        assert 2 <= np.sum(moved) <= 5
        np.testing.assert_array_equal(grad(True), np.where(moved, 0, weights))
    codes, params = encode_input(x, act, static)
    np.testing.assert_array_equal(value, decode(codes, params, act.format))
