"""Inputs taken apart: the least noise of its rank, and what the methods behind see, against float64 numpy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.formats import Format, decode
from jquant.core.method import Rounding, chain
from jquant.core.stats import Stats, without
from jquant.fold.awq import awq
from jquant.solvers.gptaq import gptaq
from jquant.solvers.gptq import gptq
from jquant.solvers.lowrank import lowrank
from jquant.solvers.lowrank_inputs import lowrank_inputs
from jquant.solvers.qronos import qronos
from jquant.solvers.rtn import rtn
from tests.model_bank import quick
from tests.problems import Problem, correlated, independent

FMT = Format("fp8_e4m3")


def stats_of(*grams) -> Stats:
    return Stats(jnp.asarray(np.stack(grams), jnp.float32), None, None, jnp.ones(len(grams)))


@functools.cache
def compiled(method: jq.Method, fmt: Format = FMT, parts: tuple[int, ...] = ()):
    return quick(lambda rows, stats: method.solve(Rounding(rows, parts=parts), stats, fmt))


@functools.cache
def named(rank: int, dtype: str = "float32") -> jq.Method:
    return lowrank_inputs(rank, dtype=dtype)


def solve(p: Problem, rank: int, dtype: str = "float32"):
    """A, B and C of a problem, float64."""
    done = compiled(named(rank, dtype))(jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h))
    n = p.w.shape[1]
    if not done.sides:
        return np.zeros((len(p.w), 0)), np.zeros((0, n)), np.zeros((0, n))
    return tuple(np.asarray(a[0].astype(jnp.float32), np.float64) for a in done.sides[0])


def noise(p: Problem, right, taken) -> float:
    """sum_i E[x'_i^2] ||W_i||^2."""
    left = np.eye(len(p.h)) - right.T @ taken
    return float(np.sum(np.diag(left.T @ p.h @ left) * np.sum(p.w**2, 0)))


def spectrum(p: Problem) -> np.ndarray:
    """The eigenvalues of D^1/2 H D^1/2, the largest first."""
    root = np.sqrt(np.sum(p.w**2, 0))
    return np.linalg.eigvalsh(root[:, None] * p.h * root)[::-1]


def objective(e: np.ndarray, h: np.ndarray) -> float:
    return float(np.sum((e @ h) * e))


@pytest.mark.parametrize("shape", [(5, 12), (20, 12)])
def test_what_is_left_of_the_noise_is_the_least_of_its_rank_and_falls_with_it(shape):
    p = correlated(1, *shape)
    values = spectrum(p)
    left = [noise(p, *solve(p, r)[1:]) for r in (0, 1, 3, 7, 12)]
    np.testing.assert_allclose(left, [values[r:].sum() for r in (0, 1, 3, 7, 12)], atol=1e-5 * values.sum())
    assert all(b <= a for a, b in zip(left, left[1:]))
    # No other projection of that rank leaves less.
    rng = np.random.default_rng(0)
    _, right, taken = solve(p, 3)
    for _ in range(20):
        other = right + 0.05 * np.abs(right).max() * rng.normal(size=right.shape)
        best = np.linalg.solve(other @ p.h @ other.T, other @ p.h)  # what of x follows from x B^T, by least squares
        assert noise(p, other, best) >= left[2] * (1 - 1e-5)


def test_projections_are_oblique_and_exact():
    _, right, taken = solve(correlated(2, 9, 14), 4)
    np.testing.assert_allclose(right @ taken.T, np.eye(4), atol=1e-5)
    assert np.abs(right.T @ taken - (right.T @ taken).T).max() > 1e-3


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 99), shape=st.sampled_from([(5, 9), (9, 5)]), tokens=st.sampled_from([2, 40]),
    dead=st.integers(0, 2), silent=st.integers(0, 2), dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_never_worse_than_whole_and_without_rounding_nothing_changes(seed, shape, tokens, dead, silent, dtype):
    """Also of few tokens, channels without inputs and channels without weights."""
    p = correlated(seed, *shape, tokens=tokens, dead=min(dead, shape[1] - 1))
    w = p.w.copy()
    w[:, :silent] = 0
    p = Problem(w, p.h)
    left, right, taken = solve(p, 2, dtype)
    assert np.isfinite(right).all() and np.isfinite(taken).all()
    assert noise(p, right, taken) <= noise(p, 0 * right, taken) * (1 + 1e-6)
    x = np.random.default_rng(seed).normal(size=(6, shape[1]))
    got = (x - x @ right.T @ taken) @ w.T + x @ right.T @ left.T
    size = np.abs(x @ right.T) @ np.abs(taken) @ np.abs(w).T + np.abs(x @ w.T)
    assert (np.abs(got - x @ w.T) <= (1e-6 if dtype == "float32" else 2**-8) * size + 1e-12).all()


def test_all_of_the_rank_leaves_nothing_to_be_rounded():
    p = correlated(3, 6, 10)
    left, right, taken = solve(p, 50)
    assert left.shape == (6, 10)
    np.testing.assert_allclose(right.T @ taken, np.eye(10), atol=1e-4)
    np.testing.assert_allclose(left @ right, p.w, atol=1e-4 * np.abs(p.w).max())


def test_without_tokens_or_without_weights_nothing_is_taken():
    p = correlated(4, 6, 10)
    for q in (Problem(p.w, 0 * p.h), Problem(0 * p.w, p.h)):
        assert not any(np.any(a) for a in solve(q, 3))
    assert not compiled(named(0))(jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h)).sides


def test_bfloat16_costs_little():
    p = correlated(5, 24, 40)
    whole, exact, stored = (noise(p, *solve(p, *how)[1:]) for how in ((0,), (4,), (4, "bfloat16")))
    assert exact < 0.7 * whole and abs(stored - exact) < 1e-3 * whole


