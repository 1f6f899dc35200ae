"""The bank of problems is what it says."""

import numpy as np
import pytest

from tests.problems import correlated, identical, independent, objective, pair


@pytest.mark.parametrize("tokens, dead", [(None, 0), (3, 0), (None, 2), (5, 4)])
def test_correlated_inputs_have_the_rank_and_the_dead_channels_asked_for(tokens, dead):
    w, h = correlated(0, 3, 9, tokens, dead)
    assert w.shape == (3, 9) and (h == h.T).all() and np.linalg.eigvalsh(h)[0] > -1e-12 * np.trace(h)
    assert np.linalg.matrix_rank(h) == min(9 - dead, tokens or 9)
    assert (np.diag(h) == 0).sum() == dead


def test_the_objective_is_the_squared_error_of_the_output():
    rng = np.random.default_rng(0)
    w, q, x = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.normal(size=(20, 5))
    np.testing.assert_allclose(objective(w, q, x.T @ x), ((x @ (w - q).T) ** 2).sum(0))


def test_independent_inputs_weigh_each_error_on_its_own():
    w, h = independent(0, 2, 4)
    np.testing.assert_allclose(objective(w, np.round(w), h), ((w - np.round(w)) ** 2 * np.diag(h)).sum(1))


def test_identical_inputs_see_the_sum_of_the_errors():
    w, h = identical(0, 2, 4)
    np.testing.assert_allclose(objective(w, np.round(w), h), (w - np.round(w)).sum(1) ** 2)


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.5, 0.56, 0.58, 0.9])
def test_the_second_of_a_pair_makes_good_the_error_of_the_first(rho):
    w, h = pair(rho)
    cost = lambda second: objective(w, np.array([[1.0, second]]), h)[0]
    grid = np.linspace(6, 9, 3001)
    assert grid[np.argmin([cost(second) for second in grid])] == pytest.approx(7.25 + 0.4375 * rho, abs=1e-3)
    assert (cost(8) < cost(7)) == (rho > 4 / 7)
