"""Low rank sides against the optimum by singular values in float64 numpy, and the laws that hold for any input."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.format_type import NVFP4
from jquant.core.formats import Format, decode
from jquant.core.method import Method, Rounding, chain
from jquant.core.stats import Stats
from jquant.solvers.gptq import gptq
from jquant.solvers.lowrank import lowrank
from jquant.solvers.rtn import rtn
from tests.model_bank import quick
from tests.problems import Problem, correlated, independent
from tests.solvers.reference import damped as with_dead_channels

FMT = Format("int3", 8, symmetric=False)


def stats_of(*grams) -> Stats:
    return Stats(jnp.asarray(np.stack(grams), jnp.float32), None, None, jnp.ones(len(grams)))


@functools.cache
def compiled(method: Method, fmt: Format):
    """`method.solve` of rows and statistics."""
    return quick(lambda rows, stats: method.solve(Rounding(rows), stats, fmt)._replace(rows=None))


@functools.cache
def named(before: str, settings: tuple) -> Method:
    return chain(*([gptq()] if before else []), lowrank(**dict(settings)))


def solve(p: Problem, fmt: Format = FMT, before: str = "", **settings):
    """E and S of a problem, float64 `[m, n]`, and the notes."""
    rows = jnp.asarray(p.w, jnp.float32)[None]
    done = compiled(named(before, tuple(settings.items())), fmt)(rows, stats_of(p.h))
    (side,), notes = done.sides, done.notes
    e = np.asarray(p.w - np.asarray(decode(done.codes, done.params, fmt)[0], np.float64))
    if side is None:
        return e, np.zeros_like(e), notes
    left, right = (np.asarray(a[0].astype(jnp.float32), np.float64) for a in side[:2])
    return e, left @ right, notes


def damped(h: np.ndarray, damp: float = 0.01) -> np.ndarray:
    return h + damp * np.mean(np.diag(h)) * np.eye(len(h))


def loss(e: np.ndarray, h: np.ndarray) -> float:
    return float(np.sum((e @ h) * e))


def optimum(e: np.ndarray, h: np.ndarray, rank: int) -> np.ndarray:
    """SVD_r(E H^1/2) H^-1/2, as the paper writes it."""
    values, q = np.linalg.eigh(h)
    root, inverse = q * np.sqrt(values) @ q.T, q / np.sqrt(values) @ q.T
    u, s, v = np.linalg.svd(e @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ inverse


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 5])
def test_is_the_optimum_of_its_rank(shape, rank):
    p = correlated(1, *shape)
    e, s, _ = solve(p, rank=rank, dtype="float32")
    want = optimum(e, damped(p.h), rank)
    np.testing.assert_allclose(s, want, atol=2e-5 * np.abs(want).max())
    assert loss(e - s, damped(p.h)) < loss(e - want, damped(p.h)) + 1e-6 * loss(e, damped(p.h))
    assert np.linalg.matrix_rank(s, 1e-5) == rank


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_single_row_or_column_is_absorbed_by_rank_1(shape):
    p = correlated(12, *shape)
    e, s, _ = solve(p, rank=16, dtype="float32")
    np.testing.assert_allclose(s, e, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_more_rank_is_never_worse_and_all_of_it_leaves_nothing(shape):
    p = correlated(2, *shape)
    h = damped(p.h)
    sides = [solve(p, rank=r, dtype="float32") for r in (0, 1, 6, 11, 50)]
    losses = [loss(e - s, h) for e, s, _ in sides]
    assert losses[0] == loss(sides[0][0], h)  # rank 0: none
    assert all(b <= a * (1 + 1e-6) for a, b in zip(losses, losses[1:]))
    assert losses[-1] < 1e-9 * losses[0]


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 99), shape=st.sampled_from([(5, 9), (9, 5)]), tokens=st.sampled_from([2, 40]),
    dead=st.integers(0, 2), before=st.sampled_from(["", "gptq"]),
)  # fmt: skip
def test_never_worse_than_without_whatever_the_inputs(seed, shape, tokens, dead, before):
    p = correlated(seed, *shape, tokens=tokens, dead=min(dead, shape[1] - 1))
    e, s, _ = solve(p, before=before, rank=2, dtype="float32")
    for h in (p.h, damped(p.h), np.eye(shape[1])):
        assert loss(e - s, h) <= loss(e, h) * (1 + 1e-5) + 1e-9 * np.trace(h)
    want = optimum(e, damped(p.h), 2)
    assert loss(e - s, damped(p.h)) <= loss(e - want, damped(p.h)) + 1e-5 * loss(e, damped(p.h)) + 1e-9 * np.trace(p.h)


@pytest.mark.parametrize("before, most", [("", 1e-5), ("gptq", 1e-4)])
def test_storing_in_bfloat16_costs_little_of_what_is_absorbed(before, most):
    p = correlated(3, 24, 40)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        e, s, _ = solve(p, before=before, rank=8, dtype=dtype)
        losses[dtype] = loss(e - s, damped(p.h))
    assert 0 < losses["bfloat16"] - losses["float32"] < most * loss(e, damped(p.h))


def test_a_weight_that_no_token_reached_gets_the_nearest_matrix():
    p = Problem(correlated(4, 8, 12).w, np.zeros((12, 12)))
    e, s, _ = solve(p, rank=3, dtype="float32")
    np.testing.assert_allclose(s, optimum(e, np.eye(12), 3), atol=1e-5)


def test_dead_channels_do_not_take_the_rank_from_live_ones():
    p = correlated(5, 16, 12, dead=6)
    e, s, _ = solve(p, rank=2, dtype="float32")
    as_if_live = optimum(e, with_dead_channels(p.h, 0.01), 2)
    assert loss(e - s, p.h) < loss(e - as_if_live, p.h)


def test_after_gptq_its_codes_stay_and_alone_it_rounds_to_nearest():
    p = correlated(6, 8, 16)
    rows, stats = jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h)
    for before in (gptq(), rtn(search=True)):
        first, both = (compiled(m, FMT)(rows, stats) for m in (before, chain(before, lowrank(2))))
        np.testing.assert_array_equal(both.codes, first.codes)
    alone = compiled(lowrank(2), FMT)(rows, stats)
    np.testing.assert_array_equal(alone.codes, rtn().solve(Rounding(rows), None, FMT).codes)


@pytest.mark.parametrize("fmt", [NVFP4, Format("nf4"), Format("fp8_e4m3", (2, 5)), Format("int4", "tensor")], ids=str)
def test_any_format(fmt):
    p = correlated(7, 10, 20)
    e, s, _ = solve(p, fmt, rank=3)
    assert loss(e - s, p.h) < 0.9 * loss(e, p.h)


def test_a_budget_of_bytes_is_kept_and_used():
    p = correlated(8, 10, 22)
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        method = lowrank(budget=200, dtype=dtype)
        [side] = compiled(method, FMT)(jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h)).sides
        used = sum(a.nbytes for a in side[:2])
        assert used <= 200 < used + size * 32
    _, s, notes = solve(p, budget=63)
    assert not s.any() and notes["no_side"].tolist() == [1]


def test_weights_solved_together_get_the_best_side_each():
    p = correlated(9, 12, 10)
    rows, stats = jnp.asarray(p.w, jnp.float32)[None], stats_of(p.h)
    method, spans = lowrank(2), [(0, 8), (8, 12)]
    solve_both = lambda rows, stats: method.solve(Rounding(rows, parts=(8, 4)), stats, FMT).sides
    sides = quick(solve_both)(rows, stats)
    assert [s.left.shape for s in sides] == [(1, 8, 2), (1, 4, 2)]
    for (start, stop), side in zip(spans, sides):
        [alone] = compiled(method, FMT)(rows[:, start:stop], stats).sides
        for a, b in zip(side[:2], alone[:2]):
            np.testing.assert_array_equal(a, b)


def test_matrices_of_a_batch_are_solved_apart():
    ps = [correlated(10, 6, 8), independent(11, 6, 8)]
    rows = jnp.asarray(np.stack([p.w for p in ps]), jnp.float32)
    run = compiled(lowrank(2), FMT)
    [side] = run(rows, stats_of(*[p.h for p in ps])).sides
    for i, p in enumerate(ps):
        [one] = run(rows[i : i + 1], stats_of(p.h)).sides
        np.testing.assert_array_equal(side.left[i], one.left[0])
        np.testing.assert_array_equal(side.right[i], one.right[0])


def test_what_is_out_of_range_is_said():
    for settings in ({"rank": -1}, {"budget": -1}, {"damp": -0.1}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match="lowrank: needs"):
            lowrank(**settings)
    with pytest.raises(ValueError, match="not both"):
        lowrank(3, budget=5)
    with pytest.raises(ValueError, match="put gptq.* first"):
        chain(lowrank(3), gptq())
    with pytest.raises(ValueError, match="put lowrank.* first"):
        chain(chain(gptq(), lowrank(3)), lowrank(3))
    with pytest.raises(ValueError, match="Gram matrix"):
        lowrank(3).solve(Rounding(jnp.ones((1, 4, 8))), None, FMT)
