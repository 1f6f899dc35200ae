"""`lowrank_inputs` in the walk: carried through stacks, experts, static ranges, interruptions and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.checkpoint import qtensor_sharding, read_manifest
from tests.core.cases import same_tree
from tests.interrupts import resumed
from tests.model_bank import quick
from tests.test_quantize import LAYERS, layer, normal, scanned, stacked, unrolled

METHOD = jq.chain(jq.lowrank_inputs(3), jq.gptq())
RECIPE = {"head": None, "*": jq.FP8}
STATIC = jq.Policy(jq.INT8, jq.Activation("int8", "tensor", symmetric=False, range="max"))


def inputs(seed):
    """Tokens that have a few directions in common."""
    few = normal(77, 2, 32, scale=6.0)
    return normal(seed, 4, 12, 32) + normal(seed + 50, 4, 12, 2) @ few


@pytest.fixture(scope="module")
def model():
    params = {f"layer{i}": layer(i) for i in range(LAYERS)} | {"head": normal(99, 32, 10)}
    return params, [inputs(i) for i in range(2)]


@pytest.fixture(scope="module")
def qparams(model):
    return jq.quantize(unrolled, model[0], RECIPE, METHOD, model[1])


def error(apply, q, params, x):
    return float(jnp.mean((quick(jq.quantized(apply))(q, x) - apply(params, x)) ** 2))


def test_each_weight_has_its_side_and_the_output_is_nearer(model, qparams):
    params, batches = model
    plain = jq.quantize(unrolled, params, RECIPE, jq.gptq(), batches)
    assert error(unrolled, qparams, params, inputs(7)) < 0.8 * error(unrolled, plain, params, inputs(7))
    for i in range(LAYERS):
        for name, q in qparams[f"layer{i}"].items():
            kept, n = q.codes[0].shape[0], q.row_length
            assert q.side.left.shape == (kept, 3) and q.side.right.shape == q.side.taken.shape == (1, 3, n)
            assert {a.dtype for a in q.side} == {jnp.dtype(jnp.bfloat16)}
            assert q.nbytes == plain[f"layer{i}"][name].nbytes + 2 * 3 * (kept + 2 * n)
    together = [qparams["layer0"][name].side for name in "ab"]  # they read one input
    np.testing.assert_array_equal(together[0].right, together[1].right)
    np.testing.assert_array_equal(together[0].taken, together[1].taken)


def test_unrounded_inputs_meet_what_the_leaf_stands_for(qparams):
    whole = lambda q: q.replace(activation=None) if jq.is_qtensor(q) else q
    weights = jax.tree.map(whole, qparams, is_leaf=jq.is_qtensor)
    x = inputs(7)
    want = unrolled(jq.dequantize(weights), x)
    np.testing.assert_allclose(quick(jq.quantized(unrolled))(weights, x), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow(optimized=False)
def test_scanned_layers_get_the_sides_of_unrolled_ones(model, qparams):
    params, batches = model
    q = jq.quantize(scanned, stacked(params), RECIPE, METHOD, batches)
    for name in "abc":
        assert q[name].side.taken.shape[:2] == (LAYERS, 1)
        for i in range(LAYERS):
            want = qparams[f"layer{i}"][name].dequantize()
            np.testing.assert_allclose(q[name].dequantize()[i], want, atol=2e-3 * np.abs(want).max())
    x = inputs(7)
    got = quick(jq.quantized(scanned))(q, x)
    want = quick(jq.quantized(unrolled))(qparams, x)
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    assert all(r.fused and "taken out of the input" in r.how for r in jq.explain(scanned, q, x))


def test_vmapped_inputs_are_taken_apart_one_by_one(qparams):
    q, x = {"w": qparams["layer0"]["a"]}, inputs(7)
    run = jq.quantized(lambda p, x: x @ p["w"])
    want = jnp.stack([quick(run)(q, one) for one in x])
    got = quick(jax.vmap(run, (None, 0)))(q, x)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_training_beside_it_has_the_bits_of_quantized(model, qparams):
    """The leaves that have been quantized stay; the head is rounded in every call."""
    x, recipe = inputs(7), {"head": jq.FP8, "*": None}
    q = jq.quantize(unrolled, qparams, recipe, jq.rtn(), model[1])
    want = quick(jq.quantized(unrolled))(q, x)
    train = jq.fake_quantized(unrolled, recipe)
    np.testing.assert_array_equal(quick(train)(qparams, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("method", [jq.qronos(act_order=True), jq.gptaq()], ids=lambda m: m.name)
def test_both_streams_walk_behind_it(model, method):
    params, batches = model
    q = jq.quantize(unrolled, params, RECIPE, jq.chain(jq.lowrank_inputs(3), method), batches)
    plain = jq.quantize(unrolled, params, RECIPE, method, batches)
    assert error(unrolled, q, params, inputs(7)) < 0.8 * error(unrolled, plain, params, inputs(7))


def test_an_interrupted_run_ends_in_the_same_bits(model, qparams, tmp_path, monkeypatch):
    run = lambda: jq.quantize(unrolled, model[0], RECIPE, METHOD, model[1], resume=tmp_path / "work")
    assert same_tree(resumed(monkeypatch, 3, run), qparams)


def test_checkpoints_hold_it_bit_for_bit_and_say_which_version_reads_it(qparams, tmp_path):
    jq.save(tmp_path / "q", qparams)
    assert read_manifest(tmp_path / "q")["format_version"] == 4
    assert same_tree(jq.load(tmp_path / "q"), qparams)
    with pytest.raises(jq.JQuantError, match="layer0/a was saved as"):
        like = jax.tree.map(lambda q: q, qparams)
        side = like["layer0"]["a"].side._replace(taken=None)
        like["layer0"]["a"] = like["layer0"]["a"].replace(side=side)
        jq.load(tmp_path / "q", like=like)


def test_it_is_restored_onto_devices(qparams, tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    q = qparams["layer0"]["c"]  # [contracted, kept]
    jq.save(tmp_path / "q", {"w": q})
    placed = jq.load(tmp_path / "q", {"w": where})["w"]
    assert placed.side.left.sharding.spec[0] == "model" and placed.side.taken.sharding.spec[2] == "data"
    assert same_tree(jax.tree.map(np.asarray, placed), jax.tree.map(np.asarray, q))
    assert qtensor_sharding(q, where).side == jax.tree.map(lambda a: a.sharding, placed.side)
    run, x = quick(jq.quantized(lambda p, x: x @ p["w"])), normal(3, 5, 64)
    want = run({"w": q}, x)
    np.testing.assert_allclose(run({"w": placed}, x), want, atol=1e-2 * np.abs(want).max())


def test_experts_have_one_each_and_one_without_tokens_takes_nothing():
    def moe(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    p, x, sizes = {"w": normal(0, 3, 16, 8)}, normal(1, 40, 3) @ normal(2, 3, 16, scale=9.0), jnp.array([25, 0, 15])
    x = x + normal(3, 40, 16)
    with pytest.warns(jq.JQuantWarning, match="no calibration token reached"):
        q = jq.quantize(moe, p, jq.FP8, METHOD, [(x, sizes)])
        plain = jq.quantize(moe, p, jq.FP8, jq.gptq(), [(x, sizes)])
    side = q["w"].side
    assert side.left.shape == (3, 8, 3) and side.right.shape == side.taken.shape == (3, 1, 3, 16)
    assert not np.any(side.taken[1].astype(jnp.float32)) and np.any(side.taken[2].astype(jnp.float32))
    error = lambda q: float(np.sum((quick(jq.quantized(moe))(q, x, sizes) - moe(p, x, sizes)) ** 2))
    assert error(q) < 0.5 * error(plain)
    everywhere = jnp.array([20, 6, 14])
    got, want = quick(jq.quantized(moe))(q, x, everywhere), moe(p, x, everywhere)
    np.testing.assert_allclose(got, want, atol=0.1 * np.abs(want).max())


def test_a_static_range_is_that_of_what_is_left():
    apply, p, x = lambda p, x: x @ p["w"], {"w": normal(0, 32, 8)}, inputs(1).reshape(-1, 32)
    q = jq.quantize(apply, p, STATIC, METHOD, [x])["w"]
    right, taken = (np.asarray(a[0].astype(jnp.float32), np.float64) for a in q.side[1:])
    left = x - np.asarray(x, np.float64) @ right.T @ taken
    np.testing.assert_allclose(q.activation_params.scale.item(), (left.max() - left.min()) / 255, rtol=1e-4)
    plain = jq.quantize(apply, p, STATIC, jq.gptq(), [x])
    assert error(apply, {"w": q}, p, x) < 0.5 * error(apply, plain, p, x)


def test_static_ranges_of_experts_are_those_of_what_each_has_left():
    def moe(p, x, sizes):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    sizes, x = jnp.array([25, 15]), normal(1, 40, 3) @ normal(2, 3, 16, scale=9.0) + normal(3, 40, 16)
    q = jq.quantize(moe, {"w": normal(0, 2, 16, 8)}, STATIC, METHOD, [(x, sizes)])["w"]
    for e, rows in enumerate([x[:25], x[25:]]):
        right, taken = (np.asarray(a[e, 0].astype(jnp.float32), np.float64) for a in q.side[1:])
        left = rows - np.asarray(rows, np.float64) @ right.T @ taken
        want = (max(left.max(), 0) - min(left.min(), 0)) / 255
        np.testing.assert_allclose(q.activation_params.scale.ravel()[e], want, rtol=1e-4)


def test_a_convolution_rounds_its_whole_input():
    def conv(p, x):
        return jax.lax.conv(x, p["w"], (1, 1), "SAME")

    p, x = {"w": normal(0, 6, 4, 3, 3)}, normal(1, 2, 4, 8, 8)
    q = jq.quantize(conv, p, jq.Format("int3"), METHOD, [x])
    assert q["w"].side.taken.shape[-2:] == (3, 36)
    want = conv(jq.dequantize(q), x)
    np.testing.assert_allclose(jq.quantized(conv)(q, x), want, rtol=1e-4, atol=1e-4)
    rounded = jq.quantize(conv, p, jq.W8A8, METHOD, [x])
    want = conv(p, x)
    np.testing.assert_allclose(jq.quantized(conv)(rounded, x), want, atol=0.05 * np.abs(want).max())


def test_tables_that_are_looked_up_and_multiplied_keep_both_readings():
    def tied(p, t):
        return jnp.tanh(p["table"][t] * 4) @ p["table"].T

    p, t = {"table": normal(0, 40, 16)}, jnp.arange(80).reshape(4, 20) % 40
    q = jq.quantize(tied, p, jq.FP8, METHOD, [t])
    assert q["table"].side.rank == 3
    want = tied(p, t)
    np.testing.assert_allclose(quick(jq.quantized(tied))(q, t), want, atol=0.06 * np.abs(want).max())
    looked_up = quick(jq.quantized(lambda p, t: p["table"][t]))(q, t)
    rows = q["table"].replace(activation=None).dequantize()[t]
    np.testing.assert_allclose(looked_up, rows, atol=1e-6)
