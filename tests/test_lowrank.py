"""`lowrank` in the walk: carried through stacks, experts, interruptions and checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.checkpoint import qtensor_sharding, read_manifest
from jquant.resume import _load_unit, _save_unit
from jquant.trace.program import Unit
from tests.core.cases import same_tree
from tests.interrupts import resumed
from tests.test_quantize import LAYERS, RECIPE, inputs, layer, normal, scanned, stacked, unrolled

METHOD = jq.chain(jq.gptq(), jq.lowrank(4))


@pytest.fixture(scope="module")
def model():
    params = {f"layer{i}": layer(i) for i in range(LAYERS)} | {"head": normal(99, 32, 10)}
    return params, [inputs(i) for i in range(2)]


@pytest.fixture(scope="module")
def qparams(model):
    return jq.quantize(unrolled, model[0], RECIPE, METHOD, model[1])


def error(apply, q, params, x):
    return float(jnp.mean((jax.jit(jq.quantized(apply))(q, x) - apply(params, x)) ** 2))


@pytest.mark.slow(optimized=False)
def test_each_weight_has_its_side_and_the_output_is_nearer(model, qparams):
    params, batches = model
    plain = jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches)
    unseen = inputs(7)
    assert error(unrolled, qparams, params, unseen) < 0.8 * error(unrolled, plain, params, unseen)
    for i in range(LAYERS):
        for name, q in qparams[f"layer{i}"].items():
            kept, n = q.codes[0].shape[0], q.row_length
            assert q.side.left.shape == (kept, 4) and q.side.right.shape == (1, 4, n)
            assert q.side.left.dtype == q.side.right.dtype == jnp.bfloat16
            assert q.nbytes == plain[f"layer{i}"][name].nbytes + 2 * 4 * (kept + n)
    # The codes of the first group do not depend on what comes behind it.
    np.testing.assert_array_equal(qparams["layer0"]["a"].codes[0], plain["layer0"]["a"].codes[0])


@pytest.mark.slow(optimized=False)
def test_scanned_layers_get_the_sides_of_unrolled_ones(model, qparams):
    params, batches = model
    q = jq.quantize(scanned, stacked(params), RECIPE, METHOD, batches)
    for name in "abc":
        assert q[name].side.right.shape[:2] == (LAYERS, 1)
        for i in range(LAYERS):
            want = qparams[f"layer{i}"][name].dequantize()
            np.testing.assert_allclose(q[name].dequantize()[i], want, rtol=1e-3, atol=1e-3)
    x = inputs(7)
    got = jax.jit(jq.quantized(scanned))(q, x)
    np.testing.assert_allclose(got, scanned(jq.dequantize(q), x), rtol=1e-4, atol=1e-4)
    assert all(r.fused for r in jq.explain(scanned, q, x))


def test_an_interrupted_run_ends_in_the_same_bits(model, qparams, tmp_path, monkeypatch):
    run = lambda: jq.quantize(unrolled, model[0], RECIPE, METHOD, model[1], resume=tmp_path / "work")
    assert same_tree(resumed(monkeypatch, 3, run), qparams)


def test_checkpoints_hold_sides_bit_for_bit_and_say_which_version_reads_them(qparams, tmp_path):
    jq.save(tmp_path / "q", qparams)
    assert read_manifest(tmp_path / "q")["format_version"] == 3
    assert same_tree(jq.load(tmp_path / "q"), qparams)
    with pytest.raises(jq.JQuantError, match="layer0/a was saved as"):
        like = jax.tree.map(lambda q: q, qparams)
        like["layer0"]["a"] = like["layer0"]["a"].replace(side=None)
        jq.load(tmp_path / "q", like=like)


def test_sides_are_restored_onto_devices(qparams, tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    q = qparams["layer0"]["c"]  # [contracted, kept]
    jq.save(tmp_path / "q", {"w": q})
    placed = jq.load(tmp_path / "q", {"w": where})["w"]
    assert placed.side.left.sharding.spec[0] == "model" and placed.side.right.sharding.spec[2] == "data"
    assert same_tree(jax.tree.map(np.asarray, placed), jax.tree.map(np.asarray, q))
    assert qtensor_sharding(q, where).side == jax.tree.map(lambda a: a.sharding, placed.side)
    run = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(run({"w": placed}, x), run({"w": q}, x), rtol=1e-4, atol=1e-4)


def test_experts_have_a_side_each_and_one_without_tokens_has_one():
    def moe(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    p, x, sizes = {"w": normal(0, 3, 16, 8)}, normal(1, 40, 16), jnp.array([25, 0, 15])
    with pytest.warns(jq.JQuantWarning, match="no calibration token reached"):
        q = jq.quantize(moe, p, jq.INT3_G64, METHOD, [(x, sizes)])["w"]
    assert q.side.left.shape == (3, 8, 4) and q.side.right.shape == (3, 1, 4, 16)
    error = lambda q: np.sum((np.asarray(q.dequantize()) - np.asarray(p["w"])) ** 2, (1, 2))
    assert (error(q) < error(q.replace(side=None))).all()


def test_a_budget_that_is_too_small_is_said_with_the_path():
    p, x = {"w": normal(0, 16, 8)}, normal(1, 40, 16)
    with pytest.warns(jq.JQuantWarning, match="w: the budget is less than a side of rank 1 takes"):
        q = jq.quantize(lambda p, x: x @ p["w"], p, jq.INT3_G64, jq.lowrank(budget=40), [x])["w"]
    assert q.side is None


def test_a_convolution_reads_the_sum():
    def conv(p, x):
        return jax.lax.conv(x, p["w"], (1, 1), "SAME")

    p, x = {"w": normal(0, 6, 4, 3, 3)}, normal(1, 2, 4, 8, 8)
    q = jq.quantize(conv, p, jq.Format("int3"), jq.lowrank(3), [x])
    assert q["w"].side.rank == 3
    want = conv(jq.dequantize(q), x)
    np.testing.assert_allclose(jq.quantized(conv)(q, x), want, rtol=1e-4, atol=1e-4)


def test_work_that_an_older_version_kept_is_read(qparams, tmp_path):
    """It said of a side only that there is one."""
    q, unit = qparams["layer0"]["a"], Unit("layer0/a", (), ())
    with open(tmp_path / "new.npz", "wb") as f:
        _save_unit(f, unit, q)
    with np.load(tmp_path / "new.npz") as data:
        arrays = dict(data)
    static = json.loads(str(arrays["static"]))
    assert static["side"] == 2
    np.savez(tmp_path / "old.npz", **arrays | {"static": np.asarray(json.dumps(static | {"side": True}))})
    for name in ("new", "old"):
        again = _load_unit(tmp_path / f"{name}.npz")
        assert again[0] == unit and same_tree(again[1], q)
