"""Qronos and GPTAQ against literal float64 loops of what their papers say, and against each other's laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import BlockParams, Format, compute_params, decode, parse_format
from jquant.core.method import Rounding
from jquant.core.stats import Stats
from jquant.solvers.gptaq import gptaq
from jquant.solvers.gptq import gptq
from jquant.solvers.qronos import qronos
from tests.solvers.reference import nearest


def streams(seed: int, m: int, n: int, tokens: int = 300, apart: float = 0.3):
    """A weight, the float model's inputs, and the quantized model's: correlated and a little off."""
    rng = np.random.default_rng(seed)
    mix = np.eye(n) + 0.7 * rng.normal(size=(n, n)) / np.sqrt(n)
    x = rng.normal(size=(tokens, n)) @ mix * np.exp(0.4 * rng.normal(size=n))
    near = x @ (np.eye(n) + apart * rng.normal(size=(n, n)) / np.sqrt(n)) + apart * rng.normal(size=x.shape)
    return rng.normal(size=(m, n)).astype(np.float32).astype(np.float64), x, near


def stats_of(x, near) -> Stats:
    gram = jnp.asarray(near.T @ near)[None]
    empty = jnp.zeros(gram.shape[:-1])
    return Stats(gram, empty, empty, empty[..., 0], cross=jnp.asarray((x - near).T @ near)[None])


def plain_params(w, fmt: Format) -> BlockParams:
    return jax.tree.map(lambda a: a[None], compute_params(jnp.asarray(w, jnp.float32), fmt))


def solve(method, w, stats: Stats, fmt: Format, params: BlockParams | None) -> tuple[np.ndarray, dict]:
    """Q, and the notes."""
    out = method.solve(Rounding(jnp.asarray(w)[None], params), stats, fmt)
    return np.asarray(decode(out.codes[0], jax.tree.map(lambda a: a[0], out.params), fmt), np.float64), out.notes


def grid(w, fmt: Format):
    p = compute_params(jnp.asarray(w, jnp.float32), fmt)
    zero = np.zeros_like(p.scale, np.float64) if p.zero_point is None else np.asarray(p.zero_point, np.float64)
    return np.asarray(p.scale, np.float64), zero


def damped(x, near, damp: float):
    """Inputs with rows that add damping to H, and pull Q towards W."""
    size = np.sqrt(damp * np.mean(np.diag(near.T @ near))) * np.eye(x.shape[1])
    return np.concatenate([x, size]), np.concatenate([near, size])


def literal_qronos(w, x, near, fmt: Format, damp: float, order) -> np.ndarray:
    """Equations 3 and 4 of the paper: one column is rounded, all behind it are least squares again."""
    x, near = damped(x, near, damp)
    scale, zero = grid(w, fmt)
    goal, v, order = x @ w.T, np.array(w), list(order)
    for t, k in enumerate(order):
        rest = goal - near @ v.T + np.outer(near[:, k], v[:, k])
        v[:, k : k + 1] = nearest((near[:, k] @ rest / (near[:, k] @ near[:, k]))[:, None], scale, zero, fmt)
        if behind := order[t + 1 :]:
            left = goal - near[:, order[: t + 1]] @ v[:, order[: t + 1]].T
            v[:, behind] = np.linalg.lstsq(near[:, behind], left, rcond=None)[0].T
    return v


def literal_gptaq(w, x, near, fmt: Format, damp: float, alpha: float, corrected: bool = False) -> np.ndarray:
    """Algorithm 1, column by column: GPTQ's correction, and W_q dX_q projected on the inputs behind it.

    With `corrected`, the reference code's: the column times P_q is the one that corrections have changed.
    """
    n = w.shape[1]
    scale, zero = grid(w, fmt)
    h = near.T @ near + damp * np.mean(np.diag(near.T @ near)) * np.eye(n)
    c = (x - near).T @ near
    cur, q = np.array(w), np.zeros_like(w)
    for k in range(n):
        inverse = np.linalg.inv(h[k:, k:])
        q[:, k : k + 1] = nearest(cur[:, k : k + 1], scale, zero, fmt)
        handed = (cur if corrected else w)[:, k].copy()
        cur[:, k + 1 :] -= np.outer(cur[:, k] - q[:, k], inverse[0, 1:] / inverse[0, 0])
        if k + 1 < n:
            cur[:, k + 1 :] += alpha * np.outer(handed, c[k, k + 1 :] @ np.linalg.inv(h[k + 1 :, k + 1 :]))
    return q


def objective(w, q, x, near) -> np.ndarray:
    """|X w - X~ q|^2 of each row."""
    return np.sum((x @ w.T - near @ q.T) ** 2, axis=0)


def least_squares(w, x, near, damp: float = 0.01) -> np.ndarray:
    """W*."""
    x, near = damped(x, near, damp)
    return np.linalg.lstsq(near, x @ w.T, rcond=None)[0].T


def plain_is_better(star, q, near, fmt: Format, w) -> np.ndarray:
    """Whether W* rounded to nearest does better than Q, of each row."""
    scale, zero = grid(w, fmt)
    rounded = np.concatenate([nearest(c[:, None], scale, zero, fmt) for c in star.T], axis=1)
    return objective(star, rounded, near, near) < objective(star, q, near, near)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int3", "int4-asym", "nf4"])
def test_qronos_is_the_literal_algorithm(name, act_order):
    fmt = parse_format(name)
    w, x, near = streams(0, 6, 40)
    order = np.argsort(-np.diag(near.T @ near), kind="stable") if act_order else range(40)
    with jax.enable_x64(True):
        got, notes = solve(qronos(act_order, paper_first_column=True), w, stats_of(x, near), fmt, plain_params(w, fmt))
    want = literal_qronos(w, x, near, fmt, 0.01, order)
    swept = ~plain_is_better(least_squares(w, x, near), want, near, fmt, w)
    assert notes["rtn_rows"] == (~swept).sum() <= 2
    np.testing.assert_allclose(got[swept], want[swept], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["int3", "int4-asym"])
def test_gptaq_is_the_literal_algorithm(name):
    fmt = parse_format(name)
    w, x, near = streams(1, 6, 40)
    with jax.enable_x64(True):
        got, notes = solve(gptaq(alpha=1.0), w, stats_of(x, near), fmt, plain_params(w, fmt))
    assert notes["rtn_rows"] == 0  # of these
    np.testing.assert_allclose(got, literal_gptaq(w, x, near, fmt, 0.01, 1.0), rtol=1e-6, atol=1e-9)


def test_the_papers_objective_has_the_weight_not_the_corrected_column():
    """What GPTAQ's docstring says of its reference code, measured."""
    ours = theirs = 0.0
    for seed in range(8):
        w, x, near = streams(seed, 8, 40, apart=0.5)
        args = w, x, near, parse_format("int3"), 0.01, 1.0
        ours += objective(w, literal_gptaq(*args), x, near).sum()
        theirs += objective(w, literal_gptaq(*args, corrected=True), x, near).sum()
    assert ours < 0.98 * theirs


