"""Folds in `quantize`: from the float model to codes, in every model."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.core.per_use import is_per_use
from jquant.report import bytes_table
from tests.fold.models import BANK, MODELS
from tests.interrupts import interrupt_walk

INT4 = jq.parse_format("int4-g5-asym")
CHAINS = [jq.chain(m, jq.rtn()) for m in (jq.rotate(), jq.awq(grid=3, clip=False), jq.smoothquant())]


def _relative(model, qparams):
    want = model.apply(model.params, *model.args)
    got = jax.jit(jq.quantized(model.apply))(qparams, *model.args)
    return float(jnp.linalg.norm(want - got) / jnp.linalg.norm(want))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("method", CHAINS, ids=lambda m: m.name)
def test_quantize(model, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        q = jq.quantize(model.apply, model.params, jq.parse_format("int8-g5-asym"), method, [model.args])
    sites = jq.find_sites(model.apply, model.params, *model.args).by_path()
    quantizable = sum(any(s.quantizable for s in of) for of in sites.values())
    leaves = jax.tree.leaves(q, is_leaf=jq.is_qtensor)
    assert sum(map(jq.is_qtensor, leaves)) == quantizable
    assert _relative(model, q) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [jq.chain(jq.rotate(), jq.gptq()), jq.chain(jq.awq(grid=3), jq.gptq())], ids=lambda m: m.name
)
def test_quantize_a_scanned_model_by_a_walk(method):
    model = BANK["scanned"]
    plain = jq.quantize(model.apply, model.params, INT4, jq.rtn(), [model.args])
    q = jq.quantize(model.apply, model.params, INT4, method, [model.args])
    assert _relative(model, q) < _relative(model, plain)


def test_a_hidden_norm_is_quantized_and_said():
    model = BANK["hidden_norm"]
    with pytest.warns(jq.JQuantWarning, match="awq: nothing in front of gate, up can take up"):
        q = jq.quantize(model.apply, model.params, INT4, jq.chain(jq.awq(grid=2, clip=False), jq.rtn()), [model.args])
    assert all(map(jq.is_qtensor, [q["up"], q["gate"], q["down"]]))
    with pytest.warns(jq.JQuantWarning, match="rotate: no residual stream"):
        q = jq.quantize(model.apply, model.params, INT4, jq.chain(jq.rotate(), jq.rtn()), [model.args])
    assert jq.is_qtensor(q["up"])


def test_outliers_are_spread():
    """What rotations are for: channels with large weights no longer set the scale of all others."""
    model = BANK["fused"]
    head = model.params["head"].copy()
    head[3] *= 20
    params = {**model.params, "head": head, "last_gain": np.ones_like(model.params["last_gain"])}
    int4 = {"head": jq.parse_format("int4"), "*": None}
    q = jq.quantize(model.apply, params, int4, jq.chain(jq.rotate(), jq.rtn()), [model.args])
    outlier = lambda w: np.max(np.abs(w), axis=0) / np.sqrt(np.mean(w**2, axis=0))
    before, after = outlier(head), outlier(np.asarray(jq.dequantize(q)["head"]))
    assert np.median(before) > 3.3 and np.median(after) < 1.5 and after.max() < before.max()


def test_a_rotation_alone_chooses_no_codes():
    model = BANK["fused"]
    with pytest.raises(jq.JQuantError, match=r"rotate\(\) chooses no codes; chain it"):
        jq.quantize(model.apply, model.params, INT4, jq.rotate(), [model.args])


def test_same_seed_same_bits():
    model = BANK["scanned"]
    runs = [
        jax.tree.leaves(jq.quantize(model.apply, model.params, INT4, jq.chain(jq.rotate(seed), jq.rtn()), [model.args]))
        for seed in (1, 1, 2)
    ]
    same = [all(np.array_equal(a, b) for a, b in zip(runs[0], other, strict=True)) for other in runs[1:]]
    assert same == [True, False]


@pytest.mark.slow(optimized=False)
def test_a_tied_table_that_was_rotated_is_a_leaf_like_others(tmp_path):
    """find_sites, calibrate, quantize, dequantize, evaluate, save and load take it; a bare call says what to write."""
    model = BANK["scanned"]
    recipe = {"embed": None, "*": INT4}
    q = jq.quantize(model.apply, model.params, recipe, jq.chain(jq.rotate(), jq.rtn()), [model.args])
    assert is_per_use(q["embed"]) and q["embed"].value is not None
    n = q["embed"].shape[-1]
    assert q["embed"].nbytes == q["embed"].value.nbytes + 2 * 4 * n * n
    assert repr(jq.find_sites(model.apply, q, *model.args)) == repr(
        jq.find_sites(model.apply, model.params, *model.args)
    )
    stats = jq.calibrate(model.apply, q, [model.args])
    assert stats["embed"].gram.shape == (n, n)
    then = jq.quantize(model.apply, q, jq.INT8, jq.gptq(), [model.args])
    assert is_per_use(then["embed"]) and jq.is_qtensor(then["embed"].value) and then["layers"]["o"] is q["layers"]["o"]
    floats = jq.dequantize(then)
    run = jax.jit(jq.quantized(model.apply))
    np.testing.assert_allclose(run(then, *model.args), run(floats, *model.args), atol=1e-4)
    jq.save(tmp_path / "saved", then)
    back = jq.load(tmp_path / "saved")
    np.testing.assert_array_equal(run(back, *model.args), run(then, *model.args))
    assert jq.evaluate(model.apply, model.params, then, list(model.args)).bytes == sum(
        a.nbytes for a in jax.tree.leaves(then)
    )
    with pytest.raises(jq.JQuantError, match=r"run the function as jquant.quantized\(apply\)"):
        model.apply(q, *model.args)
    many = np.stack([model.args[0]] * 2)
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(then, many)[1], run(then, *model.args), rtol=1e-5, atol=1e-5)
    shown = bytes_table(q).text().splitlines()
    assert any(line.startswith("float32, one per use") for line in shown)
    grad = jax.grad(lambda e: run({**q, "embed": e}, *model.args).sum())(q["embed"])
    assert np.isfinite(grad.value).all() and np.abs(grad.value).max() > 0


def test_bfloat16_parameters_stay_so():
    model = BANK["fused"]
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), model.params)
    q = jq.quantize(model.apply, half, {"head": jq.INT8, "*": None}, jq.chain(jq.rotate(), jq.rtn()), [model.args])
    assert all(a.dtype == jnp.bfloat16 for k, a in q.items() if k != "head") and q["head"].dtype == jnp.bfloat16
    want, got = model.apply(half, *model.args), jq.quantized(model.apply)(q, *model.args)
    assert float(jnp.linalg.norm(want - got) / jnp.linalg.norm(want)) < 0.05


@pytest.mark.parametrize("make", [lambda: jq.awq(grid=0), lambda: jq.awq(max_shrink=1), lambda: jq.smoothquant(1.5)])
def test_settings_are_checked(make):
    with pytest.raises(ValueError, match="must be|needs"):
        make()


@pytest.mark.slow
def test_an_interrupted_run_folds_again_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    model, method = BANK["fused"], jq.chain(jq.rotate(), jq.awq(grid=2), jq.gptq())
    job = (model.apply, model.params, INT4, method, [model.args])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jq.JQuantWarning)
        whole = jq.quantize(*job)
        calls = interrupt_walk(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            jq.quantize(*job, resume=tmp_path / "work")
        again = jq.quantize(*job, resume=tmp_path / "work")
    assert calls[:4] == [0, 1, 2, 2]
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(whole)))


def test_what_looks_at_data_says_so():
    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), BANK["mlp"].args)]
    assert not jq.chain(jq.rotate(), jq.rtn()).needs_data
    for method in (jq.smoothquant(), jq.awq(clip=False), jq.awq()):
        method = jq.chain(method, jq.rtn())
        assert method.needs_data
        with pytest.raises(jq.JQuantError, match="looks at calibration data, and the batches are shapes; give arrays"):
            jq.quantize(BANK["mlp"].apply, BANK["mlp"].params, INT4, method, shapes)


def test_a_rotation_needs_only_shapes():
    model = BANK["fused"]
    shapes = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.args)]
    job = (model.apply, model.params, {"head": INT4, "*": None}, jq.chain(jq.rotate(), jq.rtn()))
    a, b = jq.quantize(*job, shapes), jq.quantize(*job, [model.args])
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
