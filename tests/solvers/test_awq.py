"""AWQ's searches: never worse than doing nothing, on the real output error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant.core.formats import compute_params, decode, encode
from jquant.core.method import Rounding
from jquant.core.stats import Stats
from jquant.solvers.awq import candidates, clip_search, clip_solver, scale_losses
from tests.problems import correlated, objective

FORMATS = ["int4-g5", "int3-g4-asym", "int4", "int8-tensor", "nf4-g8", "int4-g64-asym"]
FACTORS = (0.9, 0.8, 0.7, 0.6)


def _rounded(w, params, fmt):
    return np.asarray(decode(encode(w, params, fmt), params, fmt), np.float64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_clipping_never_raises_a_rows_output_error(name, seed):
    fmt, problem = jq.parse_format(name), correlated(seed, 7, 18, dead=2)
    w, h = jnp.asarray(problem.w, jnp.float32), jnp.asarray(problem.h, jnp.float32)
    plain = objective(problem.w, _rounded(w, compute_params(w, fmt), fmt), problem.h)
    found = objective(problem.w, _rounded(w, clip_search(w, h, fmt, FACTORS), fmt), problem.h)
    if fmt.block == "tensor":
        assert found.sum() <= plain.sum() * (1 + 1e-5)
    else:
        assert (found <= plain * (1 + 1e-5) + 1e-6 * plain.max()).all()


def test_clipping_finds_the_outlier_that_no_input_meets():
    """A weight of 100 on a channel that is never active: the range is better spent on the others."""
    w = np.linspace(-1, 1, 16)[None].astype(np.float32)
    w[0, 3] = 2.0
    h = np.eye(16, dtype=np.float32)
    h[3, 3] = 0
    fmt = jq.parse_format("int4")
    params = clip_search(jnp.asarray(w), jnp.asarray(h), fmt, FACTORS)
    assert float(params.scale[0, 0]) < float(compute_params(jnp.asarray(w), fmt).scale[0, 0])


@pytest.mark.parametrize("name", FORMATS)
def test_the_losses_of_candidates(name):
    fmt, problem = jq.parse_format(name), correlated(3, 5, 18)
    w, h = jnp.asarray(problem.w, jnp.float32), jnp.asarray(problem.h, jnp.float32)
    scales = np.exp(0.3 * np.random.default_rng(0).normal(size=(3, 18)))
    scales[0] = 1
    losses = scale_losses(w, h, jnp.asarray(scales, jnp.float32), fmt)
    for s, loss in zip(scales.astype(np.float32), losses):
        rows = w * s
        want = objective(problem.w, _rounded(rows, compute_params(rows, fmt), fmt) / s, problem.h).sum()
        assert float(loss) == pytest.approx(want, rel=1e-4)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=6), st.integers(1, 5))
def test_candidates_are_positive_and_begin_with_ones(x, grid):
    x = np.asarray(x)
    tried = candidates(x, np.resize([0.5, 0.0, 1.0], len(x)), grid)
    assert tried.shape == (1 + 2 * grid, len(x)) and (tried[0] == 1).all()
    assert np.isfinite(tried).all() and (tried > 0).all()
    assert (tried[:, (x <= 0) | (np.resize([0.5, 0.0, 1.0], len(x)) == 0)] == 1).all()


def test_the_solver_keeps_scales_that_were_chosen_and_wants_a_gram_matrix():
    w = jnp.asarray(correlated(0, 4, 16).w, jnp.float32)[None]
    fmt = jq.parse_format("int4-g8")
    given_params = jax.tree.map(lambda a: a[None], compute_params(w[0] * 2, fmt))
    stats = Stats(jnp.eye(16)[None], jnp.ones((1, 16)), jnp.ones((1, 16)), jnp.ones(1))
    done = clip_solver(FACTORS)(Rounding(w, given_params), stats, fmt)
    np.testing.assert_array_equal(done.params.scale, given_params.scale)
    with pytest.raises(ValueError, match="Gram matrix"):
        clip_solver(FACTORS)(Rounding(w), None, fmt)
