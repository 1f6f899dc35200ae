"""The numbers of the Triton kernels, in Pallas' interpreter (on a GPU: its own), against float64.

Where scales multiply sums, codes are exact and the error is that of float32 sums. Where they multiply elements (a step
of the loop spans several groups), and for tables, elements are rounded to the dtype of the activations. Errors are in
units of the sum of absolute terms.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import Tiling, decode, quantized_matmul, reference
from pallas_kernels.quantized_matmul.tilings import FEW
from tests.pallas_kernels.cases import Case, exact, interpreted, make

SUMS = 1e-6  # float32 sums of at most a few hundred terms
SMALL = Tiling(block_m=16, block_n=16, block_k=32, warps=1, stages=1)


def run(case: Case, tiling: Tiling | None = SMALL, **options) -> np.ndarray:
    out = quantized_matmul(
        *case.arrays,
        **case.options,
        **{"out_dtype": jnp.float32, "interpret": interpreted(), "tiling": tiling, **options},
    )
    return np.asarray(out, np.float64)


def check(case: Case, tolerance: float = SUMS, **options) -> None:
    got = run(case, **options)
    want, size = exact(case)
    assert np.max(np.abs(got - want) / size) < tolerance


@pytest.mark.parametrize(
    "name, group, scale_dtype",
    [
        ("int4", 32, "bfloat16"),
        ("int4", None, "float32"),
        ("int8", 32, "float16"),
        ("int8", None, "float32"),
        ("fp8_e4m3", None, "float32"),
        ("fp8_e5m2", None, "float32"),
        ("fp4_e2m1", 32, "float8_e8m0fnu"),
        ("fp8_e4m3", 32, "float8_e8m0fnu"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_codes_are_exact_and_sums_float32(name, group, scale_dtype, dtype):
    check(make(name, 3, 20, 70, group, dtype=dtype, scale_dtype=scale_dtype))


@pytest.mark.parametrize(
    "name, block_k", [("int2", 64), ("int3", 128), ("int5", 128), ("int6", 64), ("int7", 128), ("fp6_e3m2", 64)]
)
def test_codes_in_planes_are_exact(name, block_k):
    tiling = SMALL._replace(block_k=block_k)
    check(make(name, 3, 20, 160, None), tiling=tiling)
    check(make(name, 2, 20, 256, 128, asymmetric=name.startswith("int")), tiling=tiling)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name, group", [("int4", 32), ("int4", None), ("int8", 64), ("int8", None)])
def test_zero_points_are_exact(name, group, dtype):
    check(make(name, 3, 20, 70, group, asymmetric=True, dtype=dtype))


def test_zero_points_between_codes_round_the_element():
    """To bfloat16 once, half a unit in the last place: 2**-9."""
    check(make("int4", 3, 20, 64, 32, asymmetric=True, zero_dtype="bfloat16"), tolerance=2**-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name, group, scale_dtype", [("int4", 16, "bfloat16"), ("int4", 32, "bfloat16"), ("int8", 32, "float32")]
)
def test_small_groups_round_the_element_to_the_dtype_of_the_activations(name, group, scale_dtype, dtype):
    """Once: half a unit in the last place. (XLA's CPU may keep more bits of a bfloat16 product than a GPU does.)"""
    case = make(name, 3, 20, 136, group, dtype=dtype, scale_dtype=scale_dtype, asymmetric=name == "int4")
    check(case, tolerance=2.0 ** {"bfloat16": -9, "float16": -12}[dtype], tiling=SMALL._replace(block_k=64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nvfp4_and_mxfp4_lose_nothing_in_small_groups(dtype):
    """The product of an e2m1 element and an e4m3 or e8m0 scale is a bfloat16 number."""
    wide = SMALL._replace(block_k=64)
    if dtype != "float16":
        check(make("fp4_e2m1", 3, 20, 136, 32, dtype=dtype, scale_dtype="float8_e8m0fnu"), tiling=wide)
    check(make("fp4_e2m1", 3, 20, 136, 16, dtype=dtype, scale_dtype="float8_e4m3fn"), tiling=wide)


def test_tables_are_rounded_to_the_dtype_of_the_activations():
    check(make("nf4", 3, 20, 70, 32), tolerance=2**-9)
    check(make("nf4", 3, 20, 70, 32, dtype="float16"), tolerance=2**-12)


def test_float32_activations_keep_their_precision_with_tables():
    """Each value of the table is two bfloat16 numbers: 2**-17 at the worst."""
    check(make("nf4", 3, 20, 70, 32, dtype="float32"), tolerance=2**-17)


@hypothesis.given(
    m=st.integers(1, 20), n=st.integers(1, 40), k=st.integers(1, 100), group=st.sampled_from([None, 32, 64]),
    name=st.sampled_from(["int4", "int8"]), split=st.sampled_from([1, 2, 3]), seed=st.integers(0, 9),
)  # fmt: skip
@hypothesis.settings(max_examples=6)
def test_ragged_shapes_are_right(m, n, k, group, name, split, seed):
    """Any m, n, k, a shorter last group, and any parts of the contracted axis, also empty ones."""
    case = make(name, m, n, k, group, asymmetric=True, seed=seed)
    check(case, tiling=SMALL._replace(split_k=split))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_a_step_of_several_groups_is_exact(split, asymmetric):
    """Each group has sums of its own: also beyond the end of a row."""
    case = make("int4", 3, 20, 64 * 5, 64, asymmetric=asymmetric)
    check(case, tiling=SMALL._replace(block_k=128, split_k=split))


@pytest.mark.parametrize("block_k", [64, 128])
def test_scales_multiply_elements_if_told(block_k):
    """Rounded once to the dtype of the activations, then float32 sums."""
    case = make("int4", 3, 20, 64 * 5, 64, asymmetric=True)
    check(case, tiling=SMALL._replace(block_k=block_k, inside=True), tolerance=2**-9)


@pytest.mark.parametrize(
    "name, group, scale_dtype",
    [
        ("int4", 64, "bfloat16"), ("int4", None, "float32"), ("int4", 96, "bfloat16"), ("int3", 64, "float16"),
        ("int8", 32, "bfloat16"), ("fp8_e4m3", None, "float32"), ("nf4", 64, "bfloat16"),
        ("fp4_e2m1", 16, "float8_e4m3fn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_weight_is_written_out_as_it_is_dequantized(name, group, scale_dtype, dtype):
    """Rounded once, in rows and blocks that do not divide; tables hold values that are rounded before."""
    case = make(name, 1, 20, 384, group, dtype=dtype, scale_dtype=scale_dtype, asymmetric=name == "int4")
    arrays, tiling = case.arrays[1:], decode.TILING._replace(block_n=16, block_k=256)
    got = decode.decode(*arrays, **case.options, k=384, dtype=case.x.dtype, tiling=tiling, interpret=interpreted())
    want = np.asarray(
        reference.dequantize(*arrays, case.options["element"], case.options["group_size"], 384), np.float64
    )
    unit = 2.0 ** {"bfloat16": -8, "float16": -11}[dtype]  # half of the last place
    most = np.abs(want) * unit * (2.01 if name == "nf4" else 1) + 2.0**-24
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= most)


def test_many_rows_are_multiplied_with_the_weight_written_out():
    case = make("int4", FEW + 1, 20, 96, 32, asymmetric=True)
    text = str(jax.make_jaxpr(lambda *a: quantized_matmul(*a, **case.options))(*case.arrays))
    assert "decode_int4" in text and "quantized_matmul_int4" not in text
    check(case, tolerance=2**-9, tiling=None)
    experts = make("int8", FEW + 1, 8, 64, scale_dtype="float32", lead=(2,))
    run_one = lambda *a: quantized_matmul(*a, **experts.options, out_dtype=jnp.float32, interpret=interpreted())
    got = np.asarray(jax.vmap(run_one)(*experts.arrays), np.float64)
    want, size = exact(experts)
    assert np.max(np.abs(got - want) / size) < 2**-9


def test_nothing_is_an_empty_product():
    case = make("int4", 3, 8, 32)
    out = quantized_matmul(case.x[:0], *case.arrays[1:], **case.options)
    assert out.shape == (0, 8) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32, None])
def test_the_result_is_rounded_to_its_dtype(out_dtype):
    case = make("int8", 3, 20, 64, scale_dtype="float32")
    out = quantized_matmul(*case.arrays, **case.options, out_dtype=out_dtype, interpret=interpreted(), tiling=SMALL)
    assert out.dtype == (out_dtype or jnp.bfloat16)
    want = run(case).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.asarray(jnp.asarray(want).astype(out.dtype), np.float32)
    )


def test_parts_of_the_contracted_axis_give_the_same_numbers_in_every_order_of_programs():
    """No atomic sums: the bits do not depend on timing. Here: split and whole agree up to float32 sums."""
    case = make("int4", 3, 20, 256, 64)
    whole, split = run(case), run(case, tiling=SMALL._replace(split_k=4))
    assert np.max(np.abs(whole - split) / exact(case)[1]) < SUMS


# --- transformations ---


def plain(case: Case):
    return lambda x, planes, scale: reference.quantized_matmul(x, planes, scale, **case.options)


def kernel(case: Case):
    return lambda x, planes, scale: quantized_matmul(
        x, planes, scale, **case.options, interpret=interpreted(), tiling=SMALL
    )


def close(a, b) -> None:
    """Equal up to float32 sums of terms as large as the largest result."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(b)))), a, b)


def test_gradients_are_those_of_the_reference():
    case = make("int4", 3, 20, 64, 32, dtype="float32", scale_dtype="float32")
    loss = lambda f: lambda x, scale: jnp.sum(f(x, case.planes, scale) ** 2)
    close(*(jax.grad(loss(f), argnums=(0, 1))(case.x, case.scale) for f in (kernel(case), plain(case))))


def test_experts_are_one_call_with_a_larger_grid():
    case = make("int4", 3, 20, 64, 32, dtype="float32", lead=(3,))
    close(*(jax.vmap(f)(*case.arrays[:3]) for f in (kernel(case), plain(case))))
    assert calls(jax.vmap(kernel(case)), *case.arrays[:3]) == [(3, 1, 9, 20)]  # float32: three times the rows


def test_mapped_activations_are_more_rows_of_one_product():
    """The weight is not read again for each of them."""
    case = make("int4", 3, 20, 64, 32, dtype="float32")
    x = jnp.stack([case.x, 2 * case.x])
    f = lambda x: kernel(case)(x, case.planes, case.scale)
    close(jax.vmap(f)(x), jnp.stack([f(case.x), 2 * f(case.x)]))
    assert calls(jax.vmap(f), x) == [(1, 18, 20)]


def calls(f, *args) -> list[tuple[int, ...]]:
    """The shapes of the results of all kernels that a program calls."""
    return [eqn.outvars[0].aval.shape for eqn in _pallas_calls(jax.make_jaxpr(f)(*args).jaxpr)]


def _pallas_calls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)


def test_leading_axes_are_rows():
    case = make("int8", 6, 20, 32, scale_dtype="float32")
    lead = case._replace(x=case.x.reshape(2, 1, 3, 32))
    np.testing.assert_array_equal(run(lead).reshape(6, 20), run(case))


def test_vmap_of_grad_and_grad_of_vmap_agree_with_the_reference():
    case = make("int4", 2, 16, 32, 32, dtype="float32", lead=(2,))
    x, planes, scale, _ = case.arrays
    one = lambda f: lambda x, p, s: jnp.sum(f(x, p, s) ** 2)
    close(*(jax.vmap(jax.grad(one(f)))(x, planes, scale) for f in (kernel(case), plain(case))))
    every = lambda f: lambda x: jnp.sum(jax.vmap(f)(x, planes, scale) ** 2)
    close(*(jax.jit(jax.grad(every(f)))(x) for f in (kernel(case), plain(case))))


def test_a_scan_over_layers_with_remat_has_the_gradient_of_the_reference():
    case = make("int4", 2, 32, 32, 32, dtype="float32", lead=(2,))
    x, planes, scale, _ = case.arrays

    def loss(f):
        body = jax.checkpoint(lambda h, w: (jnp.tanh(f(h, *w) * 0.05), None))
        return lambda x: jnp.sum(jax.lax.scan(body, x, (planes, scale))[0])

    close(*(jax.grad(loss(f))(x[0]) for f in (kernel(case), plain(case))))


# --- errors ---


def test_errors_say_what_to_do():
    case = make("int4", 2, 8, 64, 32)
    with pytest.raises(ValueError, match="pack the codes along the contracted axis"):
        quantized_matmul(case.x[:, :32], *case.arrays[1:], **case.options)
    with pytest.raises(ValueError, match="must have 2 blocks"):
        quantized_matmul(case.x, case.planes, case.scale[:, :1], **case.options)
    with pytest.raises(ValueError, match="int9.*choose one of int2"):
        quantized_matmul(*case.arrays, element="int9")
    with pytest.raises(ValueError, match="none of auto, mosaic, triton, xla"):
        quantized_matmul(*case.arrays, **case.options, implementation="cuda")
    odd = make("int4", 2, 8, 63, 21)
    with pytest.raises(ValueError, match="groups of 21"):
        quantized_matmul(*odd.arrays, **odd.options)