def streams(seed: int, n: int = 12, tokens: int = 60):
    """Inputs of the quantized model, and what the float model's are more."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n))
    return x, 0.1 * rng.normal(size=x.shape)


def test_statistics_are_those_of_what_is_left():
    x, d = streams(6)
    rng = np.random.default_rng(1)
    right, taken = rng.normal(size=(2, 1, 3, 12))
    f = lambda a: jnp.asarray(a, jnp.float32)
    stats = Stats(f(x.T @ x)[None], f(x[:1]), f(x[:1]), jnp.full(1, 60.0), cross=f(d.T @ x)[None], peak=f(x[:1]))
    got = quick(without)(stats, f(right), f(taken))
    left = x - x @ right[0].T @ taken[0]
    np.testing.assert_allclose(got.gram[0], left.T @ left, atol=1e-5 * np.abs(left.T @ left).max())
    np.testing.assert_allclose(got.cross[0], d.T @ left, atol=1e-5 * np.abs(d.T @ left).max())
    assert (got.abs_sum, got.absmax, got.peak, got.histogram) == (None,) * 4 and got.tokens == stats.tokens
    assert without(Stats(None, None, None, jnp.ones(1)), f(right), f(taken)).gram is None


def test_a_channel_that_saw_nothing_stays_dead_and_one_that_was_taken_does_not_become_it():
    p = correlated(7, 8, 10, dead=3)
    for rank in (2, 7):
        done = compiled(chain(named(rank), gptq()))(jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h))
        assert done.notes["dead_channels"].tolist() == [3]


BEHIND = {
    "rtn": rtn(), "search": rtn(search=True), "weighted": rtn(weighted=True), "gptq": gptq(act_order=True),
    "qronos": qronos(act_order=True), "gptaq": gptaq(), "awq": awq(),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_methods_behind_it_solve_for_what_is_left(name):
    """They give what they give for the statistics of x', and never lose to rounding in that objective."""
    x, d = streams(8)
    w = np.random.default_rng(2).normal(size=(7, 12))
    f = lambda a: jnp.asarray(a, jnp.float32)[None]
    fmt, method = Format("int3"), BEHIND[name]
    stats = Stats(f(x.T @ x), None, None, jnp.full(1, 60.0), cross=f(d.T @ x))
    first = compiled(named(2), fmt)(f(w), stats)
    both = compiled(chain(named(2), method), fmt)(f(w), stats)
    want = compiled(method, fmt)(f(w), first.inputs)
    np.testing.assert_array_equal(both.codes, want.codes)
    jax.tree.map(np.testing.assert_array_equal, both.sides, first.sides)
    if name in ("qronos", "gptaq"):
        return
    error = lambda codes, params: w - np.asarray(decode(codes, params, fmt)[0], np.float64)
    plain = compiled(rtn(), fmt)(f(w), None)
    h = np.asarray(first.inputs.gram[0], np.float64)
    if name == "search":  # in its own objective, which knows no inputs
        h = np.eye(12)
    if name == "weighted":
        h = np.diag(np.diag(h))
    assert objective(error(both.codes, both.params), h) <= objective(error(plain.codes, plain.params), h) * (1 + 1e-5)


def test_weights_solved_together_share_the_projection_that_is_best_for_all():
    p = correlated(9, 12, 10)
    rows, stats = jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h)
    together = compiled(named(2), FMT, (8, 4))(rows, stats).sides
    [whole] = compiled(named(2), FMT)(rows, stats).sides
    assert [s.left.shape for s in together] == [(1, 8, 2), (1, 4, 2)]
    np.testing.assert_array_equal(np.concatenate([s.left for s in together], 1), whole.left)
    for side in together:
        np.testing.assert_array_equal(side.right, whole.right)
        np.testing.assert_array_equal(side.taken, whole.taken)


def test_matrices_of_a_batch_are_solved_apart():
    ps = [correlated(10, 6, 8), independent(11, 6, 8)]
    done = compiled(named(2))(jnp.asarray(np.stack([p.w for p in ps]), jnp.float32), stats_of(*[p.h for p in ps]))
    for i, p in enumerate(ps):
        for a, b in zip(done.sides[0], solve(p, 2)):
            np.testing.assert_allclose(np.abs(a[i]), np.abs(b), atol=1e-5)  # an eigenvector's sign is free


def test_what_is_out_of_range_or_out_of_order_is_said():
    for settings in ({"rank": -1}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match="lowrank_inputs: needs"):
            lowrank_inputs(**settings)
    for methods in ((gptq(), lowrank_inputs()), (lowrank_inputs(), lowrank_inputs()), (rtn(), chain(lowrank_inputs()))):
        with pytest.raises(ValueError, match="nothing has rounded; put .* behind it"):
            chain(*methods)
    with pytest.raises(ValueError, match=r"lowrank_inputs\(.*\) and lowrank\(.*\) would both .* leave one out"):
        chain(lowrank_inputs(), gptq(), lowrank(2))
    with pytest.raises(ValueError, match="Gram matrix"):
        lowrank_inputs().solve(Rounding(jnp.ones((1, 4, 8))), None, FMT)
    with pytest.raises(ValueError, match="put it first"):
        state = rtn().solve(Rounding(jnp.ones((1, 4, 8))), None, FMT)
        lowrank_inputs().solve(state, stats_of(np.eye(8)), FMT)
    x = jnp.ones((3, 4))
    with pytest.raises(jq.JQuantError, match=r"lowrank_inputs\(rank=2\) chooses no codes"):
        jq.quantize(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jq.FP8, lowrank_inputs(), [x])
