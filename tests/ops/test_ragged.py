"""`lax.ragged_dot` on codes: the product of each row with its expert, and how much is decoded for it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.core.activation import Activation
from jquant.core.formats import compute_params, parse_format
from jquant.core.qtensor import encode_array, to_rows
from jquant.core.side import Side
from jquant.ops import ragged
from jquant.ops.dot import dot as dense_dot
from jquant.ops.low_precision import round_input
from pallas_kernels import compat, harness
from pallas_kernels.gpus import gpu
from tests.model_bank import quick
from tests.ops.test_gpu import HOPPERS, TARGET, kernels

K, N = 40, 6


def weight(text, experts=4, n=N, k=K, contracted=-2, seed=0):
    shape = (experts, k, n) if contracted == -2 else (experts, n, k)
    w, fmt = jax.random.normal(jax.random.key(seed), shape), parse_format(text)
    params = compute_params(to_rows(w, (contracted,)), fmt, stacked=1)
    return encode_array(w, params, fmt, (contracted,))


def inputs(m, k=K, seed=1):
    return jax.random.normal(jax.random.key(seed), (m, k))


def apply(p, x, sizes):
    return jax.lax.ragged_dot(x, p, sizes)


run = jq.quantized(apply)


def exact(x, q, sizes):
    """float64, row by row."""
    out = np.zeros((len(x), q.shape[-1]))
    w, ends = np.asarray(q.dequantize(), np.float64), np.cumsum(sizes)
    for i, row in enumerate(np.asarray(x, np.float64)):
        e = np.searchsorted(ends, i, side="right")
        out[i] = row @ w[e] if e < len(ends) else 0
    return out


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * (np.abs(want).max() + 1))


FORMATS = ["int4-g16-asym", "int8-tensor", "int4-g8-dq", "fp8_e4m3-2x8", "nvfp4", "int3-g7"]


@pytest.mark.parametrize("text", FORMATS)
def test_each_row_is_multiplied_by_its_expert(text):
    q, x, sizes = weight(text), inputs(11), np.array([3, 0, 7, 1], np.int32)
    close(quick(run)(q, x, sizes), exact(x, q, sizes))


@settings(max_examples=6)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 9))
def test_any_sizes(sizes, rest, seed):
    """Experts without rows, all rows at one expert, rows behind the last expert's, blocks that end within one."""
    q, x = weight("int8", len(sizes), seed=seed), inputs(sum(sizes) + rest + 1, seed=seed)
    close(quick(run)(q, x, np.array(sizes, np.int32)), exact(x, q, sizes))


@pytest.mark.parametrize("m, experts", [(1, 64), (65, 64), (200, 2)])
def test_blocks_cover_what_they_should(m, experts):
    sizes = np.random.default_rng(0).multinomial(m, np.ones(experts) / experts).astype(np.int32)
    q, x = weight("int8", experts), inputs(m)
    assert 1 <= ragged.block_rows(m, experts) <= m
    close(quick(run)(q, x, sizes), exact(x, q, sizes))


def test_a_side_is_multiplied_too():
    q, x, sizes = weight("int4"), inputs(9), np.array([2, 0, 3, 4], np.int32)
    left, right = jax.random.normal(jax.random.key(2), (4, N, 2)), jax.random.normal(jax.random.key(3), (4, 1, 2, K))
    for side in (Side(left, right), Side(left, right[:1])):
        q = q.replace(side=side)
        close(quick(run)(q, x, sizes), exact(x, q, sizes))


def test_a_weight_that_is_read_transposed_is_not_touched_by_it():
    q, x, sizes = weight("int4-g8", contracted=-1), inputs(9), np.array([2, 0, 3, 4], np.int32)
    transposed = lambda p, x, sizes: jax.lax.ragged_dot(x, jnp.swapaxes(p, 1, 2), sizes)
    want = transposed(q.dequantize(), x, sizes)
    close(quick(jq.quantized(transposed))(q, x, sizes), np.asarray(want, np.float64))


def test_bfloat16():
    q, x, sizes = weight("int8").astype(jnp.bfloat16), inputs(9).astype(jnp.bfloat16), np.array([2, 0, 3, 4], np.int32)
    got = quick(run)(q, x, sizes)
    assert got.dtype == jnp.bfloat16
    want = exact(x, q.astype(jnp.float32), sizes)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=2**-6 * np.abs(want).max())


def test_the_derivative_is_that_of_the_decoded_product():
    q, x, sizes = weight("int8"), inputs(9), np.array([2, 0, 3, 3], np.int32)
    grad = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
    got = quick(grad(lambda x: run(q, x, sizes)))(x)
    close(got, np.asarray(quick(grad(lambda x: apply(q.dequantize(), x, sizes)))(x), np.float64))


def test_under_vmap_scan_and_remat():
    q, sizes = weight("int8", n=K), np.array([2, 0, 3, 4], np.int32)
    x = jnp.stack([inputs(9), inputs(9, seed=2)])
    for got, one in zip(quick(jax.vmap(run, (None, 0, None)))(q, x, sizes), x, strict=True):
        close(got, exact(one, q, sizes))
    body = jax.checkpoint(lambda h, _: (jnp.tanh(run(q, h, sizes)), None))
    twice = quick(lambda x: jax.lax.scan(body, x, None, length=2)[0])(x[0])
    want = np.tanh(exact(np.tanh(exact(x[0], q, sizes)), q, sizes))
    close(twice, want)


# --- what is decoded, and where ---