@pytest.mark.slow(optimized=False)
@pytest.mark.parametrize("act_order", [False, True])
def test_of_the_same_inputs_both_are_gptq(act_order):
    fmt = parse_format("int4-g16")
    w, x, _ = streams(2, 5, 48)
    with jax.enable_x64(True):
        want = solve(gptq(act_order), w, stats_of(x, x), fmt, None)[0]
        for method in (qronos(act_order), gptaq(act_order)):
            np.testing.assert_array_equal(solve(method, w, stats_of(x, x), fmt, None)[0], want)


@pytest.mark.parametrize("act_order", [False, True])
def test_qronos_is_gptq_on_the_least_squares_weight(act_order):
    fmt = parse_format("int4")
    w, x, near = streams(3, 6, 30)
    with jax.enable_x64(True):
        stats, params = stats_of(x, near), plain_params(w, fmt)
        ours = solve(qronos(act_order), w, stats, fmt, params)[0]
        theirs = solve(gptq(act_order), least_squares(w, x, near), stats, fmt, params)[0]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow(optimized=False)
def test_the_least_squares_weight_has_the_better_first_column():
    """What the docstring says of the paper's."""
    ours = papers = 0.0
    for seed in range(6):
        w, x, near = streams(seed, 8, 30)
        with jax.enable_x64(True):
            stats, params = stats_of(x, near), plain_params(w, fmt := parse_format("int4"))
            ours += objective(w, solve(qronos(), w, stats, fmt, params)[0], x, near).sum()
            papers += objective(w, solve(qronos(paper_first_column=True), w, stats, fmt, params)[0], x, near).sum()
    assert ours < 0.99 * papers


@pytest.mark.slow(optimized=False)
def test_on_both_streams_each_is_better_than_the_one_before():
    fmt = parse_format("int3-g16")
    losses = {m.name: 0.0 for m in (gptq(), gptaq(), gptaq(alpha=1.0), qronos())}
    for seed in range(4):
        w, x, near = streams(seed, 16, 64)
        for method in (gptq(), gptaq(), gptaq(alpha=1.0), qronos()):
            q = solve(method, w.astype(np.float32), jax.tree.map(jnp.float32, stats_of(x, near)), fmt, None)[0]
            losses[method.name] += objective(w, q, x, near).sum()
    values = list(losses.values())
    assert values == sorted(values, reverse=True) and values[-1] < 0.7 * values[0], losses


@pytest.mark.parametrize("method", [qronos(), gptaq()], ids=lambda m: m.name)
def test_degenerate_statistics(method):
    """Dead channels, no token at all, a batch of both: finite, and round to nearest where nothing was seen."""
    fmt = parse_format("int4-g8")
    w, x, near = streams(4, 3, 20)
    near[:, 3], x[:, 3] = 0, 0
    seen = stats_of(x, near)
    stats = jax.tree.map(lambda a: jnp.concatenate([a, 0 * a]).astype(jnp.float32), seen)
    rows = jnp.asarray(np.stack([w, w]), jnp.bfloat16)
    out = method.solve(Rounding(rows), stats, fmt)
    assert out.notes["dead_channels"].tolist() == [1, 20] and out.notes["no_tokens"].tolist() == [False, True]
    values = decode(out.codes, out.params, fmt)
    assert np.isfinite(values).all()
    plain = compute_params(rows[1].astype(jnp.float32), fmt)
    np.testing.assert_array_equal(out.params.scale[1], plain.scale)


def test_what_is_wrong_is_said():
    w, x, near = streams(5, 3, 20)
    stats = stats_of(x, near)
    for method in (qronos, gptaq):
        with pytest.raises(ValueError, match="damp >= 0"):
            method(damp=-1.0)
        with pytest.raises(ValueError, match="only the walk"):
            solve(method(), w, stats._replace(cross=None), parse_format("int4"), None)
        with pytest.raises(ValueError, match="cross matrix"):
            solve(method(), w, stats._replace(cross=stats.cross[:, 1:]), parse_format("int4"), None)
