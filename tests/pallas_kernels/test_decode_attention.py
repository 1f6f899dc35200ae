"""The numbers of flash decoding over quantized codes, in Pallas' interpreter (on a GPU: its own), against float64.

Queries and weights are sums of two bfloat16 numbers (to 2^-17), codes and sums exact to float32. So a score is right to
a few 2^-17 of the sum of its absolute terms, and the result to that of its own, times what the scores' errors do.
Elements that are rounded to bfloat16 (codebooks; scales of blocks of tokens, and in groups too small for a tensor core)
have 2^-9 instead.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Coded, Tiling, decode_attention, normalized, reference, why_not
from pallas_kernels.decode_attention.layout import Layout
from pallas_kernels.quantized_matmul.elements import ELEMENTS
from tests.pallas_kernels.attention_cases import KINDS, Case, exact, make
from tests.pallas_kernels.cases import interpreted

EXACT, ROUNDED = 2.0**-17, 2.0**-9
SMALL = Tiling(block=32, splits=2, warps=1, stages=1)


QUICK = ("bfloat16", "int8", "fp8_e4m3-tensor", "int4-g32-asym", "int4-t32-asym", "nvfp4", "lloyd4")


def some(names, quick) -> list:
    """All of them, those that are not quick only with --slow: the interpreter is compiled anew for each."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def run(case: Case, tiling=SMALL, **options):
    return decode_attention(*case.arrays, **case.options, **{"interpret": interpreted(), "tiling": tiling, **options})


def check(case: Case, unit: float = EXACT, state=None, **options) -> None:
    got, want = run(case, **options) if state is None else state, exact(case)
    score = unit * want.score_size
    seen = np.isfinite(want.top)
    np.testing.assert_array_equal(np.isfinite(got.top), seen)
    np.testing.assert_array_equal(np.asarray(got.total)[~seen], 0)
    np.testing.assert_array_equal(np.asarray(got.out)[~seen], 0)
    assert np.max(np.abs(np.asarray(got.top)[seen] - want.top[seen]), initial=0) <= score + 1e-6
    # A score's error e changes its weight by the factor exp(e), and so does that of the largest one.
    relative = 2 * score + 2 * unit + 1e-6
    np.testing.assert_array_less(np.abs(got.total - want.total)[seen], relative * want.total[seen])
    np.testing.assert_array_less(np.abs(got.out - want.out)[seen], relative * want.size[seen] + 1e-30)


def unit_of(*names: str, dim: int = 64) -> float:
    rounded = ("lloyd", "int2-g", "int3-g", "int4-g16", "int4-t", "int2-t")
    return ROUNDED if any(n.startswith(rounded) for n in names) else EXACT


@pytest.mark.parametrize("name", some(KINDS, QUICK))
def test_every_format_is_right(name):
    """Ragged lengths, one of them 0; three queries of a kv head."""
    values = name.replace("-t32", "-g32")
    check(make(name, values), unit_of(name, values))


@pytest.mark.parametrize(
    "name",
    some(["bfloat16", "fp8_e4m3", "int8", "int4-g32-asym", "nvfp4", "int4-t32-asym", "lloyd2"], ["int4-g32-asym"]),
)
@pytest.mark.parametrize("dim", some([80, 128, 256], [80]))
def test_every_head_dim_is_right(name, dim):
    values = name.replace("-t32", "-g32")
    case = make(name, values, dim=dim, lengths=(41,), slots=64, kv_heads=1, rows=2, seed=1)
    check(case, unit_of(name, values))


@pytest.mark.parametrize("rows", some([1, 8, 9], [9]))
def test_any_number_of_queries_is_right(rows):
    check(make("int8", "int4-g64-asym", rows=rows, lengths=(70, 33)))


@pytest.mark.parametrize(
    "rules", [dict(window=20), dict(window=20, sink_tokens=2), dict(window=20, sink_tokens=2, first=4), dict(first=5)]
)
def test_windows_sinks_and_positions_kept_elsewhere(rules):
    check(make("int8", **rules))


def test_soft_cap_and_shift():
    case = make("int8", soft_cap=1.5)
    shift = jnp.asarray(np.random.default_rng(3).standard_normal(case.arrays[0].shape[:3]), jnp.float32)
    check(case._replace(options={**case.options, "shift": shift}))


def test_queries_at_several_positions():
    """Two tokens of two heads: each sees its own past."""
    at = np.asarray([[48, 49] * 2, [-1, 0] * 2])
    check(make("int4-g32-asym", lengths=(50, 1), rows=4, at=at))


def test_a_ring():
    """Position p in slot p modulo 96; the window reaches back over the end."""
    case = make("int8", lengths=(50, 130, 290), window=60, ring=True)
    check(case._replace(options={**case.options, "written": case.arrays[4]}))


