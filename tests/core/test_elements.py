"""Every code of every element type: what it stands for, and what rounds to it."""

import math
import statistics

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jquant.core.formats import ELEMENTS, NF4_VALUES, Format, code_table, decode_codes, encode_scaled
from tests.core.cases import CODINGS, INTS, same_bits

# The table of bitsandbytes' `get_4bit_type("nf4")`, copied digit for digit: what NF4 files in the wild mean.
BITSANDBYTES_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def fp8_by_the_specification(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """OCP's 8-bit floating point specification (OFP8), section 5, read into Python's arithmetic."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if exponent_bits == 5 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent_bits == 4 and exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(2**mantissa_bits + mantissa, exponent - bias - mantissa_bits)


@pytest.mark.parametrize("element", INTS)
def test_symmetric_integers_are_twos_complement(element):
    bits = ELEMENTS[element].bits
    want = [c if c < 2 ** (bits - 1) else c - 2**bits for c in range(2**bits)]
    assert code_table(Format(element)).tolist() == want
    assert (min(want), max(want)) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("element", INTS)
def test_asymmetric_integers_are_unsigned(element):
    assert code_table(Format(element, symmetric=False)).tolist() == list(range(2 ** ELEMENTS[element].bits))


def test_nf4_is_the_published_table():
    assert list(NF4_VALUES) == BITSANDBYTES_NF4
    assert code_table(Format("nf4")).tolist() == BITSANDBYTES_NF4


def test_nf4_is_the_quantiles_of_a_normal_distribution():
    """QLoRA's construction: 8 positive and 7 negative quantiles from the same offset, zero, divided by the largest."""
    offset, ppf = 0.9677083, statistics.NormalDist().inv_cdf
    positive = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    want = sorted([*positive, 0.0, *negative])
    want = np.array(want) / max(want)
    # The published digits were computed from float32 quantiles: half an ulp of 1.0 for each of the two and
    # for their quotient.
    np.testing.assert_allclose(NF4_VALUES, want, rtol=0, atol=3 * 2.0**-24)


@pytest.mark.parametrize(
    ("element", "dtype", "shape"),
    [("fp8_e4m3", ml_dtypes.float8_e4m3fn, (4, 3, 7)), ("fp8_e5m2", ml_dtypes.float8_e5m2, (5, 2, 15))],
)
def test_fp8_is_the_specification_and_ml_dtypes(element, dtype, shape):
    want = np.array([fp8_by_the_specification(c, *shape) for c in range(256)], np.float32)
    np.testing.assert_array_equal(code_table(Format(element)), want)
    np.testing.assert_array_equal(code_table(Format(element)), np.arange(256, dtype=np.uint8).view(dtype).astype("f4"))
    assert np.nanmax(want[np.isfinite(want)]) == ELEMENTS[element].top


@pytest.mark.parametrize("fmt", CODINGS, ids=str)
def test_decode_codes_reads_the_table(fmt):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    for decode in (decode_codes, jax.jit(decode_codes, static_argnums=1)):
        values = decode(jnp.asarray(codes), fmt)
        assert values.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(values), code_table(fmt))
        assert np.array_equal(np.signbit(values), np.signbit(code_table(fmt)))


@pytest.mark.parametrize("fmt", CODINGS, ids=str)
def test_every_code_is_its_own_nearest(fmt):
    table = code_table(fmt)
    codes = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    np.testing.assert_array_equal(encode_scaled(jnp.asarray(table[codes]), 0.0, fmt), codes)


@pytest.mark.parametrize("element", INTS)
def test_every_code_is_its_own_nearest_around_every_zero_point(element):
    fmt = Format(element, symmetric=False)
    codes, zero = np.meshgrid(np.arange(2**fmt.bits), np.arange(2**fmt.bits))
    values = jnp.asarray(codes - zero, jnp.float32)
    np.testing.assert_array_equal(encode_scaled(values, jnp.asarray(zero, jnp.float32), fmt), codes)


