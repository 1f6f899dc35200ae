"""The bit tricks of the kernels, on every code there is: the arithmetic that no simulator has to run."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import reference, triton, upcast
from pallas_kernels.quantized_matmul.elements import ELEMENTS, element, plane_widths, values

DTYPES = (jnp.bfloat16, jnp.float16)


def every_code(bits: int) -> jnp.ndarray:
    return jnp.arange(2**bits, dtype=jnp.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_exact_for_every_code_and_zero_point(bits, dtype):
    codes = every_code(bits)
    np.testing.assert_array_equal(
        upcast.integers(codes, bits, None, dtype).astype(jnp.float32), values(f"int{bits}", signed=True)
    )
    zero = np.arange(2**bits, dtype=np.float32)[:, None]
    got = upcast.integers(codes[None], bits, jnp.asarray(zero).astype(dtype), dtype)
    np.testing.assert_array_equal(got.astype(jnp.float32), np.arange(2**bits) - zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_point_between_codes_is_rounded_once(dtype):
    zero = jnp.asarray([[0.3], [7.77], [14.5]], jnp.float32)
    got = upcast.integers(every_code(4)[None], 4, zero, dtype)
    assert got.dtype == dtype
    want = (np.arange(16, dtype=np.float32) - np.asarray(zero)).astype(np.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n, e in ELEMENTS.items() if e.kind == "float"])
def test_small_floats_are_exact_up_to_their_unit_subnormal_numbers_included(name, dtype):
    e, want = element(name), values(name, True)
    got = np.asarray(upcast.small_floats(every_code(e.bits), e, dtype), np.float32) / upcast.small_float_unit(e)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[finite], want[finite])


def test_a_table_is_looked_up_in_every_dtype():
    table = element("nf4").table
    for dtype in (ml_dtypes.bfloat16, np.float16):
        near = tuple(np.asarray(table, np.float32).astype(dtype).astype(np.float32))
        got = upcast.table(every_code(4), near, jnp.dtype(dtype))
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(near, np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_lanes_of_words_are_the_codes(bits):
    """Every code is found in its word and lane: lane l of word j is code j * lanes + l."""
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    name = f"int{bits}"
    words = triton._words(reference.pack(jnp.asarray(codes), bits), triton.Weight(name, 0, True, 64))
    assert len({w.shape for w in words}) == 1
    lanes = [upcast.lane_codes(tuple(words), bits, lane) for lane in range(upcast.lanes(bits))]
    np.testing.assert_array_equal(np.stack(lanes, -1).reshape(3, 64), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 33])
def test_unpack_inverts_pack_and_no_bit_is_wasted(bits, count):
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 2**bits, (2, count)), jnp.uint8)
    planes = reference.pack(codes, bits)
    assert [p.shape[-1] for p in planes] == [-(-count * w // 8) for w in plane_widths(bits)]
    np.testing.assert_array_equal(reference.unpack(planes, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_layout_is_that_of_the_quantized_weights(bits):
    """What `jquant.core.packing` stores is read as it is."""
    packing = pytest.importorskip("jquant.core.packing")
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 2**bits, (2, 37)), jnp.uint8)
    for ours, theirs in zip(reference.pack(codes, bits), packing.pack(codes, bits), strict=True):
        np.testing.assert_array_equal(ours, theirs)
