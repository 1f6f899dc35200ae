"""Round to nearest, and the search of the clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import Format, block_params, compute_params, decode, encode, parse_format, reduce_blocks
from jquant.core.method import Rounding
from jquant.solvers.rtn import rtn, search_params, shrink_factors
from tests.problems import correlated
from tests.solvers.reference import stats_of

FORMATS = [
    "int4-g16", "int3-g7-asym", "int2", "int4-tensor-asym", "nf4-g16", "fp8_e4m3", "mxfp4", "nvfp4", "nvfp4-4o6",
    "int4-3x16-asym", "nf4-g16-dq", "ternary-tensor", "ternary-g16", "int4-g16-asym-zbf16",
]  # fmt: skip


def rows_like(seed: int, *shape: int) -> jax.Array:
    """Heavy tails, so that clipping pays."""
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, size=shape), jnp.float32)


def block_errors(rows, out: Rounding, fmt: Format, weight=1.0) -> np.ndarray:
    e = (np.asarray(rows, np.float64) - np.asarray(decode(out.codes, out.params, fmt), np.float64)) ** 2 * weight
    return np.asarray(reduce_blocks(jnp.asarray(e, jnp.float32), fmt, jnp.sum, stacked=1), np.float64)


def test_names_and_needs():
    assert rtn().name == "rtn()" and rtn(search=True).name == "rtn(search=True)"
    assert rtn(search=True).needs == frozenset() and rtn(weighted=True).needs == {"gram"}


@pytest.mark.parametrize("name", FORMATS)
def test_without_search_it_is_the_formats_own_rounding(name):
    fmt, rows = parse_format(name), rows_like(0, 2, 3, 40)
    out = rtn().solve(Rounding(rows), None, fmt)
    params = compute_params(rows, fmt, stacked=1)
    jax.tree.map(np.testing.assert_array_equal, out.params, params)
    np.testing.assert_array_equal(out.codes, encode(rows, params, fmt))
    assert out.codes.shape == rows.shape and out.codes.dtype == jnp.uint8 and out.rows is rows


@pytest.mark.parametrize("name", FORMATS)
def test_search_never_raises_the_error_of_a_block_and_lowers_some(name):
    fmt, rows = parse_format(name), rows_like(1, 2, 20, 50)
    rows = rows.at[0, 0].set(0).at[0, 1].set(0.5)
    plain, best = (rtn(search=s).solve(Rounding(rows), None, fmt) for s in (False, True))
    before, after = block_errors(rows, plain, fmt), block_errors(rows, best, fmt)
    assert (after <= before * (1 + 1e-6)).all()
    if not name.startswith("fp8"):
        assert after.sum() < (0.99 if name in ("mxfp4", "nvfp4-4o6") else 0.97) * before.sum()


@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
def test_powers_of_two_are_searched_up_and_down(rule):
    """No block does better with the rule's scale, with half of it or with twice."""
    fmt, rows = parse_format("mxfp4").replace(scale_rule=rule), rows_like(7, 1, 20, 64)
    out, start = rtn(search=True).solve(Rounding(rows), None, fmt), compute_params(rows, fmt, stacked=1)
    least, tried = block_errors(rows, out, fmt), []
    for factor in (0.5, 1.0, 2.0):
        params = start._replace(scale=(start.scale.astype(jnp.float32) * factor).astype(fmt.scale_dtype))
        tried.append(block_errors(rows, Rounding(rows, params, encode(rows, params, fmt)), fmt))
    np.testing.assert_allclose(least, np.min(tried, 0), rtol=1e-6)
    assert least.sum() < tried[1].sum()


def test_search_is_the_best_of_the_grid():
    fmt, rows = parse_format("int3-g8-asym-f32"), rows_like(2, 4, 8)
    errors = []
    for factor in shrink_factors(grid=20, max_shrink=0.5):
        low, high = jnp.minimum(rows.min(-1, keepdims=True), 0), jnp.maximum(rows.max(-1, keepdims=True), 0)
        params = block_params(low * factor, high * factor, fmt)
        errors.append(np.square(np.asarray(rows - decode(encode(rows, params, fmt), params, fmt), np.float64)).sum(-1))
    out = rtn(search=True, grid=20, max_shrink=0.5).solve(Rounding(rows[None]), None, fmt)
    np.testing.assert_allclose(block_errors(rows[None], out, fmt)[0, :, 0], np.min(errors, 0), rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_weighted_search_never_raises_the_weighted_error(name):
    fmt = parse_format(name)
    w, h = correlated(3, 40, 50)  # powers of two leave most blocks where they were: it takes many to see one move
    rows, stats = jnp.asarray(w, jnp.float32)[None], stats_of(jnp.asarray(h, jnp.float32)[None])
    plain, best = (m.solve(Rounding(rows), stats, fmt) for m in (rtn(), rtn(weighted=True)))
    error = lambda out: block_errors(rows, out, fmt, weight=np.diag(h))
    assert (error(best) <= error(plain) * (1 + 1e-6)).all() and error(best).sum() < error(plain).sum()


def test_weights_of_zero_mean_no_token_was_seen():
    fmt, rows = Format("int3"), rows_like(4, 1, 3, 40)
    blind = rtn(weighted=True).solve(Rounding(rows), stats_of(jnp.zeros((1, 40, 40))), fmt)
    np.testing.assert_array_equal(blind.codes, rtn(search=True).solve(Rounding(rows), None, fmt).codes)


def test_scales_of_an_earlier_method_are_kept():
    fmt, rows = Format("int4"), rows_like(5, 1, 3, 40)
    params = compute_params(2 * rows, fmt)
    out = rtn(search=True).solve(Rounding(rows, params), None, fmt)
    np.testing.assert_array_equal(out.params.scale, params.scale)
    np.testing.assert_array_equal(out.codes, encode(rows, params, fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_jit_vmap_and_a_batch_give_the_same(name):
    fmt, rows = parse_format(name), rows_like(6, 4, 3, 40)
    solve = lambda r: rtn(search=True).solve(Rounding(r), None, fmt)
    batch = jax.jit(solve)(rows)
    mapped = jax.jit(jax.vmap(solve))(rows.reshape(2, 2, 3, 40))
    np.testing.assert_array_equal(mapped.codes.reshape(rows.shape), batch.codes)
    for i in range(4):
        np.testing.assert_array_equal(jax.jit(solve)(rows[i : i + 1]).codes[0], batch.codes[i])


def test_the_first_factor_wins_a_tie():
    """A zero block has no error under any factor, and a block of the grid none under 1."""
    fmt, rows = Format("int4", symmetric=False), jnp.asarray([[0.0] * 16, list(range(16))], jnp.float32)
    params = search_params(rows, fmt, shrink_factors())
    np.testing.assert_array_equal(params.scale, compute_params(rows, fmt).scale)


def test_wrong_settings_and_missing_statistics_are_errors():
    for settings in (dict(grid=0), dict(max_shrink=1.0), dict(max_shrink=-0.1)):
        with pytest.raises(ValueError, match="rtn: needs grid >= 1"):
            rtn(**settings)
    with pytest.raises(ValueError, match="Gram matrix"):
        rtn(weighted=True).solve(Rounding(jnp.ones((1, 2, 3))), None, Format("int4"))
