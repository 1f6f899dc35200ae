"""Scales that are no plain floats: powers of two, e4m3 with a global scale, a second level of 8-bit scales."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.format_type import MXFP4, MXFP6, MXFP8, NF4_DQ, NVFP4, NVFP4_FOUR_OVER_SIX, TERNARY, Format
from jquant.core.formats import block_params, code_table, compute_params, decode, encode
from jquant.core.scales import choose_outer, scale_values, store_scale
from tests.core.cases import E4M3, E8M0, normal, params_of_elements, same_bits


def rounded(rows, fmt: Format) -> np.ndarray:
    params = compute_params(rows, fmt)
    return np.asarray(decode(encode(rows, params, fmt), params, fmt), np.float64)


def relative_error(rows, fmt: Format) -> float:
    x = np.asarray(rows, np.float64)
    return np.linalg.norm(rounded(rows, fmt) - x) / np.linalg.norm(x)


# --- powers of two ---

# The exponent of the largest power of two of every element: table 1 of the OCP MX specification v1.0 gives the formats,
# section 5.3 their largest normal numbers.
EMAX = {"fp8_e4m3": 8, "fp8_e5m2": 15, "fp6_e2m3": 2, "fp6_e3m2": 4, "fp4_e2m1": 2, "int8": 6}


def shared_exponent(absmax: float, element: str) -> int:
    """Section 6.3: the largest power of two that is no larger than absmax, over that of the element."""
    return int(np.floor(np.log2(np.float64(absmax)))) - EMAX[element]


@pytest.mark.parametrize("element", EMAX)
@hypothesis.given(absmax=st.floats(2.0**-100, 2.0**100, width=32))
@hypothesis.settings(max_examples=25)
def test_floor_is_the_rule_of_the_specification(element, absmax):
    fmt = Format(element, 32, scale_dtype=E8M0)
    params = block_params(jnp.float32([0.0]), jnp.float32([absmax]), fmt)
    assert float(params.scale.astype(jnp.float32)[0]) == 2.0 ** shared_exponent(absmax, element)


@pytest.mark.parametrize("element", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "int4", "nf4"])
@hypothesis.given(absmax=st.floats(2.0**-100, 2.0**100, width=32))
@hypothesis.settings(max_examples=25)
def test_ceil_is_the_smallest_scale_that_clips_nothing(element, absmax):
    fmt = Format(element, 32, scale_dtype=E8M0, scale_rule="ceil")
    top = jq.core.formats.ELEMENTS[element].top
    [scale] = np.asarray(block_params(jnp.float32([-absmax]), jnp.float32([0.0]), fmt).scale, np.float64)
    assert top * scale >= np.float32(absmax) > top * scale / 2


@pytest.mark.parametrize(("absmax", "scale"), [(4.0, 1), (6.99, 1), (7.0, 2), (8.0, 2), (3.5, 1), (3.49, 0.5)])
def test_even_rounds_absmax_to_the_mantissa_first(absmax, scale):
    fmt = MXFP4.replace(scale_rule="even")
    assert block_params(jnp.float32([0.0]), jnp.float32([absmax]), fmt).scale.astype(jnp.float32).tolist() == [scale]


@pytest.mark.parametrize("fmt", [MXFP4, MXFP6, MXFP8, MXFP4.replace(scale_rule="ceil")], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_e8m0_reaches_over_float32s_range(fmt, size):
    """Reciprocals of all scales are normal, so nothing becomes NaN, and what is not tiny keeps its accuracy."""
    rows = normal((2, 64), seed=1) / 4 * np.float32(size)
    out = rounded(rows, fmt)
    assert np.isfinite(out).all()
    if size > 1e-37:
        assert relative_error(rows, fmt) < {4: 0.2, 6: 0.05, 8: 0.05}[fmt.bits]


def test_a_nan_is_not_hidden_by_powers_of_two():
    for bad in (np.nan, np.inf):
        params = block_params(jnp.float32([0.0]), jnp.float32([bad]), MXFP4)
        assert np.isnan(np.asarray(params.scale, np.float32)).all()


def test_scales_of_one_byte():
    for fmt, bits in [(MXFP4, 4 + 8 / 32), (MXFP6, 6 + 8 / 32), (MXFP8, 8 + 8 / 32), (NVFP4, 4 + 8 / 16)]:
        q = jax.eval_shape(lambda fmt=fmt: jq.core.qtensor.encode_array(
            w := jnp.zeros((64, 128)), compute_params(w, fmt), fmt, (1,)))  # fmt: skip
        assert q.nbytes == 64 * 128 * bits / 8 + 4 * bool(fmt.outer_block)
    w = jnp.zeros((512, 256))
    q = jax.eval_shape(lambda: jq.core.qtensor.encode_array(w, compute_params(w, NF4_DQ), NF4_DQ, (1,)))
    blocks = 512 * 256 // 64
    assert q.nbytes == 512 * 256 // 2 + blocks + blocks // 256 * (4 + 2)  # a float32 scale, a uint16 offset


# --- NVFP4 ---


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_FOUR_OVER_SIX], ids=str)
@pytest.mark.parametrize("std", [1.0, 1e-3, 1e-6, 1e-20])
def test_tiny_weights_survive(fmt, std):
    """The global scale carries the size: the error is relative to the weights whatever that is."""
    rows = normal((256, 512), seed=2)
    error = relative_error(rows * np.float32(std), fmt)
    assert error == pytest.approx(relative_error(rows, fmt), rel=1e-3) and 0.08 < error < 0.1


def test_the_global_scale_maps_the_largest_number_to_the_top():
    """448 * 6; with four over six 256 * 6, so that 384 * 4 is the same number."""
    rows = normal((8, 64), seed=3)
    at = np.unravel_index(np.abs(rows).argmax(), rows.shape)
    for fmt, found in ((NVFP4, {448}), (NVFP4_FOUR_OVER_SIX, {256, 384})):
        params = compute_params(rows, fmt)
        assert float(params.scale[at[0], at[1] // 16]) in found
        np.testing.assert_allclose(params.outer[0].item() * min(found) * 6, abs(rows).max(), rtol=1e-6)
        np.testing.assert_allclose(rounded(rows, fmt)[at], rows[at], rtol=1e-6)


def test_four_over_six_takes_the_better_of_two_scales_for_each_block():
    rows = normal((16, 64), seed=4)
    both = []
    for stretch in (1.0, 1.5):
        absmax = jnp.abs(rows).reshape(16, 4, 16).max(-1) * stretch
        chosen = compute_params(rows, NVFP4_FOUR_OVER_SIX)
        scale = block_params(-absmax, absmax, NVFP4_FOUR_OVER_SIX, chosen.outer).scale
        params = chosen._replace(scale=scale)
        both.append(np.asarray(decode(encode(rows, params, NVFP4), params, NVFP4) - rows, np.float64) ** 2)
    least = np.minimum(*(e.reshape(16, 4, 16).sum(-1) for e in both))
    out = (rounded(rows, NVFP4_FOUR_OVER_SIX) - np.asarray(rows, np.float64)) ** 2
    np.testing.assert_allclose(out.reshape(16, 4, 16).sum(-1), least, rtol=1e-5)
    assert (least < both[0].reshape(16, 4, 16).sum(-1)).any() and (least < both[1].reshape(16, 4, 16).sum(-1)).any()
    assert relative_error(rows, NVFP4_FOUR_OVER_SIX) < relative_error(rows, NVFP4)


def test_a_block_beside_a_huge_one_keeps_a_scale():
    """e4m3 would round its scale to zero; the smallest e4m3 number loses less."""
    rows = jnp.concatenate([jnp.full((1, 16), 448.0 * 2**10), jnp.full((1, 16), 0.9)], 1)
    params = compute_params(rows, NVFP4)
    assert params.scale.astype(jnp.float32).tolist() == [[448.0, 2.0**-9]]
    zeros = compute_params(rows.at[:, 16:].set(0), NVFP4)
    assert zeros.scale.astype(jnp.float32).tolist() == [[448.0, 0.0]]


def test_stacked_tensors_have_their_own_global_scale():
    rows = normal((2, 4, 32)) * jnp.asarray([1.0, 1e-5])[:, None, None]
    stacked = compute_params(rows, NVFP4, stacked=1)
    assert stacked.outer[0].shape == (2, 1, 1)
    for i in range(2):
        alone = compute_params(rows[i], NVFP4)
        assert same_bits(stacked.scale[i], alone.scale) and same_bits(stacked.outer[0][i], alone.outer[0])


def test_jit_changes_no_bit_of_wide_formats():
    rows = normal((64, 512), seed=5)
    for fmt in (NVFP4_FOUR_OVER_SIX, NF4_DQ, MXFP6, Format("fp8_e4m3", (16, 128))):
        for a, b in zip(
            *(jax.tree.leaves(f(rows, fmt)) for f in (compute_params, jax.jit(compute_params, static_argnums=1)))
        ):
            assert same_bits(a, b)


# --- double quantization ---

_DQ = [NF4_DQ.replace(block=4, outer_block=b) for b in (1, 3, 8, 100, "channel", "tensor")]


@pytest.mark.parametrize("fmt", _DQ, ids=str)
def test_scales_err_by_half_a_step_of_their_range(fmt):
    """8 bits from the smallest to the largest scale of each outer block; 2**-16 of the largest for the offset."""
    ideal = np.abs(np.asarray(normal((7, 23), seed=6))) + np.float32(0.5)
    outer = choose_outer(jnp.asarray(ideal), fmt)
    stored = store_scale(jnp.asarray(ideal), jnp.asarray(ideal), fmt, outer)
    out = np.asarray(scale_values(stored, outer, fmt), np.float64)
    step = np.zeros_like(out)
    rows, columns = {"channel": (1, 23), "tensor": (7, 23), 100: (4, 23)}.get(fmt.outer_block, (1, fmt.outer_block))
    for i in range(0, 7, rows):
        for j in range(0, 23, columns):
            part = ideal[i : i + rows, j : j + columns]
            step[i : i + rows, j : j + columns] = max((part.max() - part.min()) / 255, part.max() / 2**15)
    assert stored.dtype == jnp.uint8 and outer[1].dtype == jnp.uint16
    assert (np.abs(out - ideal) <= step * (0.5 + 1e-3) + ideal * 2.0**-22).all()
    assert outer[0].shape == outer[1].shape == (-(-7 // rows), -(-23 // columns))


def test_equal_scales_are_exact_and_zero_ones_too():
    fmt = NF4_DQ.replace(outer_block="channel")
    ideal = jnp.asarray([[0.3] * 5, [0.0] * 5, [0.0, 1.0, 1e-9, 0.0, 0.0]], jnp.float32)
    outer = choose_outer(ideal, fmt)
    out = np.asarray(scale_values(store_scale(ideal, ideal, fmt, outer), outer, fmt))
    np.testing.assert_allclose(out[0], 0.3, rtol=1e-6)
    assert (out[1] == 0).all() and out[2, 0] == 0 < out[2, 2] < out[2, 1] == pytest.approx(1, rel=1e-6)


def test_double_quantization_costs_little():
    rows = normal((128, 1024), seed=7)
    single = relative_error(rows, NF4_DQ.replace(scale_dtype="float32", outer_block=None))
    assert relative_error(rows, NF4_DQ) < 1.002 * single


def test_indexing_agrees_with_the_values_that_are_used():
    """`params_of_elements`, which other tests trust, against `decode` of codes that stand for 1."""
    for fmt in _DQ + [NVFP4.replace(block=4), Format("int4", (3, 4), False, "uint8", 5)]:
        rows = normal((7, 23), seed=8)
        params = compute_params(rows, fmt)
        scale, zero = params_of_elements(params, fmt, rows.shape)
        codes = jnp.full(rows.shape, int(np.flatnonzero(code_table(fmt) == 1)[0]), jnp.uint8)
        np.testing.assert_array_equal(decode(codes, params, fmt), (1 - zero) * scale)


# --- ternary ---


@pytest.mark.parametrize("fmt", [TERNARY, Format("ternary"), Format("ternary", 5), Format("ternary", (2, 5))], ids=str)
def test_ternary_is_bitnets_absmean(fmt):
    """RoundClip(W / gamma, -1, 1) with gamma the mean of |W| over a block, also over the shorter ones at the ends."""
    x = np.asarray(normal((3, 13), seed=9), np.float64)
    out, (m, n) = rounded(jnp.asarray(x, jnp.float32), fmt), x.shape
    rows, columns = fmt.tile_rows if fmt.block != "tensor" else m, fmt.group_size or n
    for i in range(0, m, rows):
        for j in range(0, n, columns):
            part = np.s_[i : i + rows, j : j + columns]
            gamma = np.abs(x[part]).mean()
            np.testing.assert_allclose(out[part], np.clip(np.round(x[part] / gamma), -1, 1) * gamma, rtol=1e-6)


# --- tiles ---


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tile_is_a_tensor_of_its_own(symmetric):
    fmt = Format("int4", (4, 5), symmetric)
    rows = normal((2, 7, 12), seed=10)
    whole = decode(encode(rows, params := compute_params(rows, fmt), fmt), params, fmt)
    alone = fmt.replace(block="tensor")
    for b in range(2):
        for i in range(0, 7, 4):
            for j in range(0, 12, 5):
                part = rows[b, i : i + 4, j : j + 5]
                p = compute_params(part, alone)
                assert same_bits(params.scale[b, i // 4, j // 5], p.scale[0, 0])
                assert same_bits(whole[b, i : i + 4, j : j + 5], decode(encode(part, p, alone), p, alone))


def test_zero_points_between_codes_reach_both_ends():
    fmt = Format("int4", "channel", False, zero_dtype="float32")
    rows = jnp.asarray([[-1.3, 0.2, 3.0], [0.0, 0.1, 5.0]], jnp.float32)
    out = rounded(rows, fmt)
    np.testing.assert_allclose(out[:, 2], rows[:, 2], rtol=1e-6)
    np.testing.assert_allclose(out[:, 0], rows[:, 0], rtol=1e-6, atol=1e-6)


def test_an_e4m3_scale_without_a_second_level_is_allowed_and_limited():
    fmt = Format("fp4_e2m1", 4, scale_dtype=E4M3)
    assert relative_error(normal((8, 64), seed=11), fmt) < 0.12
    assert np.isfinite(rounded(normal((8, 64)) * 1e20, fmt)).all()
