"""Products of two rounded operands on a GPU: which kernel is taken, in which programs it is, what it computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jquant as jq
from jquant.core.activation import Activation, Policy, encode_input
from jquant.core.formats import Format
from jquant.ops import choice, gpu_codes
from jquant.ops import low_precision as lp
from pallas_kernels import harness
from pallas_kernels.gpus import gpu
from pallas_kernels.low_precision_matmul.reference import low_precision_matmul as reference
from tests.ops.test_gpu import kernels
from tests.ops.test_low_precision import INPUTS, decoded, inputs, weight

N = 96
INT8, FP8 = Format("int8"), Format("fp8_e4m3")
GROUPS = Format("int4", 64, symmetric=False)
BLOCKS = Format("fp8_e4m3", (2, 64))
DYNAMIC, FP8_INPUT = Activation(), Activation("fp8_e4m3")


def dot(x, q, **options):
    return lp.dot(x, q, **options)[0]


# --- the choice ---


def test_the_choice_is_that_of_the_table_by_rows():
    assert choice.order("fp8", 1) == choice.order("fp8", 64) == ("weights",)
    assert choice.order("fp8", 65) == ("xla",)
    assert choice.order("fp8", 65, force=True) == ("codes", "weights")
    for kind in choice.TABLE:
        for rows in (1, 64, 65, 4096):
            plain, forced = choice.order(kind, rows), choice.order(kind, rows, force=True)
            assert set(plain) - {"xla"} <= set(forced) and "xla" not in forced  # a user who insists gets no less


def test_the_first_that_can_is_taken_and_every_reason_is_told():
    reasons = {"codes": "no codes", "weights": "no weights"}
    assert choice.pick("int8 x int8", 1, "auto", lambda name: None) == ("codes", "")
    assert choice.pick("int8 x int8", 1, "auto", {"codes": "no codes", "weights": None}.get) == ("weights", "")
    assert choice.pick("int8 x int8", 1, "auto", reasons.get) == ("xla", "no codes; no weights")
    assert choice.pick("int8 x int8", 1, "never", lambda name: None) == ("xla", "none is wanted")
    assert choice.pick("fp8", 4096, "auto", lambda name: None)[0] == "xla"
    assert choice.pick("fp8", 4096, "require", lambda name: None) == ("codes", "")


def test_a_kernel_whose_numbers_are_not_proven_is_not_taken(monkeypatch):
    monkeypatch.setattr(choice, "PROVEN", {"weights": "somewhere"})
    assert choice.pick("int8 x int8", 1, "require", lambda name: None) == ("weights", "")
    monkeypatch.setattr(choice, "PROVEN", {})
    assert choice.pick("int8 x int8", 1, "require", lambda name: None) == ("xla", "its numbers are not proven")


@pytest.mark.parametrize(
    "fmt, act, tokens, kernel",
    [
        (INT8, DYNAMIC, 1, "low_precision_matmul"), (INT8, DYNAMIC, 512, ""),
        (Format("int8", symmetric=False), INPUTS[1], 2, "low_precision_matmul"), (INT8, INPUTS[6], 2, "low_precision"),
        (GROUPS, DYNAMIC, 2, "quantized_matmul"), (GROUPS, DYNAMIC, 512, "low_precision_matmul"),
        (Format("int4", 32), DYNAMIC, 2, "low_precision_matmul"), (FP8, FP8_INPUT, 2, "quantized_matmul"),
        (FP8, Activation("fp8_e5m2"), 2, "quantized_matmul"), (FP8, FP8_INPUT, 512, ""),
        (BLOCKS, FP8_INPUT, 2, "quantized_matmul"), (BLOCKS, FP8_INPUT, 512, "low_precision_matmul"),
        (Format("fp4_e2m1", 64), DYNAMIC, 2, "quantized_matmul"),
    ],
    ids=str,
)  # fmt: skip
def test_the_program_has_the_kernel_that_is_told(fmt, act, tokens, kernel):
    """In bfloat16, and in programs for a GPU only."""
    q, x = weight(fmt, act, (6, 192)), inputs(tokens, 192).astype(jnp.bfloat16)
    how = lp.dot(x, q)[1]
    assert (kernel in how.kernel) if kernel else not how.kernel
    assert ("by a kernel" in how.text) == bool(kernel) and bool(how.reason) != bool(kernel)
    assert kernels(dot, x, q) == bool(kernel)
    assert kernels(dot, x, q, platform="cpu") == 0


def test_fp8_of_many_rows_is_multiplied_as_fp8_unless_a_kernel_is_required():
    q, x = weight(FP8, FP8_INPUT, (6, N)), inputs(512, N)
    program = jax.jit(dot).trace(x, q).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"dot_general .*f8E4M3FN.*f8E4M3FN.*-> tensor<512x6xf32>", program)
    assert kernels(lambda x, q: dot(x, q, kernels="require"), x, q) == 1
    assert kernels(lambda x, q: dot(x, q, kernels="never"), x[:2], q) == 0


def test_under_transformations():
    """As a model is run: scanned layers with remat, their derivative, vmap over inputs and over weights."""
    q = weight(INT8, DYNAMIC, (3, N, N), contracted=(-1,), batch=1)
    run = jq.quantized(lambda p, x: jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w.T), None)), x, p)[0])
    loss = lambda x, q: jnp.sum(run(q, x))
    x = inputs(2, N)
    assert kernels(loss, x, q) == 1
    assert kernels(jax.value_and_grad(loss), x, q) >= 1
    assert kernels(lambda x, q: jax.vmap(lambda x: run(q, x))(x), inputs(4, 2, N), q) == 1
    assert kernels(jax.vmap(dot), inputs(3, 2, N), q) == 1
    assert kernels(lambda x, q: dot(x, q, batch=(-3,)), inputs(3, 2, N), q) == 1


# --- numbers, in Pallas' interpreter ---


def close(got, x, q, batch=()):
    """To float32's rounding of the sums of |a - z| |u - y|, and of |z| |u|, as the zero point is taken away after."""
    left, right = decoded(x, q, batch)
    want = np.einsum("...tn,...mn->...tm", left, right)
    wide = 20 if q.activation_params is not None and not q.activation.symmetric else 2
    atol = wide * 2**-23 * np.abs(left).max() * np.abs(right).sum(-1).max()
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def by_codes(x, q, batch=(), **options):
    codes, params = encode_input(x, q.activation, lp.static_params(q, batch))
    kind = lp.product_kind(q.activation, q.format, q.row_length)
    options = {"out_dtype": jnp.float32, "interpret": True, "batch": batch} | options
    return gpu_codes.dot(codes, params, q, kind, **options)


