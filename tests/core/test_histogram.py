"""Histograms add up, and the ranges they give are those of the numbers themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.core.activation import Activation
from jquant.core.formats import compute_params, decode, encode
from jquant.core.histogram import BINS, Histogram, find_range, histogram, merge_histograms
from tests.model_bank import quick

counted = quick(histogram)


def sample(seed: int, shape=(2, 300, 8), tail: float = 1.5) -> jax.Array:
    """Numbers with a few outliers, more of them positive, each of the batch with its own scale."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(tail * np.abs(rng.standard_normal(shape))) + 0.3
    return jnp.asarray(x * np.exp2(rng.integers(-12, 12, (shape[0], 1, 1))), jnp.float32)


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_parts_add_up_to_the_whole(seed):
    x = sample(seed)
    parts = merge_histograms(counted(x[:, :100]), counted(x[:, 100:]))
    for a, b in zip(parts, counted(x), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(parts.counts.sum(-1) == 300 * 8)


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([90.0, 99.0, 99.9, 100.0]))
def test_percentiles(seed, percentile):
    x = sample(seed)
    flat = np.asarray(x, np.float64).reshape(2, -1)
    seen = counted(x)
    even = Activation("int8", "tensor", True, "percentile", percentile)
    low, high = find_range(seen, even)
    # At a bin's width from the two numbers next to it.
    near = lambda a, q: (np.quantile(a, q, axis=-1, method="lower"), np.quantile(a, q, axis=-1, method="higher"))
    under, over = near(np.abs(flat), percentile / 100)
    assert np.all(low == -high) and np.all(high >= under * (1 - 1 / 32)) and np.all(high <= over * (1 + 1 / 32))
    uneven = Activation("int8", "tensor", False, "percentile", percentile)
    low, high = find_range(seen, uneven)
    under, over = near(flat, percentile / 100)
    assert np.all(high >= under * (1 - 1 / 32)) and np.all(high <= over * (1 + 1 / 32))
    under, over = near(flat, 1 - percentile / 100)
    assert np.all(low >= under * (1 + 1 / 32)) and np.all(low <= over * (1 - 1 / 32))
    if percentile == 100.0:
        np.testing.assert_array_equal(high, flat.max(-1).astype(np.float32))


def error(x, low, high, act):
    """The squared error of numbers under a range, by rounding them."""
    ends = jnp.stack([low, high], -1)[..., None, :]
    params = jax.vmap(lambda e: compute_params(e, act.format))(ends)
    rows = x.reshape(x.shape[0], 1, -1)
    each = jax.tree.map(lambda a: a.reshape(-1, 1, 1), params)
    return np.asarray(jnp.sum((decode(encode(rows, each, act.format), each, act.format) - rows) ** 2, (-2, -1)))


@pytest.mark.parametrize("act", [
    Activation("int8", "tensor", True, "mse"), Activation("int8", "tensor", False, "mse"),
    Activation("int4", "tensor", True, "mse"), Activation("fp8_e4m3", "tensor", True, "mse"),
], ids=str)  # fmt: skip
def test_the_mse_range_is_near_the_best_and_no_worse_than_all(act):
    x = sample(3, (3, 400, 16))
    seen = counted(x)
    low, high = find_range(seen, act)
    whole = find_range(seen, act.replace(range="max"))
    mine, all_of_it = error(x, low, high, act), error(x, *whole, act)
    assert np.all(mine <= all_of_it * 1.001)
    factors = np.exp2(-np.arange(0, 7, 0.125)).tolist()
    best = np.min([error(x, whole[0] * f, whole[1] * f, act) for f in factors], axis=0)
    assert np.all(mine <= 1.05 * best)
    if act.element == "int4":
        assert np.all(mine < 0.85 * all_of_it)  # outliers are cut


def test_degenerate_inputs():
    nothing = counted(jnp.zeros((1, 3, 4)))
    for how in ("max", "percentile", "mse"):
        for symmetric in (True, False):
            low, high = find_range(nothing, Activation("int8", "tensor", symmetric, how))
            assert low == 0 and high == 0
    constant = counted(jnp.full((1, 3, 4), 2.0))
    for how in ("max", "percentile", "mse"):
        low, high = find_range(constant, Activation("int8", "tensor", False, how))
        assert low == 0 and high == 2
    wild = counted(jnp.asarray([[[1e-30, -1e-42, 1e20, jnp.inf, jnp.nan]]]))
    assert wild.counts.sum() == 3 and wild.high == np.float32(1e20)
    assert counted(jnp.zeros((2, 0, 4))).counts.shape == (2, 2 * BINS)
    assert counted(jnp.ones((1, 2, 3), jnp.bfloat16)).counts.sum() == 6


@pytest.mark.parametrize("n", [96, 1536, 577])
def test_a_large_batch_is_sampled_from_every_channel(n):
    tokens = 2**18 // n
    x = jnp.broadcast_to(jnp.asarray(np.exp2(np.arange(n) % 48 - 24.0), jnp.float32), (1, tokens, n))
    counts = np.asarray(counted(x).counts[0])
    assert 2**14 <= counts.sum() <= 2**16
    met = counts[counts > 0]
    assert len(met) == 48 and met.max() < 1.5 * met.min()


def test_masked_tokens_do_not_count():
    x = sample(1, (1, 20, 4))
    mask = jnp.arange(20) < 7
    some = counted(jnp.broadcast_to(x, (2, 20, 4)), jnp.stack([mask, ~mask]))
    for i, part in enumerate((x[:, :7], x[:, 7:])):
        for a, b in zip(jax.tree.map(lambda a, i=i: a[i : i + 1], some), counted(part), strict=True):
            np.testing.assert_array_equal(a, b)
    assert isinstance(some, Histogram)
