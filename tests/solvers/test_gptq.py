"""GPTQ against its laws and against float64 ports of the algorithm.

Codes are compared exactly. Where the order of summation differs between two computations, both run in float64 on random
numbers, so that a target within rounding error (1e-13) of a tie does not occur.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import BlockParams, Format, compute_params, decode, encode, parse_format
from jquant.core.method import Rounding, chain
from jquant.solvers.gptq import gptq
from jquant.solvers.rtn import rtn
from tests.problems import correlated, identical, independent, objective, pair
from tests.solvers.reference import literal_gptq, literal_ldlq, run, stats_of

_ALL = [
    "int4-g16", "int4-g12-asym", "int3-g40-asym", "int2-g7-asym-f32", "int8", "int4-asym", "int4-tensor",
    "int8-tensor-asym", "nf4-g16", "nf4", "fp8_e4m3", "fp8_e5m2-g16", "fp8_e4m3-tensor", "fp6_e2m3-g16-f32",
    "fp4_e2m1-g12-e8m0", "fp6_e3m2-g16-e8m0-ceil", "int4-g16-asym-zf32", "ternary",
]  # fmt: skip
_QUICK = ["int4-g16", "int3-g40-asym", "nf4", "int8-tensor-asym"]  # most of a test's time is compilation
FORMATS = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in _ALL]
FEW = ["int4-g16", "int3-g20-asym", "int4", "nf4-g16", "int4-tensor-asym"]


def values(out: Rounding, fmt: Format) -> np.ndarray:
    return np.asarray(decode(out.codes, out.params, fmt), np.float64)


def round_to_nearest(w, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values."""
    rows = jnp.asarray(w, jnp.float32)
    params = compute_params(rows, fmt)
    codes = encode(rows, params, fmt)
    return np.asarray(codes), np.asarray(decode(codes, params, fmt), np.float64)


def test_name_and_needs():
    assert gptq().name == "gptq()" and gptq().needs == {"gram"}
    assert gptq(act_order=True, damp=0.1, search=True).name == "gptq(act_order=True, damp=0.1, search=True)"


# --- what it computes ---


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_is_the_literal_algorithm(name, act_order):
    """Where it is no row that round to nearest serves better, Q is that of the paper's algorithm."""
    fmt = parse_format(name)
    w, h = correlated(0, 5, 50)
    with jax.enable_x64(True):
        out = run(w, h, fmt, act_order=act_order, block_size=24)
    want = literal_gptq(w, h, fmt, block_size=24, act_order=act_order)
    plain = round_to_nearest(w, fmt)[1]
    better = objective(w, plain, h) < objective(w, want, h)
    assert out.notes["rtn_rows"] == better.sum() < 3
    np.testing.assert_allclose(values(out, fmt), np.where(better[:, None], plain, want), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["int4", "int3-asym", "nf4"])
def test_the_literal_algorithm_is_ldlq(name):
    fmt = parse_format(name)
    for seed in range(3):
        w, h = correlated(seed, 6, 40)
        np.testing.assert_array_equal(literal_gptq(w, h, fmt, block_size=16), literal_ldlq(w, h, fmt))


@pytest.mark.parametrize(
    "name, act_order", [("int4-g16", False), ("int3-g20-asym", False), ("int4-g16", True), ("nf4", False)]
)
def test_block_size_changes_no_code(name, act_order):
    w, h = correlated(3, 4, 200)
    with jax.enable_x64(True):
        outs = [run(w, h, parse_format(name), act_order=act_order, block_size=size) for size in (1, 16, 128)]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.codes, outs[0].codes)
        jax.tree.map(np.testing.assert_array_equal, out.params, outs[0].params)


