"""The kernel in `ops.dot`: which programs have it, what it computes, and on which device of a mesh."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant import ops
from jquant.core.formats import BlockParams, Format, compute_params, decode, parse_format
from jquant.core.qtensor import encode_array, to_rows
from jquant.ops import gpu
from pallas_kernels import harness
from tests.models.cases import CONFIGS, make_params, make_tokens

TARGET = "__gpu$xla.gpu.triton"
HOPPERS = 'custom_call_target="mosaic_gpu'  # in a compiled program
N = 128


def weight(fmt, *kept, n=N):
    w, fmt = jax.random.normal(jax.random.key(0), (*kept, n)), parse_format(fmt)
    return encode_array(w, compute_params(to_rows(w, (-1,)), fmt), fmt, (-1,))


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)


def kernels(f, *args, platform="cuda"):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text().count(TARGET)


def dot(x, q):
    return ops.dot(x, q, cast=lambda w: w.astype(x.dtype))[0]


# --- which programs have it ---


@pytest.mark.parametrize(
    "text", ["int4-g64", "int8", "int3-g64", "int4-g32-asym", "nf4-dq", "fp8_e4m3-2x64", "mxfp4", "nvfp4"]
)
def test_the_kernel_is_in_the_program_of_a_gpu_and_only_there(text):
    q, x = weight(text, 48), inputs(2, N)
    assert kernels(dot, x, q) == 1
    assert kernels(dot, x, q, platform="cpu") == 0


def test_under_transformations():
    q, x, layers = weight("int4-g64", N), inputs(2, N), weight("int4-g64", 3, N)
    each = lambda x, q: jax.lax.scan(jax.checkpoint(lambda h, w: (dot(h, w), None)), x, q)[0]
    loss = lambda f: lambda x, q: jax.value_and_grad(lambda x: jnp.sum(f(x, q).astype(jnp.float32)))(x)
    assert kernels(loss(dot), x, q) == 1
    assert kernels(each, x, layers) == 1
    assert kernels(loss(each), x, layers) >= 1
    assert kernels(jax.vmap(dot, (0, None)), inputs(3, 2, N), q) == 1
    assert kernels(jax.vmap(dot), inputs(3, 2, N), layers) == 1
    experts = lambda x, q: ops.dot(x, q, batch=(-3,), cast=lambda w: w.astype(x.dtype))[0]
    assert kernels(experts, inputs(3, 2, N), layers) == 1


def test_every_quantized_product_of_a_decoder_is_a_kernel():
    """Of a prompt, and of one token; and there is none on a CPU."""
    config = dataclasses.replace(CONFIGS["llama"], hidden_size=64, intermediate_size=128, head_dim=16)
    apply, params = jq.models.build(config), make_params(config)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    tokens = make_tokens(config, 8)
    q = jq.quantize(apply, params, jq.Recipe({"*embed*": None, "*": jq.INT4_G64}), jq.rtn(), [tokens])
    for some in (tokens, tokens[:, :1]):
        ran = [r for r in jq.explain(apply, q, some) if r.kind == "dot" and r.fused]
        assert ran and all("by a kernel" in r.how and "quantized_matmul" in r.kernel for r in ran)
        assert kernels(jq.quantized(apply), q, some) == len(ran)
        assert kernels(jq.quantized(apply), q, some, platform="cpu") == 0


@pytest.mark.parametrize(
    "text, dtype, reason",
    [
        ("ternary", jnp.float32, "ternary has no kernel"), ("int4", jnp.float16, "the input is float16"),
        ("nf4-g16", jnp.float32, "table of float32 values"), ("int4-g7", jnp.float32, "groups of 7"),
    ],
)  # fmt: skip
def test_a_reason_is_said_where_there_is_no_kernel(text, dtype, reason):
    q, x = weight(text, 8), inputs(2, N).astype(dtype)
    out = lambda x, q: ops.dot(x, q, preferred=jnp.float32)
    how = out(x, q)[1]
    assert reason in how.reason and reason in how.text and not how.kernel
    assert kernels(lambda *args: out(*args)[0], x, q) == 0


# --- numbers ---


def exact(x, q):
    return np.einsum("...k,nk->...n", np.asarray(x, np.float64), np.asarray(q.rows(), np.float64))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


run = partial(gpu.dot, out_dtype=jnp.float32, interpret=True)


@pytest.mark.parametrize("text", ["int8", "nvfp4", "fp8_e4m3-2x64"])
def test_the_kernel_is_told_what_the_codes_stand_for(text):
    """With scales of rows, of two levels, and of tiles."""
    q, x = weight(text, 48), inputs(2, N)
    close(run(x, q), exact(x, q))


def test_batch_axes_and_vmap():
    q, x = weight("int8", 4, 3, 8), inputs(3, 2, N)
    want = np.einsum("btk,abnk->btan", np.asarray(x, np.float64), np.asarray(q.rows(), np.float64))
    close(run(x, q, batch=(-3,)), want)
    one = weight("int8", 8)
    close(jax.vmap(run, (0, None))(x, one), exact(x, one))


# --- meshes ---


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "of_w, of_x, sums",
    [
        (("model", None), ("data", None), 0), ((None, "model"), ("data", "model"), 1),
        ((None, "model"), (None, None), 1), ((None, None), (("data", "model"), None), 0),
    ],
)  # fmt: skip
def test_each_device_multiplies_its_own_part(monkeypatch, of_w, of_x, sums):
    """Rows of the weight, parts of its rows, tokens: nothing is sent but the sums over parts of rows.

    A product with the decoded part stands in the place of the kernel: the partitioner does not look into either.
    """

    def plain(x, planes, scale, zero, **static):
        w = decode(planes[0], BlockParams(scale, zero), Format("int8", 32))
        return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")

    monkeypatch.setattr(gpu, "quantized_matmul", plain)
    jax.clear_caches()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    q, x = weight("int8-g32", 32), inputs(16, N)
    on = lambda a, spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    args = on(x, of_x), jax.tree.map(lambda a: on(a, of_w), q)
    compiled = jax.jit(run).lower(*args).compile()
    text, got = compiled.as_text(), compiled(*args)
    jax.clear_caches()
    assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == sums
    close(got, exact(x, q))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_shardings_in_types_have_no_kernel():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(inputs(8, N), NamedSharding(mesh, P("data")))
    q = jax.device_put(weight("int8", 8), NamedSharding(mesh, P()))
    assert "explicit" in gpu.why_not(x, q, (), x.dtype, x.dtype)
    assert gpu.why_not(jax.device_get(x), jax.device_get(q), (), x.dtype, x.dtype) is None


@pytest.mark.gpu_compile
@pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_bias_and_residual_cost_no_pass_where_a_sum_is_split(rows):
    """XLA adds them where it adds the parts: in the shapes that end on the residual stream, no kernel more."""
    q = jax.eval_shape(lambda: weight("int4-g128", 1024, n=4096).astype(jnp.bfloat16))
    x, bias, residual = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, 4096), (1024,), (rows, 1024)))
    product = jq.quantized(lambda q, x: x @ q.T)
    plain = harness.compile_for("h100", product, q, x)
    more = harness.compile_for("h100", lambda q, x, b, r: r + (product(q, x) + b), q, x, bias, residual)
    passes = lambda program: len(re.findall(r" (?:fusion|custom-call)\(", program.hlo[program.hlo.index("ENTRY") :]))
    assert passes(more) == passes(plain) > 1