@pytest.mark.optimized
def test_never_are_all_experts_decoded_at_once():
    """Of 16 experts, the program has room for the floats of less than two."""
    q, x = weight("int4", 16, n=256, k=512), inputs(8, 512)
    sizes = jnp.asarray([1, 0] * 8, jnp.int32)
    memory = lambda f, q: jax.jit(f).lower(q, x, sizes).compile().memory_analysis().temp_size_in_bytes
    whole = 4 * q.size
    assert memory(run, q) < 2 * whole / 16
    assert memory(lambda q, *args: apply(q.dequantize(), *args), q) >= whole


@pytest.mark.parametrize("m", [3, 80])
def test_on_a_gpu_experts_are_kernels(m):
    q, x, sizes = weight("int4-g32", 4, 32, 64), inputs(m, 64), np.array([m, 0, 0, 0], np.int32)
    [ran] = jq.explain(apply, q, x, sizes)
    assert ran.fused and "quantized_matmul" in ran.kernel and ran.how.startswith("expert by expert")
    assert kernels(run, q, x, sizes) == 1
    close(jq.quantized(apply, kernels="require")(q, x, sizes), exact(x, q, sizes))  # outside of jit
    assert kernels(jq.quantized(apply, kernels="never"), q, x, sizes) == kernels(run, q, x, sizes, platform="cpu") == 0
    [none] = jq.explain(apply, weight("ternary"), inputs(m), sizes)
    assert none.fused and not none.kernel and "ternary" in none.reason


def test_all_experts_at_once_are_the_same_product():
    """What a GPU runs for a few rows; NaN stays in its row."""
    q, sizes = weight("int4-g8"), np.array([3, 0, 4, 1], np.int32)
    product = lambda x, q: dense_dot(x, q, batch=(-3,))[0]
    at_once = quick(partial(ragged._at_once, product))
    close(at_once(inputs(11), q, sizes), exact(inputs(11), q, sizes))
    out = at_once(inputs(11).at[2, 1].set(jnp.nan), q, sizes)
    assert np.isnan(out[2]).all() and np.isfinite(np.delete(out, 2, 0)).all()


def test_inputs_are_rounded_with_the_range_of_their_expert():
    """As in floats, bit for bit what the decoded weights give up to the order of the sums."""
    q, x, sizes = weight("int8"), inputs(9), np.array([2, 0, 3, 4], np.int32)
    act = Activation()
    got = quick(run)(q.replace(activation=act), x, sizes)
    close(got, exact(round_input(x, act), q, sizes))
    [ran] = jq.explain(apply, q.replace(activation=act), x, sizes)
    assert ran.activation == str(act) and ran.fused


def sent(text):
    """Dtypes of what devices send each other, sums apart."""
    return re.findall(r"= \(?(\w+)\[.*? (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "text, spec",
    [
        ("int4-g32", ("data", "model")), ("int4-g32", ("model", None, "data")), ("fp8_e4m3-2x32", ("data", "model")),
        ("nvfp4", ("model", None, "data")),
    ],
)  # fmt: skip
def test_each_device_multiplies_by_its_own_experts_and_rows(text, spec):
    """Experts and rows of their weights, or experts and parts of their rows: only results are sent."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    q, x, sizes = weight(text, 8, n=16, k=128), inputs(20, 128), np.array([3, 0, 4, 1, 0, 0, 5, 4], np.int32)

    def place(a):
        sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
        fits = [axis if s % size == 0 else None for axis, size, s in zip(spec, sizes, a.shape)]
        return jax.device_put(a, NamedSharding(mesh, P(*fits)))

    compiled = jax.jit(run).lower(jax.tree.map(place, q), jnp.asarray(x), jnp.asarray(sizes)).compile()
    close(compiled(jax.tree.map(place, q), jnp.asarray(x), jnp.asarray(sizes)), exact(x, q, sizes))
    # Scales of two levels are not cut along rows.
    assert "u8" not in sent(compiled.as_text()) or (text == "nvfp4" and len(spec) == 3)
    assert "all-reduce" in compiled.as_text()


def test_a_program_for_several_platforms():
    q, x, sizes = weight("int4-g32", k=64), inputs(9, 64), np.array([2, 0, 3, 4], np.int32)
    program = jax.export.export(
        jax.jit(run), platforms=("cpu", "cuda"), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    )(q, x, sizes)
    assert program.mlir_module().count(TARGET) == 1
    close(program.call(q, x, sizes), exact(x, q, sizes))


@pytest.mark.gpu_compile
@pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
@pytest.mark.parametrize("m", [8, 300])
def test_compiled_for_four_gpus_no_codes_are_sent_and_not_all_experts_are_decoded(m):
    """H100s that are not there, each with two of the experts: a few rows by all of them, many in turn."""
    mesh = topologies.make_mesh(harness.topology("h100", (1, 1, 4)), (4,), ("expert",))
    q = jax.eval_shape(lambda: weight("int4-g64", 8, 512, 256).astype(jnp.bfloat16))
    place = lambda a, *spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*spec)))
    x, sizes = jax.ShapeDtypeStruct((m, 256), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    with compat.lowering_for(gpu("h100").kind):
        args = jax.tree.map(lambda a: place(a, "expert"), q), place(x), place(sizes)
        text = jax.jit(jq.quantized(apply, kernels="require")).lower(*args).compile().as_text()
    assert text.count(TARGET) + text.count(HOPPERS) == 1
    assert set(sent(text)) <= {"s32"} and "all-reduce" in text  # where the rows of the experts begin and end
    assert not re.search(r"= (bf16|f32)\[\d,(512,256|256,512)\]", text)


def test_nothing_at_all():
    q, sizes = weight("int8"), np.zeros(4, np.int32)
    assert quick(run)(q, inputs(0), sizes).shape == (0, N)
    np.testing.assert_array_equal(quick(run)(q, inputs(3), sizes), np.zeros((3, N)))