@pytest.mark.parametrize("name", ["int4-g64", "int4"])
def test_long_rows_pass_over_several_super_blocks(name):
    fmt = parse_format(name)
    w, h = correlated(4, 3, 1400, tokens=1500)
    with jax.enable_x64(True):
        out = run(w, h, fmt)
    np.testing.assert_allclose(values(out, fmt), literal_gptq(w, h, fmt), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_without_correlation_it_is_round_to_nearest(name, act_order):
    fmt = parse_format(name)
    for w, h in (independent(0, 5, 50), independent(0, 5, 50)._replace(h=3 * np.eye(50))):
        out = run(w, h, fmt, act_order=act_order)
        np.testing.assert_array_equal(out.codes, round_to_nearest(w, fmt)[0])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rho, second", [(-0.9, 7), (0.0, 7), (0.56, 7), (0.58, 8), (0.9, 8)])
def test_the_second_of_a_pair_makes_good_the_error_of_the_first(rho, second, act_order):
    fmt = Format("int8")
    w, h = pair(rho)
    params = BlockParams(jnp.ones((1, 1)), None)
    out = run(w, h, fmt, params=params, damp=0.0, act_order=act_order)
    np.testing.assert_array_equal(values(out, fmt), [[1, second]])


def test_identical_inputs_leave_half_a_step():
    """The errors of a row sum to at most half a step (unless clipped), whatever its length."""
    fmt = Format("int8")
    w, h = identical(0, 6, 64)
    out = run(w, h, fmt, damp=1e-4)
    step = np.asarray(out.params.scale)[:, 0]
    assert (np.sqrt(objective(w, values(out, fmt), h)) <= 0.51 * step).all()


def test_act_order_with_channels_follows_a_permutation_of_the_inputs():
    fmt = Format("int3")
    w, h = correlated(5, 4, 40)
    order = np.random.default_rng(0).permutation(40)
    with jax.enable_x64(True):
        one = run(w, h, fmt, act_order=True)
        two = run(w[:, order], h[np.ix_(order, order)], fmt, act_order=True)
    np.testing.assert_array_equal(np.asarray(one.codes)[:, order], two.codes)


def test_act_order_with_groups_follows_a_permutation_that_keeps_the_groups():
    fmt = parse_format("int3-g8-asym")
    w, h = correlated(6, 4, 40)
    groups = np.random.default_rng(0).permutation(5)
    order = (groups[:, None] * 8 + np.arange(8)[::-1]).ravel()
    with jax.enable_x64(True):
        one = run(w, h, fmt, act_order=True)
        two = run(w[:, order], h[np.ix_(order, order)], fmt, act_order=True)
    np.testing.assert_array_equal(np.asarray(one.codes)[:, order], two.codes)
    np.testing.assert_array_equal(np.asarray(one.params.scale)[:, groups], two.params.scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_a_power_of_two_scales_everything(name, act_order):
    """W -> 4 W scales the scales, H -> 2**-20 H changes nothing: neither has a natural unit."""
    fmt = parse_format(name)
    w, h = correlated(7, 5, 50)
    one = run(w, h, fmt, act_order=act_order)
    two = run(4 * w, h * 2.0**-20, fmt, act_order=act_order)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(4 * np.asarray(one.params.scale), two.params.scale)


# --- never worse than round to nearest ---


def hopes(w, h, fmt: Format, out: Rounding, unit: float) -> None:
    """No row's objective exceeds round to nearest's by more than `unit` times the terms it is summed from."""
    plain, q = round_to_nearest(w, fmt)[1], values(out, fmt)
    noise = unit * (objective(0 * w, np.abs(w - plain), np.abs(h)) + objective(0 * w, np.abs(w - q), np.abs(h)))
    gap = objective(w, q, h) - objective(w, plain, h)
    assert (gap <= noise).all(), gap - noise


# Few combinations, as each is a compilation: the numbers are what varies.
LAYERS = [
    (1, 1, "int4-g16", False), (1, 24, "int3-asym", True), (3, 1, "nf4-g16", False), (5, 50, "int2-g7-asym-f32", False),
    (5, 50, "int4-g16", True), (5, 50, "int4-tensor-asym", False),
]  # fmt: skip


@st.composite
def layers(draw):
    m, n, name, act_order = draw(st.sampled_from(LAYERS))
    tokens = draw(st.sampled_from([0, 1, 3, n // 2, 4 * n]))
    w, h = correlated(draw(st.integers(0, 10**6)), m, n, tokens, dead=draw(st.integers(0, n)))
    if draw(st.booleans()):
        w[:, : n // 2] = draw(st.sampled_from([0.0, 1.0, -0.375]))  # zero and constant blocks
    if draw(st.booleans()):
        w = np.asarray(jnp.asarray(w, jnp.bfloat16).astype(jnp.float32), np.float64)
    return w, h, parse_format(name), act_order


@pytest.mark.slow(optimized=False)
@hypothesis.given(layers())
def test_no_row_is_worse_than_round_to_nearest(layer):
    """In float32 the objective itself is known to n roundings of its terms; in float64 to far less."""
    w, h, fmt, act_order = layer
    out = run(w, h, fmt, act_order=act_order)
    assert np.isfinite(values(out, fmt)).all()
    hopes(w, np.asarray(h, np.float32).astype(np.float64), fmt, out, unit=w.shape[1] * 2.0**-23)
    with jax.enable_x64(True):
        hopes(w, h, fmt, run(w, h, fmt, act_order=act_order), unit=1e-12)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_much_better_than_round_to_nearest_where_inputs_are_correlated(name, act_order):
    fmt = parse_format(name)
    w, h = correlated(8, 5, 50)
    out = run(w, h, fmt, act_order=act_order)
    ratio = objective(w, values(out, fmt), h).sum() / objective(w, round_to_nearest(w, fmt)[1], h).sum()
    assert ratio < 0.9


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_search_is_never_worse_than_round_to_nearest_either(name, act_order):
    fmt = parse_format(name)
    w, h = correlated(9, 6, 50, tokens=20, dead=3)
    with jax.enable_x64(True):
        hopes(w, h, fmt, run(w, h, fmt, act_order=act_order, search=True), unit=1e-12)


# --- what it is given ---


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_scales_of_an_earlier_method_are_kept(name, act_order):
    fmt = parse_format(name)
    w, h = correlated(10, 4, 50)
    rows, gram = jnp.asarray(w, jnp.float32)[None], jnp.asarray(h, jnp.float32)[None]
    searched = rtn(search=True).solve(Rounding(rows), None, fmt)
    out = chain(rtn(search=True), gptq(act_order=act_order)).solve(Rounding(rows), stats_of(gram), fmt)
    jax.tree.map(np.testing.assert_array_equal, out.params, searched.params)
    e = lambda r: objective(w, values(jax.tree.map(lambda a: a[0], r), fmt), h)
    assert (e(out) <= e(searched)).all() and e(out).sum() < 0.9 * e(searched).sum()


@pytest.mark.parametrize("name", FEW)
def test_a_batch_is_its_matrices_one_by_one(name):
    fmt = parse_format(name)
    problems = [correlated(s, 5, 50, tokens) for s, tokens in ((0, None), (1, 10), (2, 0))]
    both = run(np.stack([p.w for p in problems]), np.stack([p.h for p in problems]), fmt)
    for i, p in enumerate(problems):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], both), run(p.w, p.h, fmt))


@pytest.mark.slow(optimized=False)
def test_vmap_is_a_batch():
    fmt = parse_format("int4-g16")
    problems = [correlated(s, 3, 40) for s in range(4)]
    rows = jnp.asarray(np.stack([p.w for p in problems]), jnp.float32)
    gram = jnp.asarray(np.stack([p.h for p in problems]), jnp.float32)
    solve = lambda rows, gram: gptq().solve(Rounding(rows), stats_of(gram), fmt)
    mapped = jax.jit(jax.vmap(solve))(rows.reshape(2, 2, 3, 40), gram.reshape(2, 2, 40, 40))
    batch = run(rows, gram, fmt)
    np.testing.assert_array_equal(mapped.codes.reshape(batch.codes.shape), batch.codes)


def test_runs_without_jit_and_keeps_what_it_was_given():
    fmt = parse_format("int4-g16")
    w, h = correlated(11, 3, 40)
    rows = jnp.asarray(w, jnp.float32)[None]
    state = Rounding(rows, notes={"before": jnp.ones(1)})
    out = gptq().solve(state, stats_of(jnp.asarray(h, jnp.float32)[None]), fmt)
    np.testing.assert_array_equal(out.codes[0], run(w, h, fmt).codes)
    assert out.rows is rows and set(out.notes) == {
        "before", "dead_channels", "no_tokens", "damping_added", "rtn_rows"
    }  # fmt: skip
    assert all(note.shape == (1,) for note in out.notes.values())


@pytest.mark.parametrize("name", FEW)
def test_bfloat16_weights_are_computed_in_float32(name):
    fmt = parse_format(name)
    w, h = correlated(12, 5, 50)
    half = jnp.asarray(w, jnp.bfloat16)
    a, b = run(half, h, fmt), run(half.astype(jnp.float32), h, fmt)
    np.testing.assert_array_equal(a.codes, b.codes)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.rows.dtype == jnp.bfloat16 and a.params.scale.dtype == fmt.scale_dtype


@pytest.mark.parametrize("name", FORMATS)
def test_params_have_the_shapes_and_dtypes_of_round_to_nearest(name):
    fmt = parse_format(name)
    w, h = correlated(13, 3, 50)
    rows, gram = jnp.asarray(w, jnp.float32)[None], jnp.asarray(h, jnp.float32)[None]
    want = rtn().solve(Rounding(rows), None, fmt)
    got = jax.eval_shape(lambda r, g: gptq().solve(Rounding(r), stats_of(g), fmt), rows, gram)
    describe = lambda r: jax.tree.map(lambda a: (a.shape, a.dtype), (r.codes, r.params))
    assert describe(got) == describe(want)


def test_wrong_settings_and_missing_statistics_are_errors():
    for settings in (dict(damp=-0.1), dict(damp=float("nan")), dict(block_size=0)):
        with pytest.raises(ValueError, match="gptq: needs damp >= 0 and block_size >= 1"):
            gptq(**settings)
    state = Rounding(jnp.ones((1, 2, 3)))
    for stats in (None, stats_of(jnp.ones((1, 3, 3)))._replace(gram=None)):
        with pytest.raises(ValueError, match="Gram matrix; calibrate"):
            gptq().solve(state, stats, Format("int4"))
    with pytest.raises(ValueError, match=r"\(1, 3, 3\), not \(1, 4, 4\)"):
        gptq().solve(state, stats_of(jnp.ones((1, 4, 4))), Format("int4"))


# --- degenerate inputs, by rule ---


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4", "int4-g16", "nf4-g16"])
def test_dead_channels_are_rounded_plainly_and_counted(name, act_order):
    fmt = parse_format(name)
    w, h = correlated(14, 5, 50, dead=5)
    dead = np.diag(h) == 0
    out = run(w, h, fmt, act_order=act_order)
    assert out.notes["dead_channels"] == 5 and not out.notes["no_tokens"] and out.notes["damping_added"] == 0
    q = values(out, fmt)
    plain = np.asarray(decode(encode(jnp.asarray(w, jnp.float32), out.params, fmt), out.params, fmt))
    np.testing.assert_array_equal(q[:, dead], plain[:, dead])
    assert (q[:, dead] != 0).any()


@pytest.mark.parametrize("name", FEW)
def test_no_tokens_is_round_to_nearest_and_said(name):
    fmt = parse_format(name)
    w, h = correlated(15, 5, 50, tokens=0)
    out = run(w, h, fmt)
    assert out.notes["no_tokens"] and out.notes["dead_channels"] == 50 and out.notes["damping_added"] == 0
    np.testing.assert_array_equal(out.codes, round_to_nearest(w, fmt)[0])


@pytest.mark.parametrize("damp, at_most", [(0.0, 1e-3), (1e-12, 1e-3), (0.01, 0.0)])
def test_a_singular_hessian_gets_more_damping_as_far_as_needed(damp, at_most):
    fmt = Format("int4")
    w, h = correlated(16, 4, 64, tokens=3)
    out = run(w, h, fmt, damp=damp)
    assert (out.notes["damping_added"] > 0) == (at_most > 0) and out.notes["damping_added"] <= at_most
    assert objective(w, values(out, fmt), h).sum() < objective(w, round_to_nearest(w, fmt)[1], h).sum()


def test_an_indefinite_hessian_ends_at_round_to_nearest():
    fmt = Format("int4")
    w, h = correlated(17, 3, 20)
    h = h - np.diag(np.diag(h)) * 0.9 - 100 * np.trace(h) * np.ones((20, 20)) * (1 - np.eye(20))
    out = run(w, h, fmt)
    assert 1 < out.notes["damping_added"] <= 10
    assert np.isfinite(values(out, fmt)).all()


def test_zero_and_constant_weights_are_exact():
    fmt = parse_format("int4-g16-asym-f32")
    w, h = correlated(18, 3, 48)
    w[:, :16], w[:, 16:32] = 0, 0.25
    q = values(run(w, h, fmt, act_order=True), fmt)
    np.testing.assert_array_equal(q[:, :16], 0)
    np.testing.assert_allclose(values(run(0 * w, h, fmt), fmt), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4-g128", "int8"])
def test_temporaries_are_a_few_copies_of_the_weight_and_the_gram(name):
    fmt = parse_format(name)
    m, n = 3072, 1536
    args = jax.ShapeDtypeStruct((1, m, n), jnp.float32), jax.ShapeDtypeStruct((1, n, n), jnp.float32)
    solve = jax.jit(lambda rows, gram: gptq().solve(Rounding(rows), stats_of(gram), fmt)[1:])
    assert solve.lower(*args).compile().memory_analysis().temp_size_in_bytes < 3 * (4 * m * n + 4 * n * n)
