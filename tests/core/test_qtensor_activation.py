"""A QTensor's activation goes wherever the QTensor goes."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jquant as jq
from jquant.checkpoint import qtensor_sharding, read_manifest
from jquant.core import kept
from jquant.core.errors import CheckpointError, DamagedQTensorError
from jquant.core.formats import BlockParams
from tests import model_bank
from tests.model_bank import params

STATIC = jq.Activation("int8", "tensor", False, "max")
ACTS = [jq.Activation(), STATIC, jq.Activation("fp8_e4m3", "tensor", range="mse")]


def layers(act: jq.Activation) -> jq.QTensor:
    """Four layers `[4, 8, 6]`, contracted along the second axis, each with its own range."""
    found = None
    if act.static:
        zero = None if act.symmetric else jnp.arange(4, dtype=jnp.uint8).reshape(4, 1, 1)
        found = BlockParams(jnp.arange(1.0, 5).reshape(4, 1, 1), zero)
    return model_bank.rtn(params(w=(4, 8, 6))["w"], jq.INT8, (-2,)).replace(activation=act, activation_params=found)


def assert_equal(a: jq.QTensor, b: jq.QTensor) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b) and a.check().scheme == b.check().scheme
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(params=ACTS, ids=str)
def q(request) -> jq.QTensor:
    return layers(request.param)


def test_pytrees(q):
    assert_equal(jax.tree.map(lambda a: a, q), q)
    assert_equal(jax.jit(lambda q: q)(q), q)
    assert_equal(pickle.loads(pickle.dumps(q)), q)
    assert_equal(jax.vmap(lambda q: q)(q), q)
    assert_equal(jax.lax.scan(lambda c, q: (c, q), 0, q)[1], q)
    assert_equal(q.replace(dtype="bfloat16").astype("float32"), q)
    assert str(q.activation) in repr(q) and f"int8+{q.activation}" == q.scheme
    static = 0 if q.activation_params is None else sum(a.nbytes for a in jax.tree.leaves(q.activation_params))
    assert q.nbytes == 4 * 6 * (8 + 4) + static
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(q)[0]]
    assert any("activation_params" in p for p in paths) == q.activation.static


def test_slices_of_layers(q):
    third = kept.remove_axis(kept.slice_axis(q, -3, 2, 1), -3)
    some = kept.slice_axis(kept.slice_axis(q, -1, 1, 3), -3, jnp.int32(1), 2)
    assert third.check().shape == (8, 6) and some.check().shape == (2, 8, 3)
    assert kept.move_to_front(q, -1).check().shape == (6, 4, 8)
    if q.activation.static:
        np.testing.assert_array_equal(third.activation_params.scale, [[3.0]])
        np.testing.assert_array_equal(some.activation_params.scale.ravel(), [2.0, 3.0])
        assert third.activation_params.scale.shape == (1, 1)


def test_shardings(q):
    devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("layer", "out"))
    places = qtensor_sharding(q, NamedSharding(mesh, PartitionSpec("layer", None, "out")))
    moved = jax.device_put(q, places)
    assert_equal(moved, q)
    if q.activation.static:
        assert places.activation_params.scale.spec[:2] == ("layer", None)


def test_checkpoints(q, tmp_path):
    jq.save(tmp_path / "q", {"w": q})
    assert_equal(jq.load(tmp_path / "q")["w"], q)
    assert_equal(jq.load(tmp_path / "q", like={"w": jax.eval_shape(lambda q: q, q)})["w"], q)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("layer",))
    assert_equal(jq.load(tmp_path / "q", NamedSharding(mesh, PartitionSpec("layer")))["w"], q)
    assert read_manifest(tmp_path / "q")["format_version"] == 2
    plain = q.replace(activation=None, activation_params=None)
    with pytest.raises(CheckpointError, match="was saved as"):
        jq.load(tmp_path / "q", like={"w": plain})
    jq.save(tmp_path / "plain", {"w": plain})  # and what has none, older versions read
    manifest = read_manifest(tmp_path / "plain")
    assert manifest["format_version"] == 1 and "activation" not in manifest["leaves"]["w"]
    assert jq.load(tmp_path / "plain")["w"].activation is None


def test_damage_is_seen():
    q = layers(ACTS[1])
    with pytest.raises(DamagedQTensorError, match="lacks the scale of a static input range"):
        q.replace(activation_params=None).check()
    with pytest.raises(DamagedQTensorError, match="has the scale of a static"):
        q.replace(activation=jq.Activation()).check()
    cast = q.replace(activation_params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), q.activation_params))
    with pytest.raises(DamagedQTensorError, match="input scale .* is bfloat16"):
        cast.check()


def test_reports_name_the_activation():
    from jquant.report import bytes_by_format

    assert [f.name for f in bytes_by_format({"w": layers(ACTS[0])})] == ["int8+int8"]