def nearest(values: np.ndarray, fmt: Format) -> np.ndarray:
    """The codes nearest to `values`, by brute force over the table in float64.

    Ties: integers go to the even value, fp8 to the even mantissa (the even code), codebooks to the lower value. Nothing
    is encoded to NaN, infinity or a second zero of the same distance.
    """
    table = code_table(fmt).astype(np.float64)
    finite = np.where(np.isfinite(table), table, np.nan)
    # Beyond an end, that end is nearest (float64 can't tell 1e30 - 1 from 1e30 - 2).
    inside = np.clip(values.astype(np.float64), np.nanmin(finite), np.nanmax(finite))
    distance = np.abs(inside[:, None] - finite)
    best = distance == np.nanmin(distance, axis=1, keepdims=True)
    odd = np.arange(len(table)) % 2 if ELEMENTS[fmt.element].kind != "codebook" else np.arange(len(table))
    # Of the two zeros of a float, the one with the sign of the value.
    wrong_zero = (table == 0)[None] & (np.signbit(table)[None] != np.signbit(values)[:, None])
    if ELEMENTS[fmt.element].kind != "float":
        wrong_zero[:] = False
    return np.argmin(np.where(best & ~wrong_zero, odd[None], 1000), axis=1).astype(np.uint8)


def hard_values(fmt: Format) -> np.ndarray:
    """All values and midpoints of the table with their float32 neighbours, and numbers beyond both ends."""
    table = np.unique(code_table(fmt)[np.isfinite(code_table(fmt))])
    middle = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    points = np.concatenate([table, middle])
    around = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    ends = np.float32([1.5, 2, 1e3, 1e30]) * np.abs(table).max()
    random = np.random.default_rng(0).uniform(table.min() - 1, table.max() + 1, 1000).astype(np.float32)
    values = np.concatenate([*around, ends, -ends, random])
    # XLA's CPU and GPU code flushes subnormal float32 to zero; no element is that small.
    return values[(np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)]


@pytest.mark.parametrize("fmt", CODINGS, ids=str)
def test_encode_is_nearest(fmt):
    values = hard_values(fmt)
    want = nearest(values, fmt)
    np.testing.assert_array_equal(encode_scaled(jnp.asarray(values), 0.0, fmt), want)
    np.testing.assert_array_equal(jax.jit(encode_scaled, static_argnums=2)(jnp.asarray(values), 0.0, fmt), want)


@hypothesis.given(
    fmt=st.sampled_from(CODINGS),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1),
)
def test_encode_is_nearest_for_any_number(fmt, values):
    values = np.float32(values)
    np.testing.assert_array_equal(encode_scaled(jnp.asarray(values), 0.0, fmt), nearest(values, fmt))


@pytest.mark.parametrize("element", INTS)
def test_encode_is_nearest_around_every_zero_point(element):
    """Ties with a zero point: the offset from zero is rounded half to even, before the zero point is added."""
    fmt = Format(element, symmetric=False)
    top = 2**fmt.bits - 1
    halves = np.arange(-2 * top - 4, 2 * top + 5, dtype=np.float32) / 2
    values = np.concatenate([halves, np.nextafter(halves, np.float32(99)), np.nextafter(halves, np.float32(-99))])
    values = values[(np.abs(values) > 1e-30) | (values == 0)]
    for zero in {0, 1, 2, top // 2, top - 1, top}:
        codes = np.asarray(encode_scaled(jnp.asarray(values), float(zero), fmt)).astype(np.int64)
        distance = np.abs(values.astype(np.float64)[:, None] - (np.arange(top + 1) - zero))
        chosen = np.take_along_axis(distance, codes[:, None], 1)[:, 0]
        np.testing.assert_array_equal(chosen, distance.min(1))
        tie = (distance == distance.min(1, keepdims=True)).sum(1) == 2
        assert tie.any() and ((codes[tie] - zero) % 2 == 0).all()


@pytest.mark.parametrize("element", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_rounds_as_ml_dtypes_inside_the_range(element):
    dtype = np.dtype(ELEMENTS[element].storage)
    values = hard_values(Format(element))
    values = values[np.abs(values) <= ELEMENTS[element].top]
    assert same_bits(encode_scaled(jnp.asarray(values), 0.0, Format(element)), values.astype(dtype).view(np.uint8))
