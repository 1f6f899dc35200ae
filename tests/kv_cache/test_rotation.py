"""Rotations are orthogonal, so scores do not change; spikes need two of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.kv_cache.coding import decode_vectors, encode_vectors, lloyd_max, static_scale
from jquant.kv_cache.format import Coding, parse_coding
from jquant.kv_cache.rotation import rotate, unrotate


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("times", [1, 2])
def test_scores_do_not_change_and_the_inverse_gives_the_vector_back(dim, times):
    q, k = normal(5, dim), normal(7, dim, seed=1)
    turned = rotate(q, times, 3) @ rotate(k, times, 3).T
    np.testing.assert_allclose(turned, q @ k.T, atol=1e-4)
    np.testing.assert_allclose(unrotate(rotate(k, times, 3), times, 3), k, atol=1e-5)
    assert not np.allclose(rotate(k, times, 3), rotate(k, times, 4), atol=0.1)  # another seed, other signs


@pytest.mark.parametrize("times", [1, 2])
def test_a_vector_gets_the_same_bits_alone_and_among_others(times):
    x = normal(33, 96)
    many = jax.jit(rotate, static_argnums=(1, 2))(x, times, 0)
    for i in (0, 7, 32):
        np.testing.assert_array_equal(jax.jit(rotate, static_argnums=(1, 2))(x[i : i + 1], times, 0)[0], many[i])


def _error(x, coding):
    """Relative squared error of each vector."""
    store = encode_vectors(rotate(x[None, None], coding.rotations, 0), coding, static_scale(coding, 1, None))
    values, scale = decode_vectors(store, coding, x.shape[-1])
    values = values if scale is None else values * scale[..., None]
    back = np.asarray(unrotate(values, coding.rotations, 0)[0, 0], np.float64)
    x = np.asarray(x, np.float64)
    return ((back - x) ** 2).sum(-1) / (x**2).sum(-1)


@pytest.mark.parametrize("bits, distortion", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_reaches_the_distortion_of_normal_numbers(bits, distortion):
    """The values of Max (1960), table I."""
    found = _error(normal(400, 128), Coding(f"lloyd{bits}", rotations=1)).mean()
    assert distortion * 0.9 < found < distortion * 1.05


def test_lloyd_max_values_are_the_published_ones():
    np.testing.assert_allclose(lloyd_max(2), [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)
    upper = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]
    np.testing.assert_allclose(lloyd_max(4)[8:], upper, atol=5e-4)


def test_one_rotation_is_not_enough_for_spikes_and_two_are():
    """A spike is turned into numbers of one size, all near the same edge of a cell: their errors do not average out.

    For normal numbers the distortion of 2 bits is 0.1175. After one rotation of a spike in small noise the numbers lie
    on both sides of the codebook's edge at 0.98 (with the norm as scale, as in the paper, 0.21; the scale that is best
    for the codes takes away the part that all numbers have in common). After two they are as good as normal.
    """
    spikes = jnp.eye(128)[:100] + 0.008 * normal(100, 128)
    one, two = (_error(spikes, Coding("lloyd2", rotations=n)).mean() for n in (1, 2))
    assert one > 0.145
    assert two < 0.13


def test_int4_gains_from_a_rotation_where_a_channel_stands_out():
    x = normal(200, 64) * jnp.where(jnp.arange(64) == 5, 30.0, 1.0)
    plain, turned = (_error(x, parse_coding(n)).mean() for n in ("int4-g64-asym", "int4-g64-asym-rot"))
    assert turned < plain / 3


@pytest.mark.parametrize("size, gain", [(16, 0.82), (64, 0.94)])
def test_a_zero_point_between_codes_and_a_search_that_moves_it_gain(size, gain):
    """Of normal numbers in 4 bits; not more bytes, as both kinds of zero points take one."""
    x = normal(400, 64)
    whole, between = (_error(x, parse_coding(f"int4-g{size}-asym{z}-e4m3-search")).mean() for z in ("", "-ze3m4"))
    assert between < gain * whole


def test_four_over_six_chooses_the_better_of_two_scales():
    """A vector's error is never larger, and over many it is smaller."""
    one, two = (_error(normal(300, 64), parse_coding(n)) for n in ("nvfp4", "nvfp4-4o6"))
    assert (two <= one * (1 + 1e-6)).all()
    assert two.mean() < 0.95 * one.mean()