@pytest.mark.parametrize("name", some(["int8", "int4-t32-asym"], ["int4-t32-asym"]))
def test_pages(name):
    """Of a pool, in any order; a sequence has -1 for the pages that it does not have."""
    case = make(name, "int4-g32-asym", lengths=(50, 0, 96), slots=32, page_size=32)
    rng = np.random.default_rng(0)
    pool = make(name, "int4-g32-asym", lengths=(0,) * 7, slots=32)
    table = np.full((3, 3), -1)
    table[0, :2], table[2] = [4, 1], rng.permutation([0, 6, 2])
    arrays = (case.arrays[0], *pool.arrays[1:3], *case.arrays[3:])
    check(Case(arrays, {**case.options, "table": jnp.asarray(table, jnp.int32)}), unit_of(name))


@pytest.mark.parametrize("name", some(["bfloat16", "int8", "int4-g32-asym", "nvfp4", "int4-t32-asym"], ["int8"]))
def test_nothing_outside_of_a_sequence_is_read(name):
    """NaN everywhere past the end, and before what the window shows: no result changes."""
    values = name.replace("-t32", "-g32")
    case = make(name, values, window=40, lengths=(70, 10))

    def spoilt(c: Coded, kind) -> Coded:
        def one(a):
            if a is None or a.dtype == jnp.uint8:
                return a
            per = 96 // a.shape[2]
            slot = np.arange(a.shape[2])[None, :] * per
            outside = slot >= np.asarray([[70], [10]])
            if per == 1:
                outside |= slot < np.asarray([[30], [0]])
            return jnp.where(outside[:, None, :, None], jnp.asarray(jnp.nan).astype(a.dtype), a)

        codes = tuple(one(a) for a in c.codes)
        return c._replace(codes=codes, scale=one(c.scale))

    q, k, v, at, end = case.arrays
    bad = case._replace(arrays=(q, spoilt(k, name), spoilt(v, values), at, end))
    jax.tree.map(np.testing.assert_array_equal, run(bad), run(case))


@pytest.mark.parametrize("name", some(["int8", "nvfp4", "mxfp4", "fp8_e4m3-tensor"], ["nvfp4"]))
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_number_that_is_none_makes_the_result_nan(name, which):
    """Of its own sequence and head only."""
    q, *stores, at, end = make(name, lengths=(40, 40)).arrays
    c = stores[which == "values"]
    if c.scale is None:
        c = c._replace(codes=(c.codes[0].at[0, 1, 7, 3].set(0x7F),))
    else:
        c = c._replace(scale=c.scale.at[0, 1, 7, 0].set(jnp.asarray(jnp.nan).astype(c.scale.dtype)))
    stores[which == "values"] = c
    got = np.asarray(normalized(run(Case((q, *stores, at, end), make(name).options))))
    assert np.isnan(got[0, 1]).any(axis=-1).all()
    assert np.isfinite(got[0, 0]).all() and np.isfinite(got[1]).all()


@pytest.mark.slow
@hypothesis.given(
    lengths=st.lists(st.integers(0, 96), min_size=1, max_size=2), splits=st.integers(1, 5), rows=st.integers(1, 5),
    block=st.sampled_from([16, 32, 64]), window=st.sampled_from([None, 1, 30]), seed=st.integers(0, 9),
)  # fmt: skip
@hypothesis.settings(max_examples=6)
def test_any_lengths_splits_and_blocks_are_right(lengths, splits, rows, block, window, seed):
    case = make("int4-g32-asym", lengths=tuple(lengths), rows=rows, kv_heads=1, window=window, seed=seed)
    check(case, tiling=Tiling(block, splits, 1, 1))


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_is_right(name):
    values = name.replace("-t32", "-g32")
    case = make(name, values, window=30, sink_tokens=2, soft_cap=2.0)
    check(case, state=reference.decode_attention(*case.arrays, **case.options))


def test_vmap_is_one_more_axis():
    """Layers, say: the same numbers as one after the other."""
    cases = [make("int8", lengths=(50, 20), seed=seed) for seed in (0, 1)]
    f = lambda *arrays: decode_attention(*arrays, **cases[0].options, interpret=interpreted(), tiling=SMALL)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(c.arrays for c in cases))
    got = jax.vmap(f)(*stacked)
    for i, case in enumerate(cases):
        for a, b in zip(got, f(*case.arrays), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def test_reasons_say_what_is_wrong():
    e = ELEMENTS["int4"]
    whole = Layout(e)
    reason = lambda k=whole, v=whole, **more: why_not((k, v), 64, **more)
    assert reason() is None
    assert "blocks of 24 tokens" in reason(Layout(e, tokens=24))
    assert "values with a scale for a channel" in reason(v=Layout(e, tokens=32))
    assert "groups of 24" in reason(Layout(e, 24))
    assert "33 queries" in reason(rows=33)
    assert "pages of 24" in reason(page_size=24)
    for block in (8, 48):
        with pytest.raises(ValueError, match="power of two from 16"):
            run(make("int8"), tiling=Tiling(block, 1))
