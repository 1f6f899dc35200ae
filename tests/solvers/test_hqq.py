"""HQQ: its laws, and its authors' iteration written out in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import FormatError
from jquant.core.formats import Format, compute_params, decode, encode, parse_format, reduce_blocks
from jquant.core.method import Rounding, chain
from jquant.solvers.hqq import hqq, shrink
from jquant.solvers.rtn import rtn

FORMATS = [
    "int4-g16-asym-zbf16", "int3-g7-asym-zf32", "int2-asym-zf16", "int4-tensor-asym-zf32", "int4-4x5-asym-zf32",
    "int3-g16-asym", "int4-g8-asym-dq", "int4-g8-asym-zf32-e4m3-global",
]  # fmt: skip


def heavy(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, size=shape), jnp.float32)


def losses(rows, out: Rounding, fmt: Format, p: float = 0.7) -> np.ndarray:
    """Sum of |error|^p of every block."""
    error = np.abs(np.asarray(rows, np.float64) - np.asarray(decode(out.codes, out.params, fmt), np.float64)) ** p
    return np.asarray(reduce_blocks(jnp.asarray(error, jnp.float32), fmt, jnp.sum, stacked=1), np.float64)


def least_losses(rows, params, fmt: Format) -> np.ndarray:
    """The least loss of every block over all zero points: of whole codes, or of their quarters."""
    one = jax.jit(lambda zero: encode(rows, params._replace(zero_point=zero), fmt))
    best = np.inf
    for z in np.arange(0, 2**fmt.bits - 0.9, 1 if fmt.zero_dtype == "uint8" else 0.25):
        zero = jnp.full_like(params.zero_point, z)
        best = np.minimum(best, losses(rows, Rounding(rows, params._replace(zero_point=zero), one(zero)), fmt))
    return best


@pytest.mark.parametrize("name", FORMATS)
def test_no_block_is_worse_than_round_to_nearest_and_some_are_better(name):
    fmt, rows = parse_format(name), heavy(0, 2, 20, 50)
    rows = rows.at[0, 0].set(0).at[0, 1].set(0.5).at[0, 2].set(-3)
    plain, out = (m.solve(Rounding(rows), None, fmt) for m in (rtn(), hqq()))
    before, after = losses(rows, plain, fmt), losses(rows, out, fmt)
    assert (after <= before * (1 + 1e-5)).all()
    np.testing.assert_array_equal(out.params.scale, plain.params.scale)
    assert out.params.zero_point.dtype == fmt.zero_dtype and out.codes.shape == rows.shape
    least = np.minimum(before, least_losses(rows, plain.params, fmt))
    if fmt.zero_dtype == "uint8":  # whole codes: round to nearest has the best already, nearly
        assert after.sum() <= 1.001 * least.sum()
    else:  # the iteration ends in a local minimum: it gets a good part of what an exhaustive search would
        won = before.sum() - after.sum()
        assert won > 0.2 * (before.sum() - least.sum()) and won > 0.004 * before.sum()


@hypothesis.given(
    seed=st.integers(0, 10**6), p=st.sampled_from([0.5, 0.7, 1.0]), beta=st.sampled_from([0.1, 10.0, 1e4])
)
@hypothesis.settings(max_examples=10)
def test_no_setting_is_worse(seed, p, beta):
    fmt, rows = Format("int3", "channel", False, zero_dtype="float32"), heavy(seed, 1, 8, 32)
    plain, out = (m.solve(Rounding(rows), None, fmt) for m in (rtn(), hqq(p=p, beta=beta, iters=4)))
    assert (losses(rows, out, fmt, p) <= losses(rows, plain, fmt, p) * (1 + 1e-5)).all()


def by_the_authors(w: np.ndarray, s: np.ndarray, z: np.ndarray, top: int, p=0.7, beta=10.0, kappa=1.01, iters=20):
    """`optimize_weights_proximal_legacy` of github.com/mobiusml/hqq on W / s, with the best z of each row: float64."""
    w, best, least = w / s, z, None
    for i in range(iters + 1):
        w_q = np.clip(np.round(w + z), 0, top)
        loss = (np.abs(w - (w_q - z)) ** p).sum(1, keepdims=True)
        if least is not None and not (loss < least).any():
            break
        best = z if least is None else np.where(loss < least, z, best)
        least = loss if least is None else np.minimum(loss, least)
        x = w - (w_q - z)
        w_e = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / (beta * kappa**i), 0)
        z = np.clip((w_q - (w - w_e)).mean(1, keepdims=True), 0, top)
    return best


def test_is_the_authors_iteration():
    fmt, rows = Format("int4", "channel", False, zero_dtype="float32"), heavy(1, 1, 6, 64)
    out = hqq().solve(Rounding(rows), None, fmt)
    start = compute_params(rows[0], fmt)
    w, s, z = (np.asarray(a, np.float64) for a in (rows[0], start.scale, start.zero_point))
    want = by_the_authors(w, s, z, 15)
    assert np.abs(want - z).max() > 0.1
    np.testing.assert_allclose(out.params.zero_point[0], want, atol=2e-3)


def test_shrink_is_nearly_the_proximal_operator():
    """Beyond the threshold phi(e) + beta / 2 (e - x)^2 is nearly flat at e; below the threshold e is 0."""
    x, beta, p = np.float32([-3, -0.2, 0.0, 0.01, 0.5, 2]), 10.0, 0.7
    e = np.asarray(shrink(jnp.asarray(x), beta, p), np.float64)
    assert e.tolist()[2:4] == [0, 0] and (np.abs(e) <= np.abs(x)).all() and (np.sign(e) * np.sign(x) >= 0).all()
    big = np.abs(x) > 0.4
    np.testing.assert_allclose(e[big], x[big] - np.sign(x[big]) * np.abs(x[big]) ** (p - 1) / beta, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS[:2])
def test_a_power_of_two_scales_the_weight_only(name):
    fmt, rows = parse_format(name), heavy(2, 1, 5, 40)
    one, two = (hqq().solve(Rounding(r), None, fmt) for r in (rows, rows * 2.0**-30))
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(one.params.zero_point, two.params.zero_point)


def test_scales_of_an_earlier_method_are_kept():
    fmt, rows = parse_format("int3-g16-asym-zf32"), heavy(3, 2, 8, 48)
    searched = rtn(search=True).solve(Rounding(rows), None, fmt)
    out = chain(rtn(search=True), hqq()).solve(Rounding(rows), None, fmt)
    np.testing.assert_array_equal(out.params.scale, searched.params.scale)
    assert (losses(rows, out, fmt) <= losses(rows, searched, fmt) * (1 + 1e-5)).all()
    np.testing.assert_array_equal(out.codes, encode(rows, out.params, fmt))


def test_jit_and_vmap_give_the_same():
    fmt, rows = parse_format("int3-g16-asym-zf32"), heavy(4, 4, 3, 48)
    solve = lambda r: hqq().solve(Rounding(r), None, fmt)
    batch = jax.jit(solve)(rows)
    mapped = jax.jit(jax.vmap(solve))(rows.reshape(2, 2, 3, 48))
    np.testing.assert_array_equal(mapped.codes.reshape(rows.shape), batch.codes)


def test_bf16_rows_and_empty_rows():
    fmt = parse_format("int4-g16-asym-zbf16")
    half = heavy(5, 1, 4, 32).astype(jnp.bfloat16)
    a, b = (hqq().solve(Rounding(r), None, fmt) for r in (half, half.astype(jnp.float32)))
    np.testing.assert_array_equal(a.codes, b.codes)
    assert hqq().solve(Rounding(jnp.zeros((1, 0, 32))), None, fmt).codes.shape == (1, 0, 32)


def test_names_and_errors():
    assert hqq().name == "hqq()" and hqq(p=0.5, iters=3).name == "hqq(p=0.5, iters=3)" and not hqq().needs
    for settings in (dict(p=0), dict(p=1.5), dict(beta=0), dict(kappa=0.9), dict(iters=0)):
        with pytest.raises(ValueError, match="hqq: needs 0 < p <= 1"):
            hqq(**settings)
    for name in ("int4-g16", "nf4", "mxfp4"):
        with pytest.raises(FormatError, match="has no zero point to choose; take an asymmetric integer format"):
            hqq().solve(Rounding(jnp.ones((1, 2, 32))), None, parse_format(name))
