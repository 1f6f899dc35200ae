"""Products of 8-bit codes, in Pallas' interpreter (on a GPU: its own), against float64.

int8 sums are exact, fp8 sums float32.
"""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.low_precision_matmul import low_precision_matmul, reference
from pallas_kernels.quantized_matmul import Tiling
from tests.pallas_kernels.cases import interpreted

SMALL = Tiling(block_m=16, block_n=16, block_k=32, warps=1, stages=1)


def operands(dtype, m, n, k, group=None, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda rows: jnp.asarray(rng.integers(-100, 100, (rows, k)), jnp.float32).astype(dtype)
    blocks = 1 if group is None else -(-k // group)
    scale = lambda rows: jnp.asarray(rng.uniform(0.01, 1, (rows, blocks)), jnp.float32)
    return draw(m), draw(n), scale(m), scale(n)


def check(args, group=None, tiling=SMALL, **options):
    how = dict(group_size=group, out_dtype=jnp.float32, tiling=tiling, interpret=interpreted())
    got = low_precision_matmul(*args, **how, **options)
    wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in args]
    block = np.zeros(wide[0].shape[1], int) if group is None else np.arange(wide[0].shape[1]) // group
    a, b = wide[0] * wide[2][:, block], wide[1] * wide[3][:, block]
    size = np.abs(a) @ np.abs(b).T + 1e-9
    assert np.max(np.abs(np.asarray(got) - a @ b.T) / size) < 1e-6
    want = reference.low_precision_matmul(*args, group_size=group, out_dtype=jnp.float32)
    assert np.max(np.abs(np.asarray(want) - a @ b.T) / size) < 1e-6


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("group", [None, 32])
def test_the_product_is_right(dtype, group):
    check(operands(dtype, 5, 20, 70, group), group)


@pytest.mark.parametrize("group", [None, 32])
def test_uint8_stand_for_the_int8_that_are_128_less(group):
    a, b, *scales = operands("int8", 5, 20, 70, group)
    moved = (b.astype(jnp.int32) + 128).astype(jnp.uint8)
    how = dict(group_size=group, out_dtype=jnp.float32)
    kernel = lambda b: low_precision_matmul(a, b, *scales, tiling=SMALL, interpret=interpreted(), **how)
    np.testing.assert_array_equal(kernel(moved), kernel(b))
    plain = lambda b: reference.low_precision_matmul(a, b, *scales, **how)
    np.testing.assert_array_equal(plain(moved), plain(b))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_gpu_without_fp8_multiplies_the_same_numbers_in_float16(dtype):
    check(operands(dtype, 5, 20, 70), device="a100")


@hypothesis.given(
    m=st.integers(1, 20), n=st.integers(1, 40), k=st.integers(1, 100), split=st.sampled_from([1, 2]),
    group=st.sampled_from([None, 64]),
)  # fmt: skip
@hypothesis.settings(max_examples=5)
def test_ragged_shapes_are_right(m, n, k, split, group):
    check(operands("int8", m, n, k, group), group, SMALL._replace(split_k=split))


def test_int8_sums_do_not_round():
    """2**24 and more is beyond float32's integers, not beyond int32's."""
    a, b = jnp.full((1, 2048), 127, jnp.int8), jnp.full((1, 2048), 127, jnp.int8).at[0, 0].set(126)
    one = jnp.ones((1, 1), jnp.float32)
    got = low_precision_matmul(
        a, b, one, one, out_dtype=jnp.float32, interpret=interpreted(), tiling=SMALL._replace(block_k=128)
    )
    assert float(got[0, 0]) == np.float32(127 * 127 * 2047 + 127 * 126)


def test_scales_of_a_whole_tensor_are_spread():
    a, b, _, _ = operands("int8", 3, 5, 32)
    one = jnp.full((1, 1), 0.5, jnp.float32)
    check((a, b, jnp.broadcast_to(one, (3, 1)), jnp.broadcast_to(one, (5, 1))))
    got = low_precision_matmul(a, b, one, one, out_dtype=jnp.float32, interpret=interpreted(), tiling=SMALL)
    np.testing.assert_array_equal(
        got,
        low_precision_matmul(
            a, b, *(jnp.full((r, 1), 0.5) for r in (3, 5)), out_dtype=jnp.float32, interpret=interpreted(), tiling=SMALL
        ),
    )


def test_errors_say_why():
    a, b, s, t = operands("int8", 2, 3, 32)
    with pytest.raises(ValueError, match="int8 x float8_e4m3fn"):
        low_precision_matmul(a, b.astype(jnp.float8_e4m3fn), s, t)
    with pytest.raises(ValueError, match="groups of 24"):
        low_precision_matmul(a, b, s, t, group_size=24)