def by_weights(x, q, batch=()):
    codes, params = encode_input(x, q.activation, lp.static_params(q, batch))
    return lp._packed(codes, params.zero_point, q, batch, interpret=True) * params.scale


CASES = [
    (INT8, DYNAMIC), (Format("int8", "tensor"), INPUTS[2]), (INT8, INPUTS[6]),
    (Format("int8", symmetric=False), INPUTS[1]), (GROUPS, INPUTS[1]), (Format("int3", 64), DYNAMIC),
]  # fmt: skip


@pytest.mark.parametrize(
    "fmt, act", [*CASES, (BLOCKS, FP8_INPUT), (FP8, FP8_INPUT), (Format("int4"), FP8_INPUT)], ids=str
)
def test_the_kernel_of_codes_is_the_product_of_the_decoded_operands(fmt, act):
    """Zero points of either side, of rows and of groups, the last of which is shorter."""
    q, x = weight(fmt, act, (6, N)), inputs(3, N)
    close(by_codes(x, q), x, q)


@pytest.mark.parametrize("fmt, act", [*CASES[:5], (FP8, FP8_INPUT), (BLOCKS, FP8_INPUT), (GROUPS, FP8_INPUT)], ids=str)
def test_the_kernel_of_packed_codes_is_the_product_of_the_decoded_operands(fmt, act):
    q, x = weight(fmt, act, (6, N)), inputs(3, N)
    close(by_weights(x, q), x, q)


def test_few_rows_that_vmap_makes_many_keep_their_sums():
    """The kernel of packed codes does not write the weight out then, which would round it to 16 bits."""
    q, x = weight(INT8, DYNAMIC, (6, N)), inputs(70, 2, N)
    got = jax.vmap(by_weights, (0, None))(x, q)
    close(got.reshape(140, 6), x.reshape(140, N), q)


def test_batch_axes_and_vmap():
    """Experts in front or not, each with its own range; inputs mapped over one weight, each with its own scale."""
    q, x = weight(CASES[3][0], INPUTS[6], (4, 6, N), batch=1), inputs(4, 3, N)
    close(by_codes(x, q, (-3,)), x, q, (-3,))
    q = weight(CASES[3][0], Activation("int8", "tensor", False), (6, N))
    x = x * jnp.asarray([1.0, 100.0, 0.01, 1.0])[:, None, None]
    for got, one in zip(jax.vmap(by_codes, (0, None))(x, q), x, strict=True):
        close(got, one, q)


def test_the_result_is_written_in_the_dtype_that_is_asked_for():
    q, x = weight(INT8, DYNAMIC, (6, N)), inputs(3, N)
    for kind in (by_codes(x, q, out_dtype=jnp.bfloat16), dot(x, q, out_dtype=jnp.bfloat16)):
        assert kind.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kind, by_codes(x, q).astype(jnp.bfloat16))


def test_nan_and_infinity_stay_visible():
    x = jnp.ones((3, N)).at[0, 3].set(jnp.nan).at[1, 3].set(jnp.inf)
    for run in (by_codes, by_weights):
        out = run(x, weight(INT8, DYNAMIC, (6, N)))
        assert not np.any(np.isfinite(out[:2])) and np.all(np.isfinite(out[2]))


# --- reasons ---


