"""Codes really packed: every width, every code, every length; not a bit more than they need."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.packing import codes_per_byte, pack, packed_nbytes, plane_widths, unpack
from tests.core.cases import same_bits

WIDTHS = range(1, 9)


def random_codes(shape, bits, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_are_powers_of_two_and_add_up(bits):
    widths = plane_widths(bits)
    assert sum(widths) == bits
    assert set(widths) <= {1, 2, 4, 8}
    assert list(widths) == sorted(set(widths), reverse=True)
    assert codes_per_byte(bits) == 8 // widths[0]


@pytest.mark.parametrize("bits", [0, -1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        plane_widths(bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_comes_back(bits):
    """Every code at every place in a byte: all codes, rolled by each of the eight offsets."""
    codes = np.stack([np.roll(np.arange(2**bits, dtype=np.uint8), shift) for shift in range(8)])
    assert same_bits(unpack(pack(jnp.asarray(codes), bits), bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [0, 1, 3, 8, 15, 64])
def test_every_length_comes_back_in_the_bytes_it_needs(bits, n):
    codes = random_codes((3, n), bits)
    planes = pack(codes, bits)
    assert same_bits(unpack(planes, bits, n), codes)
    assert [p.dtype for p in planes] == [jnp.uint8] * len(planes)
    # Each plane ends in its own byte: ceil(n * width / 8) of them, and n * bits / 8 in all where 8 divides n.
    assert [p.shape for p in planes] == [(3, (n * w + 7) // 8) for w in plane_widths(bits)]
    assert sum(p.size for p in planes) == 3 * packed_nbytes(n, bits)
    if n % 8 == 0:
        assert packed_nbytes(n, bits) * 8 == n * bits


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_axes_stay(bits, shape):
    codes = random_codes((*shape, 11), bits)
    planes = pack(codes, bits)
    assert all(p.shape[:-1] == shape for p in planes)
    assert same_bits(unpack(planes, bits, 11), codes)


@hypothesis.given(st.data())
def test_any_codes_come_back(data):
    bits = data.draw(st.integers(1, 8))
    n = data.draw(st.sampled_from([1, 5, 33]))  # each length is compiled
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n))
    packed = pack(jnp.asarray(codes, jnp.uint8), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_layout(bits):
    """Planes hold the high bits first; in a plane, consecutive codes fill a byte from its low bits up."""
    n = 13
    codes = np.asarray(random_codes((n,), bits))
    left = bits
    for width, plane in zip(plane_widths(bits), pack(jnp.asarray(codes), bits), strict=True):
        left -= width
        field = [(int(c) >> left) & (2**width - 1) for c in codes]
        number = sum(f << (i * width) for i, f in enumerate(field))
        assert np.asarray(plane).tobytes() == number.to_bytes((n * width + 7) // 8, "little")


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_four_bits_are_xlas_own_order(dtype):
    """Reading packed 4-bit codes as XLA's int4 is a bitcast, no shuffle."""
    codes = random_codes((3, 16), 4)
    (packed,) = pack(codes, 4)
    cast = jax.lax.bitcast_convert_type(packed, jnp.dtype(dtype)).reshape(3, 16)
    np.testing.assert_array_equal(np.asarray(cast.astype(jnp.int32)) & 15, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_slices_of_rows_are_slices_of_planes(bits):
    codes = random_codes((4, 32), bits)
    planes = pack(codes, bits)
    assert all(same_bits(p[1:3], q) for p, q in zip(planes, pack(codes[1:3], bits)))
    # Along a row too, at multiples of eight codes: what sharding a contracted axis does.
    half = [same_bits(p[:, : p.shape[1] // 2], q) for p, q in zip(planes, pack(codes[:, :16], bits))]
    assert all(half)


@pytest.mark.parametrize("bits", WIDTHS)
def test_jit_and_vmap(bits):
    codes = random_codes((2, 3, 9), bits)
    both = jax.jit(jax.vmap(lambda c: unpack(pack(c, bits), bits, 9)))
    assert same_bits(both(codes), codes)
