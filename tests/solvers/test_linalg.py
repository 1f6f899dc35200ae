"""The factorization, the damping rule, and the plan of nested blocks."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.solvers.ldlq import make_plan
from jquant.solvers.linalg import cholesky, damped_udu, transposed_rows, udu, unit_lower_inverse
from tests.problems import correlated


@pytest.mark.parametrize("n", [1, 2, 37, 129, 255, 257, 601, pytest.param(2050, marks=pytest.mark.slow)])
def test_udu_is_the_factorization_and_reads_the_lower_triangle(n):
    h, added = correlated(0, 1, n).h, np.linspace(0, 1, n)
    garbage = np.triu(np.full((n, n), np.nan), 1)
    root = np.linalg.cholesky((h + np.diag(added))[::-1, ::-1])[::-1, ::-1]
    with jax.enable_x64(True):
        ut, d = udu(jnp.asarray(h + garbage), added)
        np.testing.assert_allclose(d, np.diag(root) ** 2, rtol=1e-9)
        np.testing.assert_allclose(ut.T * np.sqrt(d), root, rtol=1e-9, atol=1e-9 * root.max())
    np.testing.assert_array_equal(np.triu(ut), np.eye(n))
    ut, d = udu(jnp.asarray(h, jnp.float32))
    assert ut.dtype == d.dtype == np.float32 and np.abs((ut.T * d) @ ut - h).max() < 1e-6 * np.trace(h)


@pytest.mark.parametrize("n", [1, 37, 128, 129, 300, 512])
def test_cholesky_is_that_of_lapack_and_reads_the_lower_triangle(n):
    h = correlated(1, 1, n).h
    with jax.enable_x64(True):
        lower = cholesky(jnp.asarray(h + np.triu(np.full((n, n), np.nan), 1)))
    np.testing.assert_allclose(lower, np.linalg.cholesky(h), rtol=1e-9, atol=1e-9 * np.sqrt(h.max()))


@hypothesis.given(st.integers(1, 70), st.integers(1, 9))
def test_rows_are_transposed_few_at_a_time(count, k):
    a = np.random.default_rng(count).normal(size=(count, k)).astype(np.float32)
    np.testing.assert_array_equal(
        transposed_rows(count, lambda at, few: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), at, few)), a.T
    )


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("at", [(0, 0), (-1, -1), (-1, 0)])
def test_where_it_is_not_definite_or_not_finite_the_diagonal_says_so(n, at):
    value = -1.0 if at[0] == at[1] else np.inf
    assert not jnp.isfinite(udu(jnp.eye(n).at[at].set(value))[1]).all()


@pytest.mark.parametrize("n", [1, 2, 37, 64, 130])
def test_unit_lower_inverse_reads_only_what_is_below_the_diagonal(n):
    a = np.random.default_rng(0).normal(size=(n, n)) / np.sqrt(n)
    with jax.enable_x64(True):
        inverse = unit_lower_inverse(jnp.asarray(a))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.tril(a, -1) + np.eye(n)), rtol=1e-8, atol=1e-8)


def test_damping_is_the_first_of_the_powers_of_ten_that_will_do():
    ones = jnp.ones((8, 8))
    assert damped_udu(jnp.eye(8), 0.0)[2] == 0
    assert damped_udu(ones, 0.01)[2] == jnp.float32(0.01)
    assert damped_udu(ones, 100.0)[2] == 100
    # The least eigenvalue is -0.05: 0.01 is too little, 0.1 is enough.
    ut, d, damping = jax.jit(lambda h: damped_udu(h, 0.01))(jnp.eye(8).at[0, 0].set(-0.05))
    assert damping == pytest.approx(0.1) and jnp.isfinite(ut).all() and (d > 0).all()


def test_damping_ends_and_leaves_the_identity():
    ut, d, damping = damped_udu(-100 * jnp.eye(4), 0.01)
    np.testing.assert_array_equal(ut, np.eye(4))
    np.testing.assert_array_equal(d, 1)
    assert damping == pytest.approx(10)


@hypothesis.given(st.integers(1, 5000), st.integers(1, 600), st.none() | st.integers(1, 600))
def test_blocks_nest_and_cover_all_columns(n, block_size, group):
    plan = make_plan(n, block_size, group)
    assert plan.n == n <= plan.padded and plan.padded % plan.sizes[0] == 0
    assert all(a > b and a % b == 0 for a, b in zip(plan.sizes, plan.sizes[1:], strict=False))
    if group is not None:
        assert group in plan.sizes
    assert plan.padded - n < max(plan.sizes[0], group or 1)