@pytest.mark.parametrize(
    "fmt, act, reason",
    [
        (Format("int4", 16), DYNAMIC, "groups of 16 are"), (Format("ternary"), DYNAMIC, "ternary has no kernel"),
        (Format("int4", 16), FP8_INPUT, "groups of 16, whose scales"),
        (FP8, Activation("fp8_e5m2"), "preferred"), (Format("fp8_e4m3", 64), Activation("fp8_e5m2"), "float8_e5m2 x "),
    ],
    ids=str,
)  # fmt: skip
def test_a_reason_is_said_where_there_is_no_kernel(fmt, act, reason):
    q, x = weight(fmt, act, (6, N)), inputs(2 if act != Activation("fp8_e5m2") else 200, N)
    how = lp.dot(x, q)[1]
    assert reason in how.reason and reason in how.text and not how.kernel
    assert kernels(dot, x, q) == 0


def test_the_numbers_of_a_program_for_a_cpu_are_the_same_with_and_without_kernels():
    q, x = weight(GROUPS, DYNAMIC, (6, N)), inputs(3, N)
    np.testing.assert_array_equal(jax.jit(dot)(x, q), jax.jit(lambda x, q: dot(x, q, kernels="never"))(x, q))


# --- meshes ---


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "fmt, of_w, of_x, sums",
    [
        (Format("int8", 32, symmetric=False), ("model", None), ("data", None), 0),
        (Format("int8", 32, symmetric=False), (None, "model"), ("data", "model"), 1),
        (Format("int4", 32), (None, "model"), ("data", "model"), 1), (INT8, (None, None), (("data", "model"), None), 0),
    ],
    ids=str,
)  # fmt: skip
def test_each_device_multiplies_its_own_part(monkeypatch, fmt, of_w, of_x, sums):
    """No code is gathered, whatever is cut: only the sums over parts of rows are added.

    The reference stands in the place of the kernel: the partitioner does not look into either. The input's codes are
    given, as its scale is one of the whole row.
    """
    monkeypatch.setattr(gpu_codes, "low_precision_matmul", lambda *a, interpret, **kw: reference(*a, **kw))
    jax.clear_caches()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    act = Activation(symmetric=fmt.symmetric)
    q, x = weight(fmt, act, (32, 256)), inputs(16, 256)
    codes, params = encode_input(x, act)
    on = lambda a, spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    whole = lambda a: on(a, (of_x[0], None))
    cut = lambda a: on(a, of_w if a.shape[-1] > 1 else (of_w[0], None))
    args = on(codes, of_x), jax.tree.map(whole, params), jax.tree.map(cut, q)
    compiled = jax.jit(lambda c, p, q: gpu_codes.dot(c, p, q, "int", out_dtype=jnp.float32)).lower(*args).compile()
    text, got = compiled.as_text(), compiled(*args)
    jax.clear_caches()
    assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == sums
    close(got, x, q)


def test_a_model_of_rounded_inputs_is_kernels():
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params = {"a": jnp.ones((N, 64)), "b": jnp.ones((64, N))}
    x = inputs(2, N)
    for policy in (jq.W8A8, jq.W8A8_STATIC, jq.FP8, Policy(jq.INT4_G64, DYNAMIC)):
        q = jq.quantize(apply, params, policy, jq.rtn(), [x])
        assert [bool(r.kernel) for r in jq.explain(apply, q, x)] == [True, True]
        assert kernels(jq.quantized(apply), q, x) == 2
        assert kernels(jq.quantized(apply), q, x, platform="cpu") == 0


# --- compiled for GPUs that are not there ---


@pytest.mark.gpu_compile
@pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not()))
@pytest.mark.parametrize(
    "device, fmt, act, tokens, name",
    [
        ("h100", Format("int8", symmetric=False), INPUTS[1], 1, "low_precision"),
        ("h100", INT8, INPUTS[1], 256, "low_precision"), ("a100", INT8, DYNAMIC, 256, "low_precision"),
        ("h100", Format("int4", 128), DYNAMIC, 1, "quantized"), ("a100", FP8, FP8_INPUT, 16, "quantized"),
        ("a100", Format("fp8_e4m3", (128, 128)), FP8_INPUT, 256, "low_precision"),
    ],
    ids=str,
)  # fmt: skip
def test_programs_with_rounded_inputs_compile_without_spills(device, fmt, act, tokens, name):
    """Rounding, kernel, zero points and all; fp8 also for a GPU that has no products of it."""
    q = jax.eval_shape(lambda: weight(fmt, act, (512, 1024)))
    x = jax.ShapeDtypeStruct((tokens, 1024), jnp.bfloat16)
    how = dict(out_dtype=jnp.bfloat16, kernels="require")  # many rows of int8 are XLA's otherwise
    program = harness.compile_for(device, lambda x, q: dot(x, q, **how), x, q)
    [kernel] = program.named(f"{name}_matmul")
    assert kernel.spill_bytes == 0 and kernel.shared_bytes <= gpu(device).shared_per_block
    assert not re.search(r"= (bf16|f16|f32)\[(512,1024|1024,512)\]", program.hlo)  # no float copy of the weight
    whole = r"= (u8|s8|f8\w+)\[512,1024\]\S* (fusion|copy)\("
    assert fmt.bits < 8 or not re.search(whole, program.hlo), "the codes are copied in every call"
